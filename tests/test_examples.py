"""The examples run as their README says, on two processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("options", [(), ("--fsdp",)], ids=["ddp", "fsdp"])
def test_distributed_training(options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FUSEDRES_BACKEND": "auto", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)  # interpreted, it would take minutes
    done = subprocess.run(
        [*command, "examples/train_distributed.py", "--epochs", "3", *options],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([0-9.]+)", done.stdout)]
    assert len(losses) == 3 and losses[-1] < 0.5 * losses[0], done.stdout
    accuracy = re.search(r"accuracy: ([0-9.]+)%", done.stdout)
    assert accuracy and float(accuracy[1]) > 90, done.stdout
