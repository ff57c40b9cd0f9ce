"""Whether the package should own 1x1 convolutions: those of ResNet-50, by cuDNN and by a Triton GEMM.

Each convolution is measured alone, with the statistics of its output that the next BatchNorm needs, with BatchNorm and
ReLU of its input, and with both. cuDNN's route launches the package's own kernels around the convolution; the GEMM does
it all in its epilogue and prologue. Forward only, on a GPU.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from rich.table import Table
from torch import Tensor, nn

from benchmarks import machine, parity
from benchmarks.environment import describe
from benchmarks.errors import BenchmarkError
from benchmarks.results import Key, Row
from benchmarks.suite import Request, Suite
from fusedres import models

NAME = "probe"
CUDNN, TRITON = "cuDNN", "Triton"
MODES = ("plain", "statistics", "prologue", "both")
DTYPES = ("bfloat16", "float16")
BATCHES = (256, 32)


@dataclass(frozen=True)
class Convolution:
    """A 1x1 convolution of a network, and how often it occurs there."""

    inputs: int
    outputs: int
    size: int
    stride: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.inputs}→{self.outputs}" + (f" /{self.stride}" if self.stride > 1 else "")

    @property
    def modes(self) -> tuple[str, ...]:
        """A strided convolution is a shortcut: its input is a block's output, which is there already."""
        return MODES if self.stride == 1 else MODES[:2]


@dataclass(frozen=True)
class Probed:
    """A convolution at one batch size and dtype."""

    of: Convolution
    batch: int
    dtype: str

    @property
    def workload(self) -> str:
        return self.of.name

    @property
    def keys(self) -> list[Key]:
        return [self.row(mode, provider).key for mode in self.of.modes for provider in (CUDNN, TRITON)]

    def row(self, mode: str, provider: str, status: str = "ok", note: str = "") -> Row:
        shape = [self.batch, self.of.inputs, self.of.size, self.of.size]
        return Row(NAME, self.workload, mode, provider, shape, self.dtype, "channels-last", status, note=note)

    def rows(self, status: str, note: str = "") -> Iterator[Row]:
        return (self.row(mode, provider, status, note) for mode in self.of.modes for provider in (CUDNN, TRITON))


@cache
def convolutions() -> tuple[Convolution, ...]:
    """The distinct 1x1 convolutions of ResNet-50 at 224x224, in the order of the network."""
    found: Counter[tuple[int, int, int, int]] = Counter()

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            found[module.in_channels, module.out_channels, inputs[0].shape[-1], module.stride[0]] += 1

    model = models.resnet50().to("meta")
    for module in model.modules():
        module.register_forward_pre_hook(note)
    model(torch.empty(1, 3, 224, 224, device="meta"))
    return tuple(Convolution(*key, count) for key, count in found.items())


def plan(request: Request) -> list[Probed]:
    """bfloat16 before float16, large batches first, shortcuts with a stride last; ``quick`` leaves those two out.

    Raises:
        BenchmarkError: no GPU, a provider, or a dtype that is not measured.
    """
    if request.device.type != "cuda":
        raise BenchmarkError("the probe compares kernels on a GPU; there is none, or --device says otherwise")
    if request.providers:
        raise BenchmarkError("the probe has providers of its own; leave out --provider")
    for dtype in request.dtypes or ():
        if dtype not in DTYPES:
            raise BenchmarkError(f"the probe measures {' and '.join(DTYPES)}, not {dtype!r}")
    dtypes = request.dtypes or (("bfloat16",) if request.quick else DTYPES)
    strides = (1,) if request.quick else (1, 2)
    return [
        Probed(of, batch, dtype)
        for dtype, stride, batch in product(dtypes, strides, request.batches or BATCHES)
        for of in convolutions()
        if of.stride == stride
    ]


def run(request: Request, cases: Sequence[Probed]) -> Iterator[Row]:
    """Measure; what was not begun in time comes out as rows that say so."""
    from benchmarks.instruments.probe_routes import measure  # needs triton

    deadline = time.monotonic() + request.seconds
    environment = describe(request.device) | machine.ceilings(request.device)
    for case in cases:
        if time.monotonic() > deadline:
            yield from case.rows("not measured", "out of time")
            continue
        try:
            with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False):
                rows = measure(case, request.device)
        except torch.OutOfMemoryError:
            rows = list(case.rows("OOM"))
        except Exception as error:  # a shape that cannot run is a result, not the end of the probe
            rows = list(case.rows("failed", parity.first_line(error)))
        torch.cuda.empty_cache()
        for row in rows:
            row.environment = environment | machine.conditions(request.device)
            yield row


def decisions(rows: Sequence[Row]) -> Iterator[tuple[str, list[str]]]:
    """The GEMM's speedup over cuDNN's route by mode: of every shape, and of all convolutions of a network together."""
    cases: dict[tuple[str, int, int, str], dict[tuple[str, str], Row]] = {}
    for row in rows:
        cases.setdefault((row.workload, row.shape[0], row.shape[2], row.dtype), {})[row.mode, row.provider] = row
    for (workload, batch, size, dtype), found in cases.items():
        yield f"{workload} {size}x{size}, {batch}, {dtype}", [_cell(found.get((mode, TRITON))) for mode in MODES]
    for batch, dtype in dict.fromkeys((batch, dtype) for _, batch, _, dtype in cases):
        chosen = [found for (_, b, _, d), found in cases.items() if (b, d) == (batch, dtype)]
        for name, always in (("Triton everywhere", True), ("the faster one of each", False)):
            cells = [_network(chosen, mode, always) for mode in MODES]
            yield f"all {len(chosen)} shapes, {name}, {batch}, {dtype}", cells


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    f = row.figures
    if row.status != "ok" or f.get("speedup") is None:
        return row.status
    return f"{f['speedup']:.2f} ({f['speedup_low']:.2f}-{f['speedup_high']:.2f})"


def _network(cases: Sequence[dict[tuple[str, str], Row]], mode: str, always: bool) -> str:
    """Time by cuDNN over time by Triton, ``always`` or where it is faster; what is wrong is left to cuDNN."""
    before = after = 0.0
    for found in cases:
        theirs, ours = (found.get((mode, provider)) for provider in (CUDNN, TRITON))
        if theirs is None or ours is None or theirs.status != "ok":
            continue
        times = [(row.figures["ms"] or 0) * (row.figures["count"] or 0) for row in (theirs, ours) if row.status == "ok"]
        before += times[0]
        after += times[-1] if always else min(times)
    return f"{before / after:.2f}" if after else ""


def table(rows: Sequence[Row]) -> Table:
    """Speedups of the GEMM over cuDNN's route; below 1 it is slower."""
    shown = Table("1x1 convolution", *MODES, title="Triton GEMM over cuDNN with separate kernels, 95% interval")
    for name, cells in decisions(rows):
        shown.add_row(name, *cells)
    return shown


SUITE = Suite(NAME, "1x1 convolutions of ResNet-50 by cuDNN and by a Triton GEMM; needs a GPU", plan, run, table)
