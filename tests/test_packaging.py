"""What a user installs: the kernels are inside, two dependencies, and the package runs without triton."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

pytest.importorskip("build")
ROOT = Path(__file__).resolve().parent.parent
PARTS = ("fusedres", "pyproject.toml", "README.md", "LICENSE")
KERNELS = sorted(path.name for path in (ROOT / "fusedres" / "kernels").glob("*.py"))


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FUSEDRES_BACKEND", "TRITON_INTERPRET")}
    done = subprocess.run(command, cwd=cwd, env={**kept, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, and a wheel built from it, of a copy of the tree."""
    tree, built = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", built, tree, cwd=tree)
    return built


@pytest.fixture(scope="module")
def installed(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it, alone."""
    target = tmp_path_factory.mktemp("installed")
    [wheel] = distributions.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target")
    run(*pip, target, wheel, cwd=target)
    return target


def test_sdist_holds_the_kernels_as_files(distributions: Path) -> None:
    [sdist] = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {m.name.split("/", 1)[-1]: m for m in archive.getmembers()}
    for name in KERNELS:
        member = members[f"fusedres/kernels/{name}"]
        assert member.isfile()
        assert member.size == (ROOT / "fusedres" / "kernels" / name).stat().st_size


def test_wheel_holds_the_kernels_as_files(distributions: Path) -> None:
    [wheel] = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for name in KERNELS:
            assert archive.read(f"fusedres/kernels/{name}") == (ROOT / "fusedres" / "kernels" / name).read_bytes()
    assert "fusedres/reference.py" in names
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "benchmarks/"))]


def test_core_dependencies_are_torch_and_triton(distributions: Path) -> None:
    [wheel] = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        requirements = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist", [])
    core = {requirement.split(">=")[0].strip() for requirement in requirements if "extra ==" not in requirement}
    assert core == {"torch", "triton"}


def test_installed_wheel_imports(installed: Path, tmp_path: Path) -> None:
    modules = [f"fusedres.kernels.{Path(name).stem}" for name in KERNELS]
    script = (
        "import importlib, fusedres\n"
        f"for name in {modules}: print(importlib.import_module(name).__file__)\n"
        "print(fusedres.__file__)"
    )
    files = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert len(files) == len(modules) + 1
    assert all(Path(file).is_relative_to(installed) for file in files), files


def test_installed_command_runs(installed: Path, tmp_path: Path) -> None:
    [entry] = (installed / "fusedres-0.1.0.dist-info").glob("entry_points.txt")
    assert "fusedres = fusedres.__main__:main" in entry.read_text()
    text = run(sys.executable, "-m", "fusedres", "doctor", cwd=tmp_path, PYTHONPATH=str(installed))
    assert text.rstrip().endswith("nothing is wrong")


def test_works_without_triton(installed: Path, tmp_path: Path) -> None:
    script = """
import sys
sys.modules["triton"] = None  # an import of it raises ModuleNotFoundError
import torch, fusedres
model = fusedres.fuse(fusedres.models.ResNet(fusedres.models.BasicBlock, [1, 1, 1, 1], 3, width=8))
loss = model(torch.randn(2, 3, 64, 64)).square().mean()
loss.backward()
assert "triton is not installed" in str(fusedres.explain(model)), fusedres.explain(model)
print(fusedres.__file__, float(loss))
"""
    file, loss = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert Path(file).is_relative_to(installed)
    assert float(loss) > 0
