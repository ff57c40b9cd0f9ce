"""Elementwise traffic of a whole training step, counted: eager PyTorch, Inductor's schedule, and the fused variants.

What is read and written beside the convolutions and the classifier: normalisation, ReLU, residual additions, pooling,
autograd's additions of gradients, casts and copies. Nothing is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import nn

import fusedres
from benchmarks.environment import describe
from benchmarks.errors import BenchmarkError
from benchmarks.instruments.compiled import scheduled
from benchmarks.instruments.interpreter import fast_interpreter
from benchmarks.instruments.network import KINDS, NetworkMeter, figures, in_mib, is_activation
from benchmarks.parity import first_line
from benchmarks.providers import BASELINE, PROVIDERS, Provider, instantiate
from benchmarks.results import Key, Row
from benchmarks.suite import CPU, Request, Suite
from benchmarks.suites.subject import SUBJECTS, Subject, check
from benchmarks.workers import INTERPRETED, spread

COMPILED, FUSED = "torch.compile", "fusedres"
PER_LAYER, WHOLE = "per layer", "whole network"
# Of the fused step, by name: keyword arguments of fusedres.fuse.
VARIANTS: dict[str, dict[str, Any]] = {PER_LAYER: {}}
QUICK = (PER_LAYER, WHOLE)
BUDGET = {"eager_share": 0.62, "per_layer_share": 0.85}  # of WHOLE
VECTORS = 0.25  # of what kernels move, at most: more would be activations that were not seen as such
WORKLOADS = ("resnet50",)
BATCH, DTYPE, DTYPE_NAME = 8, torch.bfloat16, "bfloat16"
CHECKED = (2, 3, 64, 64)  # of the miniature, in float32
# Weight of each block's last BatchNorm: at 1, gradients in 16 bits are off by more than their own size, in eager too.
LAST = 0.1
NOTE = (
    "Inductor's schedule for a CPU, neither built nor run: each tensor once a kernel, the least it can move; kernels"
    " for a GPU are scheduled by other rules and may be fused otherwise"
)


@dataclass(frozen=True)
class Part:
    """The step by one provider, in a process of its own."""

    workload: str
    provider: str
    shape: tuple[int, ...]

    @property
    def keys(self) -> list[Key]:
        return [(self.workload, "training", self.provider, self.shape, DTYPE_NAME, "channels-last")]

    @property
    def subject(self) -> Subject:
        return SUBJECTS[self.workload]


@dataclass(frozen=True)
class Case:
    """The step by every provider: their shares are of one run."""

    workload: str
    providers: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def parts(self) -> list[Part]:
        return [Part(self.workload, provider, self.shape) for provider in self.providers]

    @property
    def keys(self) -> list[Key]:
        return [key for part in self.parts for key in part.keys]


def fused(variant: str) -> str:
    """The provider of a key of ``VARIANTS``."""
    return f"{FUSED}, {variant}"


def plan(request: Request) -> list[Case]:
    """Quick: without the ablations.

    Raises:
        BenchmarkError: a batch of one image, whose activations look like vectors.
    """
    if DTYPE_NAME not in (request.dtypes or [DTYPE_NAME]):
        return []
    if min(batches := request.batches or (BATCH,)) < 2:
        raise BenchmarkError("network counts a step of at least 2 images")
    wanted = request.providers or (BASELINE, COMPILED, FUSED)
    variants = [fused(name) for name in VARIANTS if FUSED in wanted and (name in QUICK or not request.quick)]
    providers = (BASELINE, *((COMPILED,) if COMPILED in wanted else ()), *variants)  # the baseline in any case
    return [Case(name, providers, SUBJECTS[name].shape(batch, CPU)) for name in WORKLOADS for batch in batches]


def run(request: Request, cases: Sequence[Case]) -> Iterator[Row]:
    for case in cases:
        rows = list(spread("network", work, case.parts, INTERPRETED, request.seconds))
        yield from compared(rows)


def work(part: Part) -> list[Row]:
    """The row of a part, but for its shares, in a process that interprets kernels."""
    torch.set_num_threads(1)
    try:
        with fast_interpreter():
            answer = schedule(part) if part.provider == COMPILED else measure(part)
    except Exception as error:  # a variant that cannot run is a result
        answer = dict[str, Any](status="failed", note=first_line(error))
    shape = list(part.shape)
    row = Row("network", part.workload, "training", part.provider, shape, DTYPE_NAME, "channels-last", **answer)
    row.environment = describe(CPU)
    return [row]


def measure(part: Part) -> dict[str, Any]:
    """Figures and check of a step that runs: the step that is counted is the one that is compared with float64."""
    model, provider = _model(part), _provider(part.provider)
    meters: dict[str, NetworkMeter] = {}

    def around(phase: str) -> NetworkMeter:
        meters[phase] = NetworkMeter(torch.empty(part.shape))  # an input that is no good is forgotten
        return meters[phase]

    verdict = check(part.subject, instantiate(provider, model, CPU), model, part.shape, DTYPE, around)
    small = network(part.subject.miniature)
    verdict["miniature"] = check(part.subject, instantiate(provider, small, CPU), small, CHECKED, torch.float32)
    verdict["complaints"] = complaints(meters)
    verdict["ok"] &= verdict["miniature"]["ok"] and not verdict["complaints"]
    for phase, meter in meters.items():
        verdict[f"{phase} kernels"], verdict[f"{phase} operators"] = meter.kernels, meter.operators
    return {"status": "ok" if verdict["ok"] else "WRONG", "figures": figures(meters), "check": verdict}


def _model(part: Part) -> nn.Module:
    """The network of a part.

    Raises:
        BenchmarkError: a weight looks like an activation at this batch size.
    """
    model = network(part.subject.build)
    if any(is_activation(weight.shape, part.shape[0]) for weight in model.parameters()):
        raise BenchmarkError(f"a weight begins with {part.shape[0]}, the number of images")
    return model


def network(build: Callable[[], nn.Module]) -> nn.Module:
    """A network whose blocks begin near the identity."""
    torch.manual_seed(0)
    model = build()
    for block in model.modules():
        if isinstance(block, (fusedres.models.BasicBlock, fusedres.models.Bottleneck)):
            nn.init.constant_([m for m in block.children() if isinstance(m, nn.BatchNorm2d)][-1].weight, LAST)
    return model


def _provider(name: str) -> Provider:
    if name in PROVIDERS:
        return PROVIDERS[name]
    [options] = [options for variant, options in VARIANTS.items() if fused(variant) == name]
    return Provider(name, True, partial(fusedres.fuse, **options))


def complaints(meters: dict[str, NetworkMeter]) -> list[str]:
    """What is wrong with a count."""
    found = []
    for phase, meter in meters.items():
        if meter.stray_bytes:
            found.append(f"{phase}: {meter.stray_bytes} bytes outside of every argument")
        if meter.vector_bytes > VECTORS * (meter.issued_bytes or 1):
            found.append(f"{phase}: {meter.vector_bytes} bytes of vectors and partial sums")
    return found


def schedule(part: Part) -> dict[str, Any]:
    """Figures of what Inductor makes of the step."""
    model = _model(part).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    images = part.subject.input(part.shape, CPU).to(memory_format=torch.channels_last)
    compiled = torch.compile(model, dynamic=False)

    def step() -> None:
        with torch.autocast("cpu", DTYPE):
            loss = F.cross_entropy(compiled(images), part.subject.labels(len(images), CPU))
        loss.backward()

    graphs = scheduled(step, lambda shape: is_activation(shape, part.shape[0]))
    forward, backward = (sum(g.bytes for g in graphs if g.backward == which) for which in (False, True))
    found = in_mib({"moved": forward + backward, "forward": forward, "backward": backward})
    return {"figures": found | {"launches": float(sum(graph.kernels for graph in graphs))}, "note": NOTE}


def compared(rows: Sequence[Row]) -> list[Row]:
    """``rows`` with their shares of eager's bytes and of those of the fused layers; over its budget, one is wrong."""
    moved = {row.provider: row.figures.get("moved_mib") for row in rows}
    for row in rows:
        for name, whole in (("eager_share", moved.get(BASELINE)), ("per_layer_share", moved.get(fused(PER_LAYER)))):
            own = moved[row.provider]
            row.figures[name] = round(own / whole, 4) if own and whole else None
        if row.provider == fused(WHOLE):
            over = [f"{name} {row.figures[name]}, more than {most}" for name, most in BUDGET.items()
                    if (row.figures[name] or 0) > most]  # fmt: skip
            if over and row.status == "ok":
                row.status, row.check["ok"] = "WRONG", False
                row.check["complaints"] = [*row.check["complaints"], *over]
    return list(rows)


COLUMNS = {
    "moved_mib": "moved", "eager_share": "of eager", "per_layer_share": "of layers", "forward_mib": "forward",
    "backward_mib": "backward", **{f"{kind}_mib": kind[:6] for kind in KINDS}, "launches": "launches",
    "operators": "ATen",
}  # fmt: skip


def table(rows: Sequence[Row]) -> Table:
    """A line a provider; those of the fused variants are the ablation."""
    shown = Table(title="elementwise traffic of a whole training step, MiB, counted; nothing is timed")
    for name in ("network", "step"):
        shown.add_column(name, no_wrap=True)
    for name in (*COLUMNS.values(), "status"):
        shown.add_column(name, justify="right")
    for row in rows:
        figures = [row.figures.get(name) for name in COLUMNS]
        cells = ["" if figure is None else f"{figure:,.4g}" for figure in figures]
        shown.add_row(row.workload, row.provider, *cells, row.status)
    return shown


SUITE = Suite(
    "network", "elementwise bytes of a whole training step: eager, Inductor's schedule, fused", plan, run, table,
    on_cpu=True,
)  # fmt: skip
