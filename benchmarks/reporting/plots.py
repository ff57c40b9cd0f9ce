"""Plots of committed rows. Opaque white and the Okabe-Ito colours: readable on any page, also colour-blind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.providers import PROVIDERS
from benchmarks.results import Row
from benchmarks.timing import STEPS

COLOURS = dict(zip(PROVIDERS, ("#999999", "#000000", "#E69F00", "#0072B2")*3))
MARKERS = dict(zip(PROVIDERS, "sDo^"*3))
STYLES = ("-", "--", "-.", ":", (0, (5, 1)))


def speeds(rows: Sequence[Row], path: Path) -> None:
    """Speed over the baseline by case and provider, with quartiles; slower than 1 is shown like faster."""
    good = [row for row in rows if row.status == "ok" and row.figures.get("speedup")]
    cases = list(dict.fromkeys(_case(row) for row in good))
    names = [name for name in PROVIDERS if any(row.provider == name for row in good)]
    figure, panels = plt.subplots(
        1, len(STEPS), figsize=(10, 1.6 + 0.32 * len(cases)), sharey=True, layout="constrained"
    )
    for panel, mode in zip(panels, STEPS, strict=True):
        panel.axvline(1, color="black", linewidth=0.8)
        for position, name in enumerate(names):
            chosen = [row for row in good if (row.mode, row.provider) == (mode, name)]
            _points(panel, name, chosen, cases, 0.8 * ((position + 0.5) / len(names) - 0.5))
        panel.set_title(mode, fontsize=10)
        panel.grid(axis="y", linewidth=0.3)
    panels[0].set_yticks(range(len(cases)), cases, fontsize=8)
    panels[0].set_ylim(len(cases) - 0.4, -0.6)
    figure.supxlabel("speed relative to eager (more is faster; whiskers: quartiles)", fontsize=10)
    figure.suptitle(rows[0].environment["device"] or "", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(names), frameon=False)
    _save(figure, path)


def _points(panel: Any, name: str, rows: Sequence[Row], cases: list[str], offset: float) -> None:
    """The speeds of one provider, perhaps none, ``offset`` of a line below the middle of their cases."""
    speed = np.array([_number(row, "speedup") for row in rows])
    low, middle, high = (np.array([_number(row, figure) for row in rows]) for figure in ("ms_q1", "ms", "ms_q3"))
    spread = np.maximum([speed - speed * middle / high, speed * middle / low - speed], 0)
    panel.errorbar(
        speed, [cases.index(_case(row)) + offset for row in rows], xerr=spread, fmt=MARKERS[name], markersize=4,
        color=COLOURS[name], label=name, elinewidth=1, capsize=2,
    )  # fmt: skip


def _case(row: Row) -> str:
    return f"{row.workload}, batch {row.shape[0]}, {row.dtype}"


def traffic(rows: Sequence[Row], path: Path) -> None:
    """Passes over an activation, or bytes where there are products, measured beside the budget."""
    workloads, phases = (list(dict.fromkeys(names)) for names in ([r.workload for r in rows], [r.mode for r in rows]))
    size = (12, 0.8 + 2 * len(workloads))
    figure, grid = plt.subplots(
        len(workloads), len(phases), figsize=size, sharex="row", sharey="row", squeeze=False, layout="constrained"
    )
    for workload, panels in zip(workloads, grid, strict=True):
        chosen = [row for row in rows if row.workload == workload]
        groups = list(dict.fromkeys((tuple(row.shape), row.layout) for row in chosen))
        for row in chosen:
            panel = panels[phases.index(row.mode)]
            place = groups.index((tuple(row.shape), row.layout))
            total, budget, unit = _moved(row)
            panel.barh(place, total, color="#0072B2" if row.status == "ok" else "#D55E00")
            panel.plot([budget, budget], [place - 0.5, place + 0.5], color="black", linestyle="--", linewidth=1)
            panel.set_title(f"{workload}, {row.mode}", fontsize=9)
            panel.set_xlabel(unit, fontsize=9)
        panels[0].set_yticks(range(len(groups)), [f"{'x'.join(map(str, s))}, {layout}" for s, layout in groups])
        panels[0].invert_yaxis()
    figure.supxlabel("reads and writes, of kernels and of ATen operators (dashed: budget)", fontsize=10)
    _save(figure, path)


def _moved(row: Row) -> tuple[float, float, str]:
    """What was moved and what may be, and the unit of both."""
    if "passes" in row.figures:
        return _number(row, "passes") + _number(row, "aten_passes"), _number(row, "budget_passes"), "passes"
    total = _number(row, "distinct_bytes") + _number(row, "aten_bytes")
    return total / 2**20, (_number(row, "budget_bytes") + _number(row, "aten_budget_bytes")) / 2**20, "MiB"


def curves(losses: dict[str, list[float]], path: Path) -> None:
    """Training losses on one logarithmic axis."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    colours = ("#000000", "#E69F00", "#009E73", "#CC79A7", "#0072B2")
    for position, (name, values) in enumerate(losses.items()):
        axes.plot(
            range(1, len(values) + 1), values, label=name, color=colours[position % 5],
            linestyle=STYLES[position % 5], linewidth=1.3,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy of the batch (nats)")
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _number(row: Row, name: str) -> float:
    return float(row.figures.get(name) or 0.0)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white", metadata={"Software": None})
    plt.close(figure)
