"""Static code report: what the compiler makes of every kernel, launch configuration and architecture.

Code is generated with what triton's wheel carries, in processes where kernels are not interpreted; no GPU is needed
and nothing is timed. Occupancy and bytes in flight are computed from that code and the facts in ``devices``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from rich.table import Table

from benchmarks.devices import BY_ARCH
from benchmarks.environment import describe
from benchmarks.results import Key, Row
from benchmarks.suite import CPU, Request, Suite
from benchmarks.workers import COMPILED, apart, spread

ARCHS = {True: ("sm_90",), False: tuple(BY_ARCH)}  # quick or not
DTYPES = {True: ("bfloat16",), False: ("bfloat16", "float32", "float16")}


@dataclass(frozen=True)
class Case:
    """One launch on one architecture; ``shape`` are the sizes of its blocks."""

    workload: str
    mode: str
    arch: str
    shape: tuple[int, ...]
    dtype: str
    layout: str

    @property
    def key(self) -> Key:
        return self.workload, self.mode, self.arch, self.shape, self.dtype, self.layout

    @property
    def keys(self) -> tuple[Key]:
        return (self.key,)


def plan(request: Request) -> list[Case]:
    """Every distinct launch of the layers' dtypes, on the architectures that are asked for.

    Raises:
        BenchmarkError: triton is missing.
    """
    dtypes = request.dtypes or DTYPES[request.quick]
    return apart(cases, COMPILED, ARCHS[request.quick], dtypes)


def cases(archs: Sequence[str], dtypes: Sequence[str]) -> list[Case]:
    """Where kernels are not interpreted."""
    from benchmarks.instruments.codegen import TARGETS
    from benchmarks.instruments.launches import named_launches

    return [
        Case(name.kernel, name.label, arch, name.blocks, name.dtype, name.layout)
        for arch in archs
        for name in named_launches(TARGETS[arch].warp_size, tuple(dtypes))
    ]


def run(request: Request, cases: Sequence[Case]) -> Iterator[Row]:
    return spread("codegen", measure, cases, COMPILED, request.seconds)


def measure(case: Case) -> list[Row]:
    """The row of a case, compiled in this process, where kernels must not be interpreted."""
    from benchmarks.instruments.codegen import TARGETS, compile_launch
    from benchmarks.instruments.launches import Name, named_launches
    from benchmarks.instruments.limits import complaints, threads

    name = Name(case.workload, case.mode, case.shape, case.dtype, case.layout)
    launch = named_launches(TARGETS[case.arch].warp_size)[name]
    code, wide, device = compile_launch(launch, case.arch), threads(launch, case.arch), BY_ARCH[case.arch]
    wrong, resident = complaints(launch, case.arch, code), device.resident(code.registers, code.shared_bytes, wide)
    figures: dict[str, float | None] = {
        "registers": code.registers,
        "spill_bytes": code.spill_bytes,
        "shared_bytes": code.shared_bytes,
        "threads": wide,
        "load_bits": max(code.loads, default=0),
        "store_bits": max(code.stores, default=0),
        "matrix": code.matrix,
        "occupancy": round(device.occupancy(resident, wide), 4),
        "bytes_in_flight": resident * code.load_bytes,
        "bytes_needed": round(device.needed_bytes),
    }
    check = {"ok": not wrong, "complaints": wrong, "loads": code.loads, "stores": code.stores, "fenced": code.fenced}
    row = Row(
        "codegen", case.workload, case.mode, case.arch, list(case.shape), case.dtype, case.layout,
        "WRONG" if wrong else "ok", figures, check, "; ".join(wrong) or f"as on {device.name}", describe(CPU),
    )  # fmt: skip
    return [row]


def table(rows: Sequence[Row]) -> Table:
    """A line a kernel and architecture: the worst of its launches."""
    shown = Table(title="generated code, the worst of each kernel's launches; nothing here was timed")
    for column in ("kernel", "arch", "launches", "registers", "spills", "shared", "occupancy", "in flight", "status"):
        shown.add_column(column, justify="left" if column in ("kernel", "arch", "status") else "right")
    kernels, archs = (dict.fromkeys(names) for names in ([r.workload for r in rows], [r.provider for r in rows]))
    for kernel, arch in product(kernels, archs):
        found = [row for row in rows if (row.workload, row.provider) == (kernel, arch)]
        if found:
            shown.add_row(kernel, arch, str(len(found)), *_worst(found))
    return shown


def _worst(rows: Sequence[Row]) -> list[str]:
    def values(name: str) -> list[float]:
        return [row.figures.get(name) or 0.0 for row in rows]

    flight = zip(values("bytes_in_flight"), values("bytes_needed"), strict=True)
    return [
        *(f"{max(values(name)):.0f}" for name in ("registers", "spill_bytes", "shared_bytes")),
        f"{min(values('occupancy')):.0%}",
        f"{min(there / needed if needed else 0.0 for there, needed in flight):.0%}",
        ", ".join(dict.fromkeys(row.status for row in rows)),
    ]


SUITE = Suite(
    "codegen", "registers, spills, access widths, occupancy and bytes in flight of every kernel; compiled, not run",
    plan, run, table, on_cpu=True,
)  # fmt: skip
