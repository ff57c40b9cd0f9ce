"""Imports run one way: kernels and reference at the bottom, then ops, functional, nn, fusion, the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fusedres"

# unit -> other units of the package it may import, and distributions outside of the standard library
MAY_IMPORT = {
    "norm": ({}, {"torch"}),
    "kernels": ({"norm"}, {"torch", "triton"}),
    "reference": ({"norm"}, {"torch"}),
    "ops": ({"norm", "kernels", "reference"}, {"torch", "triton"}),
    "functional": ({"norm", "ops", "reference"}, {"torch"}),
    "nn": ({"functional"}, {"torch"}),
    "models": ({}, {"torch"}),
    "fusion": ({"nn", "functional"}, {"torch"}),
    "doctor": ({"functional", "reference", "__version__"}, {"torch"}),
    "__main__": ({"doctor"}, set()),
    "__init__": ({"fusion", "nn", "functional", "models"}, set()),
}
INSTRUMENTS = ROOT / "benchmarks" / "instruments"  # they look into triton and the kernels; other benchmarks do not
BENCHMARKS_MAY_IMPORT = {"fusedres", "fusedres.functional", "fusedres.models", "fusedres.nn"}


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, wherever in it; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def sources() -> list[Path]:
    folders = [PACKAGE / name for name in ("", "kernels", "ops", "functional", "nn", "fusion", "models")]
    return [path for folder in folders for path in sorted(folder.glob("*.py"))]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_direction(path: Path) -> None:
    unit = unit_of(path)
    units, distributions = MAY_IMPORT[unit]
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "fusedres":
            assert rest, f"{unit} imports the whole package"
            assert rest[0] == unit or rest[0] in units, f"{unit} imports {name}"
        else:
            assert top in sys.stdlib_module_names or top in distributions, f"{unit} imports {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "kernels").glob("*.py")), ids=lambda path: path.name)
def test_kernels_know_neither_modules_nor_autograd(path: Path) -> None:
    for name in imports(path):
        assert not name.startswith(("torch.nn", "torch.autograd")), name


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda path: path.name)
def test_benchmarks_use_the_public_api(path: Path) -> None:
    for name in imports(path) if path.parent != INSTRUMENTS else ():
        top = name.split(".")[0]
        assert top != "triton", f"{name}: only an instrument looks into triton"
        assert top != "fusedres" or ".".join(name.split(".")[:2]) in BENCHMARKS_MAY_IMPORT, name


def test_importing_the_package_imports_no_compiler() -> None:
    """Neither triton nor the parts of PyTorch that take longer to import than all of this package."""
    code = "import sys, torch; before = {*sys.modules}; import fusedres; print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {name.split(".")[0] for name in done.stdout.split()} == {"fusedres"}


def test_every_source_has_a_place() -> None:
    assert {unit_of(path) for path in sources()} == set(MAY_IMPORT)
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= set(MAY_IMPORT), "a subpackage without a rule"


def test_the_link_to_the_kernels_is_no_package() -> None:
    """For people; a checkout without links has a file there, and imports all the same."""
    link = ROOT / "kernels"
    target = link.readlink() if link.is_symlink() else Path(link.read_text())
    assert target == Path("fusedres", "kernels")
    assert not (PACKAGE / "kernels" / "__init__.py").exists(), "a top-level package named kernels would collide"
