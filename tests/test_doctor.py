"""``fusedres doctor``: what it prints, and when it says that something is wrong."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedres import doctor, functional
from fusedres.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = set(functional.__all__)


@pytest.mark.floor
def test_kernels_are_checked_in_every_dtype(capsys, triton_backend):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    rows = [line for line in lines if line and line[0] in PUBLIC]
    assert {row[0] for row in rows} == PUBLIC
    assert len(rows) == len(doctor.FUNCTIONS) * len(doctor.DTYPES)
    assert all(row[-1] == "ok" and "triton" in row for row in rows)
    assert all(len([cell for cell in row if "e-" in cell]) == 4 for row in rows)
    assert f"torch {torch.__version__}" in text
    assert "FUSEDRES_BACKEND=triton" in text
    assert "nothing is wrong" in text
    assert text.isascii()


def test_what_is_wrong_is_said(capsys, monkeypatch):
    monkeypatch.setenv("FUSEDRES_BACKEND", "reference")
    right = functional.batch_norm_act

    def wrong(*args, **kwargs):
        return right(*args, **kwargs) * 1.5

    monkeypatch.setattr(functional, "batch_norm_act", wrong)
    monkeypatch.setitem(doctor.OLDEST, "torch", (99, 0))
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "batch_norm_act in torch.float16: too far off: output 0" in text
    assert "add_batch_norm_act in" not in text
    assert f"wrong: torch {torch.__version__} is older than 99.0" in text
    assert "reference: FUSEDRES_BACKEND=reference" in text


def test_a_backend_that_does_not_exist(capsys, monkeypatch):
    monkeypatch.setenv("FUSEDRES_BACKEND", "nonsense")
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "FUSEDRES_BACKEND=nonsense" in text
    assert "wrong: batch_norm_act in torch.float32: ValueError: FUSEDRES_BACKEND must be" in text


def test_kernels_asked_for_where_there_are_none():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"FUSEDRES_BACKEND": "triton", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "fusedres", "doctor"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "FUSEDRES_BACKEND=triton" in done.stdout
    assert "wrong: batch_norm_act in torch.float32: RuntimeError: FUSEDRES_BACKEND=triton" in done.stdout
    assert "raises: there is no kernel for cpu tensors" in done.stdout


def test_the_command_is_installed_under_its_name():
    line = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("fusedres = "))
    module, name = line.split('"')[1].split(":")
    assert getattr(importlib.import_module(module), name) is main
    for arguments in ([], ["nonsense"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
