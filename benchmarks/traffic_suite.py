"""Traffic of ``batch_norm_act`` against the byte budget, counted in Triton's interpreter.

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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.environment import ROOT, describe
from benchmarks.errors import BenchmarkError, allowed, errors
from benchmarks.results import Row
from benchmarks.traffic import TrafficMeter

DTYPE = torch.bfloat16
SHAPES = ((8, 64, 56, 56), (4, 256, 14, 14), (4, 67, 14, 14))
LAYOUTS = ("channels-last", "NCHW")
# Passes over one activation, without and with a residual; one bit an element is 1/16 pass in 16 bits.
BUDGET = {
    ("forward", False): 3.0, ("forward", True): 4 + 1 / 16,
    ("backward", False): 5.0, ("backward", True): 6 + 1 / 16,
    ("eval", False): 2.0, ("eval", True): 3.0,
}  # fmt: skip
Case = tuple[tuple[int, ...], str, bool]
# In this order two workers that take every other case have about the same work.
CASES: list[Case] = [
    (shape, LAYOUTS[column if residual else 1 - column], residual)
    for shape in SHAPES
    for residual in (True, False)
    for column in range(len(LAYOUTS))
]
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


def measure(shape: tuple[int, ...], layout: str, residual: bool) -> Iterator[tuple[str, TrafficMeter, bool]]:
    """Yields the phase, its traffic and whether its results were right."""
    tensors = _inputs(shape, layout, residual)
    x, r, cotangent = tensors["x"], tensors["residual"], tensors["cotangent"]
    meters = {phase: TrafficMeter(x) for phase in PHASES}
    with meters["forward"]:
        y = _batch_norm_act(tensors, training=True)
    with meters["backward"]:
        y.backward(cotangent)
    with torch.no_grad(), meters["eval"]:
        y_eval = _batch_norm_act(tensors, training=False)
    results = {"forward": [y], "eval": [y_eval], "backward": [_grad(t) for t in (x, r) if t is not None]}
    results["backward"] += [_grad(tensors["weight"]), _grad(tensors["bias"])]
    right = _check(tensors, results)
    for phase, meter in meters.items():
        yield phase, meter, right[phase]


def _inputs(shape: tuple[int, ...], layout: str, residual: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    memory_format = torch.channels_last if layout == "channels-last" else torch.contiguous_format

    def activation() -> Tensor:
        return torch.randn(shape).to(DTYPE).to(memory_format=memory_format)

    channels = shape[1]
    return {
        "x": activation().requires_grad_(),
        "residual": activation().requires_grad_() if residual else None,
        "cotangent": activation(),
        "weight": (torch.rand(channels) + 0.5).requires_grad_(),
        "bias": torch.randn(channels).requires_grad_(),
        "running_mean": torch.zeros(channels),
        "running_var": torch.ones(channels),
    }


def _batch_norm_act(tensors: dict[str, Any], *, training: bool) -> Tensor:
    from fusedres.functional import batch_norm_act

    return batch_norm_act(
        tensors["x"], tensors["running_mean"].clone(), tensors["running_var"].clone(), tensors["weight"],
        tensors["bias"], training, residual=tensors["residual"], act="relu",
    )  # fmt: skip


def _check(tensors: dict[str, Any], results: dict[str, list[Tensor]]) -> dict[str, bool]:
    """Each phase against float64, allowing twice eager's own error; sign ties are left out of gradients."""
    exact, eager = _eager(tensors, torch.float64), _eager(tensors, DTYPE)
    decided = ~exact.pop("ties")[0]
    eager.pop("ties")
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


def _eager(tensors: dict[str, Any], dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """The same computation in plain PyTorch; ``ties`` marks elements too near to zero to decide their sign."""
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    activations = {k: _copy(tensors[k], dtype) for k in ("x", "residual")}
    weight, bias, mean, var = (_copy(tensors[k], vectors) for k in ("weight", "bias", "running_mean", "running_var"))
    x, residual = activations["x"], activations["residual"]
    assert x is not None
    outputs = {}
    for phase in ("forward", "eval"):
        z = F.batch_norm(x, _detached(mean), _detached(var), weight, bias, phase == "forward")
        outputs[phase] = torch.relu(z if residual is None else z + residual)
    leaves = [t for t in (x, residual, weight, bias) if t is not None]
    gradients = torch.autograd.grad(outputs["forward"], leaves, tensors["cotangent"].to(dtype))
    return {
        "forward": [outputs["forward"]],
        "eval": [outputs["eval"]],
        "backward": list(gradients),
        "ties": [_ties(x, residual, weight, bias)],
    }


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


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _row(shape: tuple[int, ...], layout: str, residual: bool, phase: str, meter: TrafficMeter, right: bool) -> Row:
    budget = BUDGET[phase, residual]
    figures = {
        "launches": float(len(meter.launches)),
        "passes": round(meter.passes, 4),
        "distinct_passes": round(meter.distinct_passes, 4),
        "aten_passes": round(meter.aten_passes, 4),
        "budget_passes": budget,
        "vector_share": round(meter.vector_bytes / (meter.passes * meter.nbytes), 5) if meter.passes else None,
        "stray_bytes": float(meter.stray_bytes),
    }
    return Row(
        "traffic", "batch_norm_act + residual" if residual else "batch_norm_act", phase, "fusedres",
        list(shape), str(DTYPE).removeprefix("torch."), layout, "ok" if right else "WRONG", figures,
        note=", ".join(launch.kernel for launch in meter.launches), environment=describe(torch.device("cpu")),
    )  # fmt: skip


def main(cases: list[Case]) -> None:
    torch.set_num_threads(1)
    for shape, layout, residual in cases:
        for phase, meter, right in measure(tuple(shape), layout, residual):
            row = _row(tuple(shape), layout, residual, phase, meter, right)
            print(json.dumps(vars(row)), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
