"""Rows as Markdown tables: one row a line, or one case a line with a column for each provider."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from benchmarks.results import Row

NOT_MEASURED = "–"
CASE = ("workload", "mode", "input", "dtype")
VISIBLE = 12  # lines; a longer table has to be opened


class Column(NamedTuple):
    """One figure: its heading with the unit, its name, and how it is written."""

    heading: str
    figure: str
    style: str = ".4g"


def table(header: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *cells]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def fold(text: str, summary: str, visible: int = VISIBLE) -> str:
    """``text`` as it is where it is short, else behind its summary."""
    if len(text.splitlines()) <= visible + 2:
        return text
    return f"<details><summary>{summary}</summary>\n\n{text}\n</details>\n"


def listing(rows: Sequence[Row], columns: Sequence[Column], empty: str = NOT_MEASURED) -> str:
    """One row a line, with those columns that any row has; a row without figures shows its status."""
    columns = [column for column in columns if any(row.figures.get(column.figure) is not None for row in rows)]
    header = [*CASE, "provider", *(column.heading for column in columns)]
    return table(
        header, ([*case(row), row.provider, *(cell(row, column, empty) for column in columns)] for row in rows)
    )


def pivot(
    rows: Sequence[Row], heading: Sequence[str], label: Callable[[Row], Sequence[str]], text: Callable[[list[Row]], str]
) -> str:
    """A line for each label, a column for each provider; ``text`` of the rows that meet there."""
    providers = list(dict.fromkeys(row.provider for row in rows))
    found: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault(tuple(label(row)), {}).setdefault(row.provider, []).append(row)
    cells = ([*key, *(text(there[p]) if p in there else "" for p in providers)] for key, there in found.items())
    return table([*heading, *providers], cells)


def case(row: Row) -> tuple[str, ...]:
    return row.workload, row.mode, size(row.shape), row.dtype


def cell(row: Row, column: Column, empty: str = NOT_MEASURED) -> str:
    value = row.figures.get(column.figure)
    if row.status != "ok":
        return row.status
    return empty if value is None else format(value, column.style)


def spread(rows: Sequence[Row]) -> str:
    """Median, extremes, how many are slower, and what else became of the cases of one provider."""
    good = [row.figures for row in rows if row.status == "ok" and row.figures.get("speedup")]
    others = [row.status for row in rows if row.status != "ok"]
    parts = []
    if good:
        speeds = [figures.get("speedup") or 0.0 for figures in good]
        slower = sum((figures.get("speedup_high") or speed) < 1 for figures, speed in zip(good, speeds, strict=True))
        parts = [f"{statistics.median(speeds):.2f} ({min(speeds):.2f}–{max(speeds):.2f})"]
        parts += [f"{slower} of {len(good)} slower"] if slower else []
    parts += [f"{others.count(status)} {status}" for status in dict.fromkeys(others)]
    return ", ".join(parts)


def speed(rows: Sequence[Row]) -> str:
    """Speed with its interval, or what became of it."""
    return ", ".join(_speed(row) for row in rows)


def _speed(row: Row) -> str:
    value, low, high, ms = (row.figures.get(name) for name in ("speedup", "speedup_low", "speedup_high", "ms"))
    if row.status != "ok":
        return row.status
    if value is None:  # there is nothing to compare with: it is the baseline itself, or that did not run
        return NOT_MEASURED if ms is None else f"{ms:.4g} ms"
    return f"{value:.2f}" if low is None or high is None else f"{value:.2f} ({low:.2f}–{high:.2f})"


def size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def where(rows: Sequence[Row]) -> str:
    """What the rows were measured on; several commits or days where a run was taken up again."""
    names = ("device", "driver", "torch", "triton", "commit", "date")
    seen = {name: {str(row.environment.get(name) or "") for row in rows} for name in names}
    seen["date"] = {date[: len("2000-01-01")] for date in seen["date"]}
    device, driver, torch, triton, commit, date = (", ".join(sorted(filter(None, seen[name]))) for name in names)
    driver = f", driver {driver}" if driver else ""
    return f"Measured on {device}{driver}, torch {torch}, triton {triton}, commit {commit}, {date}."
