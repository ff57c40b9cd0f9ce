"""One page of everything: all rows, also those that lost, were wrong or failed, in a file that needs no other."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from benchmarks.reporting import headline
from benchmarks.reporting.markdown import size, where
from benchmarks.reporting.report import Rows
from benchmarks.results import Row
from benchmarks.suites import SUITES

KEY = ("workload", "mode", "provider", "shape", "dtype", "layout")
HEADLINE = "headline.svg"
TEMPLATE = "page.html.j2"
SAID = ("device", "driver", "torch", "triton", "python", "commit")  # above the table and not in it


def render(rows: Rows, plots: Mapping[str, bytes]) -> str:
    """HTML that depends on the rows and their plots alone."""
    loader = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(TEMPLATE)
    measured = {suite for _, suite in rows}
    return template.render(
        parts=[_part(device, suite, found, plots) for (device, suite), found in rows.items()],
        top=[base64.b64encode(content).decode() for name, content in plots.items() if name == HEADLINE],
        header=headline.HEADER,
        lines=headline.lines(rows),
        worse=headline.worse(rows),
        on_cpu=headline.ON_CPU if rows and headline.device(rows) == "cpu" else "",
        missing=[name for name in SUITES if name not in measured],
    )


def _part(device: str, suite: str, rows: Sequence[Row], plots: Mapping[str, bytes]) -> dict[str, Any]:
    figures = _names(row.figures for row in rows)
    measured = [name for name in _names(row.environment for row in rows) if name not in SAID]
    return {
        "device": device,
        "suite": suite,
        "where": where(rows),
        "plots": {
            name: base64.b64encode(content).decode()
            for name, content in plots.items()
            if name.startswith(f"{device}/{suite}-")
        },
        "header": [*KEY, "status", *figures, "check", "note", *measured],
        "lines": [
            {
                "status": row.status,
                "cells": [
                    row.workload, row.mode, row.provider, size(row.shape), row.dtype, row.layout, row.status,
                    *(_text(row.figures.get(name)) for name in figures), _check(row), row.note,
                    *(_text(row.environment.get(name)) for name in measured),
                ],
            }
            for row in rows
        ],
    }  # fmt: skip


def _names(found: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for one in found for name in one))


def _text(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.6g}"


def _check(row: Row) -> str:
    """The quantity that came nearest to its limit, or went furthest beyond."""
    pairs = {name: value for name, value in row.check.items() if name.endswith(("_l2", "_max"))}
    if not pairs:
        return ""
    name = max(pairs, key=lambda name: pairs[name][0] / max(pairs[name][1], 1e-300))
    error, limit = pairs[name]
    return f"{name}: {error:.2g} of {limit:.2g}"
