"""Traffic of the fused functions against their byte budgets, counted in Triton's interpreter.

Cases run in processes of their own, because triton decides at import whether it interprets. Times are predictions
from the bytes and the facts in ``devices``; nothing is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.devices import DEVICES, PREDICTED
from benchmarks.environment import describe
from benchmarks.errors import allowed, errors
from benchmarks.instruments.meter import SECTOR, TrafficMeter
from benchmarks.results import Key, Row
from benchmarks.suite import CPU, Request, Suite
from benchmarks.suites import (
    traffic_batch_norm,
    traffic_batch_norm_head,
    traffic_batch_norm_pool,
    traffic_convolution,
    traffic_join,
    traffic_linear,
)
from benchmarks.workers import INTERPRETED, spread

Tensors = dict[str, Tensor]
Function = Callable[[Tensors, bool], tuple[Tensor, ...]]


class Subject(Protocol):
    """A fused function at one shape: its inputs, the same in eager PyTorch, and what it may move."""

    @property
    def workload(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def layout(self) -> str: ...

    @property
    def rows(self) -> int:
        """Over which vectors are spread."""
        ...

    @property
    def extents(self) -> tuple[int, ...]:
        """Lengths of contiguous rows."""
        ...

    def inputs(self) -> Tensors:
        """Those with ``requires_grad`` are differentiated."""
        ...

    def cotangents(self, tensors: Tensors) -> list[Tensor]:
        """Of float64 inputs; zero where rounding decides on the sign of the ReLU's input."""
        ...

    def fused(self, tensors: Tensors, training: bool) -> tuple[Tensor, ...]: ...

    def eager(self, tensors: Tensors, training: bool) -> tuple[Tensor, ...]: ...

    def meter(self, tensors: Tensors) -> TrafficMeter: ...

    def figures(self, phase: str, meter: TrafficMeter, eager: TrafficMeter) -> dict[str, float | None]:
        """What was moved, the budget, and what others move."""
        ...

    def complaints(self, phase: str, meter: TrafficMeter) -> list[str]:
        """What is over budget."""
        ...


class Counted(NamedTuple):
    """Of one phase: the traffic of the fused function and of eager PyTorch, and whether the results were right."""

    phase: str
    meter: TrafficMeter
    eager: TrafficMeter
    right: bool


@dataclass(frozen=True)
class Case:
    """All phases of a subject."""

    subject: Subject

    @property
    def workload(self) -> str:
        return self.subject.workload

    @property
    def keys(self) -> list[Key]:
        subject = self.subject
        return [(subject.workload, phase, PROVIDER, subject.shape, DTYPE_NAME, subject.layout) for phase in PHASES]


DTYPE, DTYPE_NAME, PROVIDER = torch.bfloat16, "bfloat16", "fusedres"
SUBJECTS: list[Subject] = [
    *traffic_batch_norm.CASES,
    *traffic_batch_norm_head.CASES,
    *traffic_batch_norm_pool.CASES,
    *traffic_join.CASES,
    *traffic_convolution.CASES,
    *traffic_linear.CASES,
]
PHASES = ("forward", "backward", "eval")
VECTORS, MANY_ROWS = 0.05, 10_000  # the share of vectors and partial sums, where there are so many rows
LONG = {(8, 64, 56, 56), (10240, 128, 64), (208, 16, 7, 7)}  # to interpret: as long as all others together
# Of the bytes in the sectors touched, at least: where rows are whole sectors, or not. Less is uncoalesced.
USEFUL = {True: 0.95, False: 0.55}


def plan(request: Request) -> list[Case]:
    """Quick: without NCHW, where as many bytes are moved, and without ``LONG``."""
    if PROVIDER not in (request.providers or [PROVIDER]) or DTYPE_NAME not in (request.dtypes or [DTYPE_NAME]):
        return []
    return [
        Case(subject)
        for subject in SUBJECTS
        if subject.shape[0] in (request.batches or subject.shape)
        and not (request.quick and (subject.layout == "NCHW" or subject.shape in LONG))
    ]


def run(request: Request, cases: Sequence[Case]) -> Iterator[Row]:
    return spread("traffic", work, cases, INTERPRETED, request.seconds)


def work(case: Case) -> list[Row]:
    """The rows of a case, in a process that interprets kernels."""
    return [_row(case.subject, counted) for counted in measure(case.subject)]


def measure(subject: Subject) -> Iterator[Counted]:
    """Run all phases, fused and eager, under meters, and compare with float64."""
    torch.manual_seed(0)
    tensors = subject.inputs()
    exact, peer = _copies(tensors, torch.float64), _copies(tensors)
    cotangents = [cotangent.to(DTYPE) for cotangent in subject.cotangents(exact)]
    meters, eager = ({phase: subject.meter(tensors) for phase in PHASES} for _ in range(2))
    results = _phases(subject.fused, tensors, cotangents, meters)
    peers = _phases(subject.eager, peer, cotangents, eager)
    reference = _phases(subject.eager, exact, cotangents, dict.fromkeys(PHASES, nullcontext()))
    for phase in PHASES:
        right = _right(results[phase], peers[phase], reference[phase])
        yield Counted(phase, meters[phase], eager[phase], right)


