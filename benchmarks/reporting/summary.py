"""``python -m benchmarks.reporting.summary FOLDER``: the headline figures of the rows below FOLDER, in a few lines."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean

from rich.console import Console
from rich.table import Table

from benchmarks import results
from benchmarks.errors import BenchmarkError, fail
from benchmarks.results import Row

WIDTH, WORKLOADS = 150, 15
SUITES = ("models", "mlp", "kernels")  # in the order of interest
COMPILED, FUSED = "torch.compile", ("fusedres", "fusedres + CUDA graph")
MODES = ("training", "inference")
Group = tuple[str, str, str, str]  # suite, workload without its size, dtype, what fusedres is combined with


def main(folder: Path, console: Console) -> None:
    """Print what was measured on, the counts and the speedups: at most 43 lines of 150 columns.

    Raises:
        BenchmarkError: a file of the folder that does not hold rows.
    """
    rows = [row for path in sorted(folder.glob("**/*.jsonl")) for row in results.read(path)]
    if not rows:
        console.print("no rows")
        return
    _machine(rows, console)
    _counts(rows, console)
    _speedups([row for row in rows if row.suite in SUITES], console)


def _line(console: Console, text: str) -> None:
    console.print(text, no_wrap=True, overflow="ellipsis", highlight=False, markup=False)


def _machine(rows: Sequence[Row], console: Console) -> None:
    at = rows[-1].environment
    told = ("device", "driver", "torch", "triton", "python", "commit")
    _line(console, ", ".join(f"{name} {at.get(name)}" for name in told))
    with_ceilings = [row.environment for row in rows if row.environment.get("copy_gb_s")]
    if with_ceilings:
        e = with_ceilings[-1]
        _line(
            console, f"copy {e['copy_gb_s']} GB/s, matrix product {e.get('matmul_tflop_s')} TFLOP/s, as measured there"
        )


def _counts(rows: Sequence[Row], console: Console) -> None:
    counts = Counter((row.suite, row.status) for row in rows)
    suites = dict.fromkeys(row.suite for row in rows)
    parts = (f"{n}: " + " ".join(f"{counts[n, s]} {s}" for s in results.STATUSES if counts[n, s]) for n in suites)
    _line(console, "rows: " + "; ".join(parts))
    for row in [row for row in rows if row.status in ("WRONG", "failed")][:3]:
        _line(console, f"{row.status}: {row.suite} {row.workload} {row.mode} {row.provider} {row.dtype} {row.note}")


def _speedups(rows: Sequence[Row], console: Console) -> None:
    """fusedres over the baseline and over ``torch.compile``: geometric means over sizes, and the range."""
    compiled = {_place(row): row.figures["ms"] for row in rows if row.provider == COMPILED and row.status == "ok"}
    found: dict[Group, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.provider not in FUSED or row.status != "ok":
            continue
        cells = found[row.suite, row.workload.split(" ")[0], row.dtype, row.provider.removeprefix(FUSED[0])]
        if speedup := row.figures.get("speedup"):
            cells[row.mode, "eager"].append(speedup)
        if (theirs := compiled.get(_place(row))) and (ours := row.figures["ms"]):
            cells[row.mode, COMPILED].append(theirs / ours)
    if not found:
        return
    table = _table("fusedres over", *(f"{mode}: {over}" for mode in MODES for over in ("eager", COMPILED)))
    ordered = sorted(found, key=lambda group: (SUITES.index(group[0]), group[2] != "bfloat16"))
    for group in ordered[:WORKLOADS]:
        cells = (_mean(found[group][mode, over]) for mode in MODES for over in ("eager", COMPILED))
        table.add_row(" ".join(group[1:3]) + group[3], *cells)
    console.print(table)
    if len(ordered) > WORKLOADS:
        _line(console, f"and {len(ordered) - WORKLOADS} more")


def _place(row: Row) -> tuple[str, str, tuple[int, ...], str]:
    return row.workload, row.mode, tuple(row.shape), row.dtype


def _mean(ratios: Sequence[float]) -> str:
    if not ratios:
        return "-"
    spread = f" ({min(ratios):.2f}-{max(ratios):.2f}, {len(ratios)} sizes)" if len(ratios) > 1 else ""
    return f"{geometric_mean(ratios):.2f}{spread}"


def _table(*header: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in header:
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    return table


def _arguments(arguments: Iterable[str]) -> Path:
    try:
        [folder] = arguments
    except ValueError:
        fail("summary needs one folder")
    return Path(folder)


if __name__ == "__main__":
    try:
        main(_arguments(sys.argv[1:]), Console(width=WIDTH))
    except BenchmarkError as error:
        fail(str(error))
