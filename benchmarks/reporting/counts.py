"""The README's counts, of traffic and of generated code: exact on any machine, and not times."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.reporting.markdown import NOT_MEASURED, Column, fold, listing, percent, pivot, size, table, where
from benchmarks.reporting.plots import peer
from benchmarks.reporting.report import Report
from benchmarks.results import Row

PREDICTED = "us_"  # and the device's name


def traffic(report: Report) -> str:
    """A line a function to see, every shape to open."""
    rows = report.rows.get(("cpu", "traffic"))
    if not rows:
        return ""
    first = {row.workload: (row.shape, row.layout) for row in reversed(rows)}
    named = [row for row in rows if (row.shape, row.layout) == first[row.workload]]
    text = (
        "## Memory traffic\n\n"
        f"Bytes that the kernels move, counted exactly in Triton's interpreter ({rows[0].dtype}), and the budget;\n"
        "launches, and what ATen operators move beside the kernels, in the order of the columns. Functions of\n"
        "BatchNorm: issued bytes, in passes over one activation (one pass reads or writes it once). Functions with a\n"
        "product, M×K×N of M rows: KiB, each byte once a tensor and launch, as operands come from a cache again;\n"
        "ATen's are the products of the vendor library. `vectors`: the largest share of vectors and partial sums.\n"
        "In brackets, where it is known: what all operators of eager PyTorch move, counted, and what the code of\n"
        "others was read to move. These are byte counts, not times.\n"
        f"{where(rows)}\n\n{counts(named)}\n"
    )
    if any(name.startswith(PREDICTED) for row in named for name in row.figures):
        summary = "Predicted from bytes and datasheets, in µs; no measurement"
        text += fold(predicted(named), summary, 0)
    text += report.images("cpu", "traffic", "traffic and budget")
    return f"{text}\n" + fold(counts(rows), f"all {len(rows)} measurements", 0)


def counts(rows: Sequence[Row]) -> str:
    cases: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.workload, size(row.shape), row.layout), {})[row.mode] = row
    modes = list(dict.fromkeys(row.mode for row in rows))
    header = ["function", "shape", "layout", *modes, "launches", "ATen", "vectors", "check"]
    cells = (
        [
            *key, *(_moved(there[mode]) if mode in there else "" for mode in modes),
            " + ".join(f"{row.figures.get('launches') or 0:.0f}" for row in there.values()),
            " + ".join(_aten(row) for row in there.values()),
            percent(max(row.figures.get("vector_share") or 0.0 for row in there.values())),
            ", ".join(dict.fromkeys(row.status for row in there.values())),
        ]
        for key, there in cases.items()
    )  # fmt: skip
    return table(header, cells)


def _moved(row: Row) -> str:
    """What the kernels move, of what they may, and what others are known to move, all operators together."""
    names, unit = ("passes", "budget_passes"), 1
    if "passes" not in row.figures:
        names, unit = ("distinct_bytes", "budget_bytes"), 1024
    total, budget = (f"{(row.figures.get(name) or 0) / unit:.5g}" for name in names)
    peers = [(name, peer(row, name)) for name in ("eager", "attorch", "inductor")]
    scale = 1 if unit == 1 else 2**20 / unit  # MiB to KiB
    known = ", ".join(f"{name} {scale * value:.4g}" for name, value in peers if value is not None)
    return f"{total} of {budget}" + (f" ({known})" if known else "")


def _aten(row: Row) -> str:
    passes = "passes" in row.figures
    return f"{(row.figures.get('aten_passes' if passes else 'aten_bytes') or 0) / (1 if passes else 1024):.5g}"


def predicted(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.figures if name.startswith(PREDICTED)))
    columns = [Column(name.removeprefix(PREDICTED).upper(), name, ".3g") for name in names]
    return listing(rows, columns)


def codegen(report: Report) -> str:
    """A line an architecture to see, every kernel to open."""
    rows = report.rows.get(("cpu", "codegen"))
    if not rows:
        return ""
    kernels = pivot(rows, ("kernel",), lambda row: (row.workload,), _worst)
    return (
        "## Generated code\n\n"
        "What the compilers made of the kernels, without a GPU: the worst of all variants, and which kernel it is.\n"
        "Bytes in flight: how many of the loads' are needed to keep the memory busy.\n"
        f"{where(rows)}\n\n{architectures(rows)}\n"
        + fold(
            f"Registers a thread, bytes spilled a thread, occupancy; the worst of each kernel's variants.\n\n{kernels}",
            "by kernel and architecture",
            0,
        )
    )


def architectures(rows: Sequence[Row]) -> str:
    """The worst kernels of each."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.provider, []).append(row)
    header = ["architecture", "kernels", "variants", "most registers", "spilling", "lowest occupancy", "in flight"]
    cells = (
        [
            name, str(len({row.workload for row in some})), str(len(some)),
            _extreme(some, "registers", max, ".0f"), _spilling(some), _extreme(some, "occupancy", min, ".0%"),
            _in_flight(some),
        ]
        for name, some in by_name.items()
    )  # fmt: skip
    return table(header, cells)


def _extreme(rows: Sequence[Row], figure: str, choose: Callable[..., tuple[float, str]], style: str) -> str:
    found = [(value, row.workload) for row in rows if (value := row.figures.get(figure)) is not None]
    if not found:
        return NOT_MEASURED
    value, kernel = choose(found)
    return f"{value:{style}} ({kernel})"


def _spilling(rows: Sequence[Row]) -> str:
    spilled = {row.workload for row in rows if row.figures.get("spill_bytes")}
    return ", ".join(sorted(spilled)) or "none"


def _in_flight(rows: Sequence[Row]) -> str:
    """The smallest share of what would be needed."""
    shares = [
        (held / needed, row.workload)
        for row in rows
        if (held := row.figures.get("bytes_in_flight")) is not None and (needed := row.figures.get("bytes_needed"))
    ]
    return f"{min(shares)[0]:.0%} ({min(shares)[1]})" if shares else NOT_MEASURED


def _worst(rows: Sequence[Row]) -> str:
    registers, spilled, occupancy = (
        [value for row in rows if (value := row.figures.get(name)) is not None]
        for name in ("registers", "spill_bytes", "occupancy")
    )
    bad = [row.status for row in rows if row.status != "ok"]
    parts = [f"{max(registers):.0f}"] if registers else []
    parts += [f"{max(spilled):.0f} B"] if any(spilled) else []
    parts += [f"{min(occupancy):.0%}"] if occupancy else []
    return ", ".join([*parts, *dict.fromkeys(bad)]) or NOT_MEASURED