def _phases(
    function: Function,
    tensors: Tensors,
    cotangents: Sequence[Tensor],
    meters: Mapping[str, AbstractContextManager[object]],
) -> dict[str, tuple[Tensor, ...]]:
    with meters["forward"]:
        outputs = function(tensors, True)
    cotangents = [c.to(out.dtype) for c, out in zip(cotangents, outputs, strict=True)]
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
    with meters["backward"]:
        gradients = torch.autograd.grad(outputs, leaves, cotangents)
    with torch.no_grad(), meters["eval"]:
        evaluated = function(tensors, False)
    return {"forward": outputs, "backward": gradients, "eval": evaluated}


def _copies(tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    return {
        name: tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }


def _right(actual: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]) -> bool:
    """Whether each tensor is as near to float64 as twice eager's error allows."""
    return all(
        found <= allowed(error, DTYPE)
        for tensor, peer, reference in zip(actual, eager, exact, strict=True)
        for found, error in zip(errors(tensor, reference), errors(peer, reference), strict=True)
    )


def complaints(subject: Subject, counted: Counted) -> list[str]:
    """What is wrong with a phase, in its results or its traffic; empty where nothing is."""
    meter = counted.meter
    found = [] if counted.right else ["wrong results"]
    found += subject.complaints(counted.phase, meter)
    if meter.stray_bytes:
        found.append(f"{meter.stray_bytes} bytes outside of every argument")
    if subject.rows >= MANY_ROWS and meter.vector_bytes > VECTORS * (meter.distinct_bytes + meter.aten_bytes):
        found.append(f"{meter.vector_bytes} bytes of vectors and partial sums")
    whole = all(extent * DTYPE.itemsize % SECTOR == 0 for extent in subject.extents)
    stride = getattr(subject, "stride", 1)  # between the elements of one access, where a case has such
    if meter.issued_bytes < USEFUL[whole] / stride * meter.sector_bytes:
        found.append(f"{meter.issued_bytes} useful bytes in sectors of {meter.sector_bytes}")
    return found


def _row(subject: Subject, counted: Counted) -> Row:
    meter, wrong = counted.meter, complaints(subject, counted)
    launches = [
        {
            "kernel": launch.kernel,
            "tensors": {t.name: [t.issued, t.distinct, t.sectors] for t in launch.tensors if t.issued},
        }
        for launch in meter.launches
    ]
    check: dict[str, Any] = {"ok": not wrong, "complaints": wrong, "launches": launches}
    return Row(
        "traffic", subject.workload, counted.phase, PROVIDER, list(subject.shape), DTYPE_NAME, subject.layout,
        "WRONG" if wrong else "ok", _figures(subject, counted), check,
        ", ".join(launch.kernel for launch in meter.launches), describe(CPU),
    )  # fmt: skip


def _figures(subject: Subject, counted: Counted) -> dict[str, float | None]:
    meter = counted.meter
    moved, calls = meter.distinct_bytes + meter.aten_bytes + meter.vector_bytes, len(meter.launches) + len(meter.aten)
    return {
        "launches": float(len(meter.launches)),
        **subject.figures(counted.phase, meter, counted.eager),
        "issued_bytes": float(meter.issued_bytes),
        "sector_bytes": float(meter.sector_bytes),
        "sector_efficiency": round(meter.issued_bytes / meter.sector_bytes, 4),
        "stray_bytes": float(meter.stray_bytes),
        "eager_bytes": float(counted.eager.aten_bytes),
        **{name: round(DEVICES[device].predicted_us(moved, calls), 2) for name, device in PREDICTED.items()},
    }


def table(rows: Sequence[Row]) -> Table:
    """A line a case and phase; times are predictions."""
    shown = Table(title="bytes moved, counted in the interpreter; times are predictions from them, not measured")
    for column in ("function", "shape", "layout", "phase"):
        shown.add_column(column)
    for column in ("launches", "moved", "budget", "eager", "sectors used", "H100 (us)", "status"):
        shown.add_column(column, justify="right")
    for row in rows:
        of = row.workload, "x".join(map(str, row.shape)), row.layout, row.mode
        if not row.figures:
            shown.add_row(*of, *[""] * 6, row.status)
            continue
        figures = {name: value or 0.0 for name, value in row.figures.items()}
        if "passes" in figures:
            moved = figures["passes"] + figures["aten_passes"], figures["budget_passes"], figures["eager_passes"]
            cells = [f"{value:.4g}" for value in moved]
        else:
            total = figures["distinct_bytes"] + figures["aten_bytes"]
            moved = total, figures["budget_bytes"] + figures["aten_budget_bytes"], figures["eager_bytes"]
            cells = [f"{value / 1024:.0f} KiB" for value in moved]
        shown.add_row(
            *of, f"{figures['launches']:.0f}", *cells,
            f"{figures['sector_efficiency']:.0%}", f"{figures['us_h100']:.1f}", row.status,
        )  # fmt: skip
    return shown


SUITE = Suite(
    "traffic", "bytes that the fused functions move, counted in the interpreter, against their budgets",
    plan, run, table, on_cpu=True,
)  # fmt: skip
