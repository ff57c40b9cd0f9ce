"""The examples run as they are, in processes of their own and without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "residual_blocks.ipynb"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
FUSED = "fusedres, torch.compile", 'backend="fusedres"'


def run(*arguments: str) -> str:
    """What Python prints with these arguments; interpreted kernels would take a training minutes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FUSEDRES_BACKEND": "auto", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[tuple[float, ...]]:
    """The groups of every match."""
    return [tuple(map(float, match.groups())) for match in re.finditer(pattern, text, re.MULTILINE)]


def test_digits():
    printed = run("examples/train_digits.py", "--epochs", "3")
    assert "3 bn_add_bn_act" in printed and "path: reference" in printed
    losses = numbers(r"^ +\d+  ([0-9.]+)  ([0-9.]+)$", printed)
    assert len(losses) == 3 and losses[2][0] < 0.3 * losses[0][0], printed
    assert all(abs(eager - fused) < 0.01 * eager for eager, fused in losses), printed
    [shares] = numbers(r"([0-9.]+)% +([0-9.]+)%", printed)
    assert min(shares) > 90, printed


@pytest.mark.parametrize(
    "options", [(), pytest.param(("--fsdp", "--compile"), marks=pytest.mark.slow)], ids=["ddp", "fsdp, compiled"]
)
def test_distributed_training(options):
    printed = run(*TORCHRUN, "examples/train_distributed.py", "--epochs", "3", *options)
    losses = numbers(r"loss ([0-9.]+)", printed)
    assert len(losses) == 3 and losses[2][0] < 0.5 * losses[0][0], printed
    [(accuracy,)] = numbers(r"accuracy: ([0-9.]+)%", printed)
    assert accuracy > 90, printed


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_study(backend):
    rows = re.findall(
        r"^(\S.*?)  +(\d+) +(\d+) +(\d+) +(\d+) +(\S+)$", run("examples/compile_study.py", "--backend", backend), re.M
    )
    calls = {name: tuple(map(int, counts)) for name, *counts, _ in rows}
    assert calls["eager"] == (4, 12, 0, 0)
    assert calls["fusedres"] == (
        4,
        1,
        0,
        4,
    )  # two layers forward and backward; the gradients of conv1 and the skip meet
    compiled = calls["torch.compile"]
    assert compiled[0] == 4 and compiled[3] == 0 and (compiled[1] == 0 < compiled[2]) == (backend == "inductor")
    assert all(calls[name] == ((4, 0, 1, 4) if backend == "inductor" else (4, 1, 0, 4)) for name in FUSED)
    assert all(float(error) < 1e-5 for *_, error in rows), rows


def test_notebook(tmp_path, monkeypatch):
    """It runs, which compares the kernels with float64, and prints what the committed one shows."""
    import nbformat  # not installed with the oldest supported triton
    from nbclient import NotebookClient

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the notebook sets it
    monkeypatch.setenv("FUSEDRES_BACKEND", "triton")
    for name, value in (("PYTHONPATH", ROOT), ("CUDA_VISIBLE_DEVICES", ""), ("IPYTHONDIR", tmp_path)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    committed, notebook = (nbformat.read(NOTEBOOK, 4) for _ in range(2))
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert printed(notebook) == printed(committed)
    assert [output.output_type for output in notebook.cells[-2].outputs] == ["display_data"]
    assert str(ROOT) not in NOTEBOOK.read_text() and NOTEBOOK.stat().st_size < 150_000


def printed(notebook) -> list[str]:
    """The text of each code cell, without the errors, which depend on the machine."""
    texts = [
        "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    return [re.sub(r" +\d\.\d+e[-+]\d+", "", text) for text in texts]
