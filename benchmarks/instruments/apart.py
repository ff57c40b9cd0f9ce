"""Measurements in processes of their own: with kernels interpreted, or with compiler caches that are truly empty."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.errors import BenchmarkError

INTERPRETED = {"TRITON_INTERPRET": "1", "FUSEDRES_BACKEND": "triton", "CUDA_VISIBLE_DEVICES": ""}


def ask(module: str, question: Any, environment: Mapping[str, str]) -> Any:
    """What ``python -m module QUESTION``, in JSON, prints on its last line, in JSON.

    Raises:
        BenchmarkError: the process failed; with the last line of what it said.
    """
    command = [sys.executable, "-m", module, json.dumps(question)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        complaint = done.stderr.strip().splitlines()
        raise BenchmarkError(complaint[-1][:200] if complaint else f"{module} exited with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def caches(folder: Path) -> dict[str, str]:
    """Where the compilers keep what they made: nothing else is read.

    On a CPU, Inductor's probes of the vector instructions are left out: they belong to a machine, and not to a model.
    """
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_VEC_ISA_OK": "1",
    }
