"""The package's table of what is faster where, from measured rows: ``fusedres/ops/preferences.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.errors import BenchmarkError
from benchmarks.reporting.report import load
from benchmarks.results import Row

FILE = ROOT / "fusedres" / "ops" / "preferences.json"
PROVIDER, BASELINE = "fusedres", "eager channels-last"  # neither compiled nor captured, in one format
COOPERATIVE = "fusedres + cooperative"
LAYOUT = "channels-last"


def write(folder: Path, file: Path = FILE) -> dict[str, Any]:
    """Replace ``file`` by what the rows under ``folder`` say, and return it. Devices without such rows have no entry.

    Raises:
        BenchmarkError: no row of a GPU says anything; the file is left as it was.
    """
    found = {}
    for (_, suite), rows in load(folder).items():
        usable = [row for row in rows if suite == "kernels" and _is_usable(row)]
        if any(row.provider == PROVIDER for row in usable):
            found[str(usable[-1].environment["device"])] = _entry(usable)
    if not found:
        raise BenchmarkError(f"no row under {folder} compares {PROVIDER} with {BASELINE} on a GPU")
    fresh = file.with_suffix(".tmp")
    fresh.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    fresh.replace(file)
    return found


def _is_usable(row: Row) -> bool:
    """Right, of a GPU, and compared with the baseline of the same run."""
    compared = (
        row.provider in (PROVIDER, COOPERATIVE) and row.layout == LAYOUT and row.figures.get("speedup_high") is not None
    )
    return compared and row.status == "ok" and bool(row.environment.get("driver"))


def _entry(rows: Sequence[Row]) -> dict[str, Any]:
    """Of one device: what it was measured with, and [rows, channels, speed] by layer, mode and dtype.

    ``cooperative`` is the least that the intervals allow of its speed over two launches, from the same runs.
    """
    ours = {_place(row): row for row in rows if row.provider == PROVIDER}
    tables: dict[str, dict[str, list[list[float]]]] = {"speed": {}, "cooperative": {}}
    for row in ours.values():
        _add(tables["speed"], row, row.figures["speedup_high"] or 0.0)
    for row in rows:
        beside = ours.get(_place(row))
        if row.provider == COOPERATIVE and row.mode == "training" and beside is not None:
            ratio = (row.figures["speedup_low"] or 0.0) / (beside.figures["speedup_high"] or 1.0)
            _add(tables["cooperative"], row, round(ratio, 4))
    at = rows[-1].environment
    told = {name: at[name] for name in ("torch", "triton", "commit")} | {"date": str(at["date"])[:10]}
    return {**told, **{name: dict(sorted(table.items())) for name, table in tables.items() if table}}


def _place(row: Row) -> tuple[object, ...]:
    return row.workload, row.mode, tuple(row.shape), row.dtype


def _add(table: dict[str, list[list[float]]], row: Row, speed: float) -> None:
    batch, channels, *plane = row.shape
    points = table.setdefault(f"{row.workload.split(' ')[0]} {row.mode} {row.dtype}", [])
    points.append([batch * math.prod(plane), channels, speed])
    points.sort()
