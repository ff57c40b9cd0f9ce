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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.environment import ROOT, describe
from benchmarks.errors import BenchmarkError, allowed, errors
from benchmarks.instruments.meter import TrafficMeter
from benchmarks.results import Row
from benchmarks.suites import traffic_batch_norm, traffic_linear

Tensors = dict[str, Tensor]


class Case(Protocol):
    """A fused function at one shape: its inputs, the same in eager PyTorch, and what it may move."""

    @property
    def workload(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def layout(self) -> str: ...

    def inputs(self) -> Tensors:
        """Those with ``requires_grad`` are differentiated."""
        ...

    def cotangents(self, tensors: Tensors) -> list[Tensor]:
        """Of float64 inputs; zero where rounding decides on the sign of the ReLU's input."""
        ...

    def fused(self, tensors: Tensors, training: bool) -> tuple[Tensor, ...]: ...

    def eager(self, tensors: Tensors, training: bool) -> tuple[Tensor, ...]: ...

    def meter(self, tensors: Tensors) -> TrafficMeter: ...

    def figures(self, phase: str, meter: TrafficMeter) -> dict[str, float | None]:
        """Beside the launches and the stray bytes: what was moved, and the budget."""
        ...


DTYPE = torch.bfloat16
CASES: list[Case] = [*traffic_batch_norm.CASES, *traffic_linear.CASES]
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
            pool.submit(_work, list(range(worker, len(CASES), workers)), rows)
        running = workers
        while running:
            row = rows.get()
            if isinstance(row, BenchmarkError):
                raise row
            if row is None:
                running -= 1
            else:
                yield row


def _work(cases: list[int], rows: queue.Queue[Row | BenchmarkError | None]) -> None:
    """Run ``cases``, by number, in one subprocess; its rows, or an error, and a final ``None`` go to the queue."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FUSEDRES_BACKEND": "triton", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.suites.traffic", json.dumps(cases)]
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
    torch.manual_seed(0)
    tensors = case.inputs()
    exact = _copies(tensors, torch.float64)
    cotangents = [cotangent.to(DTYPE) for cotangent in case.cotangents(exact)]
    meters = {phase: case.meter(tensors) for phase in PHASES}
    with meters["forward"]:
        outputs = case.fused(tensors, True)
    with meters["backward"]:
        gradients = torch.autograd.grad(outputs, _leaves(tensors), cotangents)
    with torch.no_grad(), meters["eval"]:
        evaluated = case.fused(tensors, False)
    results = {"forward": outputs, "backward": gradients, "eval": evaluated}
    reference, peer = (_eager(case, copies, cotangents) for copies in (exact, _copies(tensors)))
    for phase, meter in meters.items():
        yield phase, meter, _right(results[phase], peer[phase], reference[phase])


def _copies(tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    return {
        name: tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }


def _leaves(tensors: Tensors) -> list[Tensor]:
    return [tensor for tensor in tensors.values() if tensor.requires_grad]


def _eager(case: Case, tensors: Tensors, cotangents: Sequence[Tensor]) -> dict[str, tuple[Tensor, ...]]:
    outputs = case.eager(tensors, True)
    cotangents = [c.to(out.dtype) for c, out in zip(cotangents, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, _leaves(tensors), cotangents)
    return {"forward": outputs, "backward": gradients, "eval": case.eager(tensors, False)}


def _right(actual: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]) -> bool:
    """Whether each tensor is as near to float64 as twice eager's error allows."""
    return all(
        found <= allowed(error, DTYPE)
        for tensor, peer, reference in zip(actual, eager, exact, strict=True)
        for found, error in zip(errors(tensor, reference), errors(peer, reference), strict=True)
    )


def position(row: Row) -> int:
    """The place of a row's case in ``CASES``."""
    cases = [(case.workload, list(case.shape), case.layout) for case in CASES]
    return cases.index((row.workload, row.shape, row.layout))


def _row(case: Case, phase: str, meter: TrafficMeter, right: bool) -> Row:
    figures = {
        "launches": float(len(meter.launches)),
        **case.figures(phase, meter),
        "stray_bytes": float(meter.stray_bytes),
    }
    return Row(
        "traffic", case.workload, phase, "fusedres", list(case.shape), str(DTYPE).removeprefix("torch."), case.layout,
        "ok" if right else "WRONG", figures, note=", ".join(launch.kernel for launch in meter.launches),
        environment=describe(torch.device("cpu")),
    )  # fmt: skip


def main(cases: list[int]) -> None:
    torch.set_num_threads(1)
    for case in (CASES[number] for number in cases):
        for phase, meter, right in measure(case):
            print(json.dumps(vars(_row(case, phase, meter, right))), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
