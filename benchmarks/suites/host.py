"""What a BatchNorm layer costs the host, ours and eager's, where tensors are so small that Python decides.

On a CPU, with Triton compiling for an H100 and its launch left out, see ``instruments.host``: not GPU timings. Eager's
figure is that of PyTorch's CPU operators at the same sizes, arithmetic included; on a GPU it is another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from rich.table import Table
from torch import Tensor, nn

from benchmarks.environment import describe
from benchmarks.errors import BenchmarkError
from benchmarks.layers import BatchNormAddRelu, BatchNormRelu
from benchmarks.reporting.markdown import size
from benchmarks.results import Key, Row
from benchmarks.suite import CPU, Request, Suite
from benchmarks.workers import COMPILED, spread
from fusedres.functional import batch_norm_act
from fusedres.nn import BatchNormAct2d

NAME = "host"
MODES = ("forward", "backward", "inference")
PROVIDERS = ("eager", "fusedres", "fusedres.functional")
# (N, C, H, W): one launch each way, and two; eager has next to no arithmetic there.
LAYERS = {"bn+relu": BatchNormRelu, "bn+add+relu": BatchNormAddRelu}
SHAPES = ((2, 64, 7, 7), (1, 8, 24, 24))
PARTS = ("validation_us", "dispatch_us", "operator_us", "launcher_us", "triton_us")


@dataclass(frozen=True)
class Case:
    """A layer at one size: all modes and providers from one process."""

    workload: str
    shape: tuple[int, ...]

    @property
    def keys(self) -> list[Key]:
        return [self.row(mode, provider).key for mode in MODES for provider in PROVIDERS]

    def row(self, mode: str, provider: str) -> Row:
        return Row(NAME, self.workload, mode, provider, list(self.shape), "float32", "channels-last")


def plan(request: Request) -> list[Case]:
    """All layers at all sizes; there is nothing to choose but workloads.

    Raises:
        BenchmarkError: a provider, a dtype or a batch.
    """
    if request.providers or request.dtypes or request.batches:
        raise BenchmarkError("host has sizes, a dtype and providers of its own; leave out those options")
    return [Case(workload, shape) for shape in SHAPES for workload in LAYERS]


def run(request: Request, cases: Sequence[Case]) -> Iterator[Row]:
    return spread(NAME, measure, cases, COMPILED, request.seconds)


def measure(case: Case) -> list[Row]:
    """The rows of a case, in this process, where kernels must not be interpreted."""
    from benchmarks.instruments.host import microseconds, parts, step, stub_gpu

    torch.set_num_threads(1)
    inputs = tuple(_activation(case.shape).requires_grad_() for _ in range(2 if "add" in case.workload else 1))
    rows = []
    with stub_gpu():
        for mode in MODES:
            training = mode != "inference"
            plain = LAYERS[case.workload](case.shape[1]).train(training)
            norm = BatchNormAct2d(case.shape[1]).train(training)
            with torch.set_grad_enabled(training):
                call = step(mode, plain, plain.bn, inputs)
                found = {
                    "eager": {"host_us": microseconds({"eager": (nullcontext(), call)})["eager"]},
                    "fusedres": parts(mode, norm, norm, inputs),
                    "fusedres.functional": parts(mode, partial(_function, norm), norm, inputs),
                }
            rows += [_row(case, mode, provider, figures) for provider, figures in found.items()]
    return rows


def _activation(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def _function(norm: nn.BatchNorm2d, input: Tensor, residual: Tensor | None = None) -> Tensor:
    return batch_norm_act(
        input, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, residual=residual,
        act="relu", num_batches_tracked=norm.num_batches_tracked if norm.training else None,
    )  # fmt: skip


def _row(case: Case, mode: str, provider: str, figures: dict[str, float]) -> Row:
    row = case.row(mode, provider)
    row.figures.update({name: round(value, 2) for name, value in figures.items()})
    row.environment = describe(CPU)
    return row


def table(rows: Sequence[Row]) -> Table:
    """A line a layer, mode and provider."""
    title = "µs of the host a call; on a CPU, up to the driver's launch. Not GPU timings"
    shown = Table(
        "layer", "mode", "shape", "provider", "µs", *(name.removesuffix("_us") for name in PARTS), title=title
    )
    for row in rows:
        figures = (row.figures.get(name) for name in ("host_us", *PARTS))
        cells = ("" if value is None else f"{value:.1f}" for value in figures)
        shown.add_row(row.workload, row.mode, size(row.shape), row.provider, *cells)
    return shown


SUITE = Suite(
    NAME, "microseconds that a call of a small layer takes the host, in parts; without a GPU", plan, run, table,
    on_cpu=True,
)  # fmt: skip
