"""Traffic of the fused functions against their byte budgets, counted in Triton's interpreter.

The suite runs itself in a subprocess, because triton decides at import whether it interprets.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.environment import ROOT, describe
from benchmarks.errors import BenchmarkError, allowed, errors
from benchmarks.results import Row
from benchmarks.traffic import TrafficMeter

DTYPE = torch.bfloat16
ON_CHIP = (2, 256, 14, 14)
SHAPES = ((8, 64, 56, 56), (4, 256, 14, 14), (4, 67, 14, 14), ON_CHIP)
LAYOUTS = ("channels-last", "NCHW")
BIT = 1 / 16  # passes, in 16 bits, of a mask of one bit an element
# Passes over one activation: where the statistics take a launch of their own, and where a channel tile fits on-chip.
BUDGET = {
    "batch_norm_act": {"forward": (3.0, 2.0), "backward": (5.0, 3.0), "eval": (2.0, 2.0)},
    "batch_norm_act + residual": {"forward": (4 + BIT, 3 + BIT), "backward": (6 + BIT, 4 + BIT), "eval": (3.0, 3.0)},
    "add_batch_norm_act": {"forward": (5.0, 4.0), "backward": (6.0, 4.0), "eval": (4.0, 4.0)},
}


class Case(NamedTuple):
    """A key of ``BUDGET``, and what it is called with."""

    workload: str
    shape: tuple[int, ...]
    layout: str

    @property
    def on_chip(self) -> bool:
        return self.shape == ON_CHIP

    def budget(self, phase: str) -> float:
        return BUDGET[self.workload][phase][self.on_chip]


# Workers take every other case: neighbours differ in layout, which costs little, and not in shape or workload.
CASES = [Case(workload, shape, layout) for shape in SHAPES for workload in BUDGET for layout in LAYOUTS]
PHASES = ("forward", "backward", "eval")


def run() -> Iterator[Row]:
    """Measure every case in subprocesses, one a core, yielding rows as they come.

    Raises:
        BenchmarkError: triton is missing, or a subprocess failed.
    """
    workers = min(os.cpu_count() or 1, 4)
    rows: queue.Queue[Row | BenchmarkError | None] = queue.Queue()
    with ThreadPoolExecutor(workers) as pool:
        for worker in range(workers):
            pool.submit(_work, CASES[worker::workers], rows)
        running = workers
        while running:
            row = rows.get()
            if isinstance(row, BenchmarkError):
                raise row
            if row is None:
                running -= 1
            else:
                yield row


def _work(cases: list[Case], rows: queue.Queue[Row | BenchmarkError | None]) -> None:
    """Run ``cases`` in one subprocess; its rows, or an error, and a final ``None`` go to the queue."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FUSEDRES_BACKEND": "triton", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.traffic_suite", json.dumps(cases)]
    with (
        tempfile.TemporaryFile("w+") as stderr,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            rows.put(Row(**json.loads(line)))
        if child.wait():
            stderr.seek(0)
            complaint = stderr.read().strip().splitlines()
            rows.put(BenchmarkError(f"counting traffic failed: {complaint[-1] if complaint else child.returncode}"))
    rows.put(None)


def measure(case: Case) -> Iterator[tuple[str, TrafficMeter, bool]]:
    """Yields the phase, its traffic and whether its results were right."""
    tensors = _inputs(case)
    leaves, cotangents = _leaves(tensors), tensors["cotangents"]
    meters = {phase: TrafficMeter(tensors["x"]) for phase in PHASES}
    with meters["forward"]:
        outputs = _fused(case, tensors, training=True)
    with meters["backward"]:
        gradients = torch.autograd.grad(outputs, leaves, cotangents)
    with torch.no_grad(), meters["eval"]:
        evaluated = _fused(case, tensors, training=False)
    results = {"forward": list(outputs), "backward": list(gradients), "eval": list(evaluated)}
    right = _check(case, tensors, results)
    for phase, meter in meters.items():
        yield phase, meter, right[phase]


def _inputs(case: Case) -> dict[str, Any]:
    torch.manual_seed(0)
    memory_format = torch.channels_last if case.layout == "channels-last" else torch.contiguous_format

    def activation() -> Tensor:
        return torch.randn(case.shape).to(DTYPE).to(memory_format=memory_format)

    channels = case.shape[1]
    return {
        "x": activation().requires_grad_(),
        "residual": None if case.workload == "batch_norm_act" else activation().requires_grad_(),
        "weight": (torch.rand(channels) + 0.5).requires_grad_(),
        "bias": torch.randn(channels).requires_grad_(),
        "running_mean": torch.zeros(channels),
        "running_var": torch.ones(channels),
        "cotangents": [activation() for _ in range(2 if case.workload == "add_batch_norm_act" else 1)],
    }


def _leaves(tensors: dict[str, Any]) -> list[Tensor]:
    return [tensors[name] for name in ("x", "residual", "weight", "bias") if tensors[name] is not None]


def _fused(case: Case, tensors: dict[str, Any], *, training: bool) -> tuple[Tensor, ...]:
    from fusedres import functional

    function = getattr(functional, case.workload.split()[0])
    outputs = function(
        tensors["x"], residual=tensors["residual"], weight=tensors["weight"], bias=tensors["bias"],
        running_mean=tensors["running_mean"].clone(), running_var=tensors["running_var"].clone(),
        training=training, act="relu",
    )  # fmt: skip
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _check(case: Case, tensors: dict[str, Any], results: dict[str, list[Tensor]]) -> dict[str, bool]:
    """Each phase against float64, allowing twice eager's own error; sign ties are left out of gradients."""
    exact, eager = _eager(case, tensors, torch.float64), _eager(case, tensors, DTYPE)
    decided = ~exact.pop("ties")[0]
    right = {}
    for phase, expected in exact.items():
        right[phase] = True
        for actual, peer, reference in zip(results[phase], eager[phase], expected, strict=True):
            keep = (
                decided if phase == "backward" and actual.dim() == 4 else torch.ones_like(reference, dtype=torch.bool)
            )
            limits = [allowed(e, DTYPE) for e in errors(peer[keep], reference[keep])]
            found = errors(actual[keep], reference[keep])
            right[phase] &= all(f <= limit for f, limit in zip(found, limits, strict=True))
    return right


def _eager(case: Case, tensors: dict[str, Any], dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """The same computation in plain PyTorch; ``ties`` marks elements too near to zero to decide their sign."""
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    copies = {name: _copy(tensors[name], dtype) for name in ("x", "residual")}
    copies |= {name: _copy(tensors[name], vectors) for name in ("weight", "bias", "running_mean", "running_var")}
    x, residual, weight, bias, mean, var = copies.values()
    assert x is not None
    total, added = x, residual
    if case.workload == "add_batch_norm_act":
        assert residual is not None
        total, added = x + residual, None
    outputs = {}
    for phase in ("forward", "eval"):
        z = F.batch_norm(total, _detached(mean), _detached(var), weight, bias, phase == "forward")
        out = torch.relu(z if added is None else z + added)
        outputs[phase] = [out] if total is x else [total, out]
    cotangents = [cotangent.to(dtype) for cotangent in tensors["cotangents"]]
    gradients = torch.autograd.grad(outputs["forward"], _leaves(copies), cotangents)
    return {**outputs, "backward": list(gradients), "ties": [_ties(total, added, weight, bias)]}


def _ties(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Where |z| is within 8 eps of the magnitudes it is the sum of."""
    assert weight is not None
    assert bias is not None
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    scale = weight.view(1, -1, 1, 1) * torch.rsqrt(var + 1e-5)
    shift = bias.view(1, -1, 1, 1) - mean * scale
    z, size = x * scale + shift, (x * scale).abs() + shift.abs()
    if residual is not None:
        z, size = z + residual, size + residual.abs()
    return z.abs() <= 8 * torch.finfo(DTYPE).eps * size


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _copy(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(dtype).requires_grad_()


def _row(case: Case, phase: str, meter: TrafficMeter, right: bool) -> Row:
    figures = {
        "launches": float(len(meter.launches)),
        "passes": round(meter.passes, 4),
        "distinct_passes": round(meter.distinct_passes, 4),
        "aten_passes": round(meter.aten_passes, 4),
        "budget_passes": case.budget(phase),
        "vector_share": round(meter.vector_bytes / (meter.passes * meter.nbytes), 5) if meter.passes else None,
        "stray_bytes": float(meter.stray_bytes),
    }
    return Row(
        "traffic", case.workload, phase, "fusedres", list(case.shape), str(DTYPE).removeprefix("torch."), case.layout,
        "ok" if right else "WRONG", figures, note=", ".join(launch.kernel for launch in meter.launches),
        environment=describe(torch.device("cpu")),
    )  # fmt: skip


def main(cases: list[Case]) -> None:
    torch.set_num_threads(1)
    for case in cases:
        for phase, meter, right in measure(case):
            print(json.dumps(vars(_row(case, phase, meter, right))), flush=True)


if __name__ == "__main__":
    main([Case(workload, tuple(shape), layout) for workload, shape, layout in json.loads(sys.argv[1])])
