"""The layers under pytest-benchmark: collected by name, grouped by layer, and never timed when they are wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("pytest_benchmark")
from benchmarks import test_layers as layers
from benchmarks.providers import EAGER, PROVIDERS, Provider
from benchmarks.workloads import Workload, linear_layers, norm_layer

ROOT = Path(__file__).resolve().parents[2]
LINEAR = linear_layers(24, 24, "float32", (8,), compiled=())[0]
NORM = norm_layer("bn+relu", 8, 6, 6, dtype="float32", batches=(2,), compiled=False)


class Benchmark:
    """Stands for the fixture."""

    def __init__(self) -> None:
        self.group: str | None = None
        self.extra_info: dict[str, Any] = {}
        self.calls = 0

    def __call__(self, call: Any) -> None:
        call()
        self.calls += 1


def test_a_run_from_the_command_line(tmp_path: Path) -> None:
    [workload] = (w for w in layers.LAYERS if w.name == "linear-ln-relu 512-102")
    providers = [case.values[1] for case in layers.CASES if case.values[0] is workload]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-k", workload.name.replace(" ", "_")]
    options = ["-p", "no:cacheprovider", f"--benchmark-json={tmp_path / 'out.json'}", "--benchmark-max-time=0.1"]
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert [one["params"]["provider"] for one in found] == providers
    for one in found:
        extra = one["extra_info"]
        assert one["group"] == workload.name
        assert extra["correct"] is True
        assert extra["bytes"] == 4 * 3 * (64 * 512 + 512 * 102 + 64 * 102)
        assert extra["speedup_low"] <= extra["speedup"] <= extra["speedup_high"]
        assert extra["environment"]["torch"] == torch.__version__
        assert (extra["speedup"] == 1) or one["params"]["provider"] != extra["baseline"] == EAGER


@pytest.mark.parametrize("workload", [LINEAR, NORM], ids=lambda workload: workload.name)
def test_a_wrong_provider_is_not_timed(workload: Workload) -> None:
    class Wrong(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1.001 * self.model(x)

    benchmark = Benchmark()
    found = layers.measure(workload, [PROVIDERS[workload.baseline], Provider("wrong", True, Wrong)])
    layers.compare(found, workload, workload.baseline, benchmark)
    assert benchmark.calls == 1
    assert "wrong" not in found.speedups
    with pytest.raises(AssertionError, match="WRONG"):
        layers.compare(found, workload, "wrong", benchmark)
    assert benchmark.calls == 1


def test_bytes_are_the_budget() -> None:
    assert layers.least_bytes(NORM) == (3 + 5) * 2 * 8 * 6 * 6 * 4
