"""Plots of committed rows. Opaque white and the Okabe-Ito colours: readable on any page, also colour-blind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.providers import BASELINE, PROVIDERS
from benchmarks.results import Row

COLOURS = dict(zip(PROVIDERS, ("#999999", "#000000", "#E69F00", "#0072B2"), strict=True))
HATCHES = dict(zip(PROVIDERS, ("", "", "//", ".."), strict=True))
STYLES = ("-", "--", "-.", ":", (0, (5, 1)))


def models(rows: Sequence[Row], path: Path) -> None:
    """Speed over eager channels-last by case and provider, with quartiles; slower than 1 is shown like faster."""
    good = [row for row in rows if row.status == "ok" and row.figures.get("speedup")]
    cases = list(dict.fromkeys(row.case() for row in good))
    names = [name for name in PROVIDERS if any(row.provider == name for row in good)]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.22 * len(good)))
    height = 0.8 / max(len(names), 1)
    for row in good:
        middle = cases.index(row.case()) + (names.index(row.provider) - (len(names) - 1) / 2) * height
        speed, baseline = _number(row, "speedup"), _number(row, "speedup") * _number(row, "ms")
        spread = [[speed - baseline / _number(row, "ms_q3")], [baseline / _number(row, "ms_q1") - speed]]
        label = row.provider if middle == min(_places(good, cases, names, height, row.provider)) else None
        axes.barh(
            middle, speed, 0.9 * height, xerr=np.maximum(spread, 0), label=label, color=COLOURS[row.provider],
            hatch=HATCHES[row.provider], edgecolor="white", error_kw={"ecolor": "#D55E00", "capsize": 2},
        )  # fmt: skip
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cases)), [f"{w}, {mode}\n{shape[0]} images, {dtype}" for w, mode, shape, dtype in cases])
    axes.invert_yaxis()
    axes.set_xlabel(f"speed relative to {BASELINE} (more is faster; whiskers: quartiles)")
    axes.set_title(rows[0].environment["device"] or "", fontsize=10)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0 + 0.35 / figure.get_figheight()), ncols=4, frameon=False)
    _save(figure, path)


def traffic(rows: Sequence[Row], path: Path) -> None:
    """Passes over an activation, measured beside the budget."""
    groups = list(dict.fromkeys((tuple(row.shape), row.layout) for row in rows))
    workloads, phases = (list(dict.fromkeys(names)) for names in ([r.workload for r in rows], [r.mode for r in rows]))
    figure, panels = plt.subplots(
        len(workloads), len(phases), figsize=(9, 0.8 + 1.9 * len(workloads)), sharex=True, sharey=True, squeeze=False
    )
    for row in rows:
        panel = panels[workloads.index(row.workload)][phases.index(row.mode)]
        place = groups.index((tuple(row.shape), row.layout))
        total, budget = _number(row, "passes") + _number(row, "aten_passes"), _number(row, "budget_passes")
        panel.barh(place, total, color="#0072B2" if row.status == "ok" else "#D55E00")
        panel.plot([budget, budget], [place - 0.5, place + 0.5], color="black", linestyle="--", linewidth=1)
        panel.set_title(f"{row.workload}, {row.mode}", fontsize=9)
        panel.set_xlim(0, 6.8)
    panels[0][0].set_yticks(range(len(groups)), [f"{'x'.join(map(str, s))}, {layout}" for s, layout in groups])
    panels[0][0].invert_yaxis()
    figure.supxlabel("passes over one activation, reads and writes (dashed: budget)", fontsize=10)
    _save(figure, path)


def curves(losses: dict[str, list[float]], path: Path) -> None:
    """Training losses on one logarithmic axis."""
    figure, axes = plt.subplots(figsize=(8, 4))
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


def _places(rows: Sequence[Row], cases: list[Any], names: list[str], height: float, provider: str) -> list[float]:
    offset = (names.index(provider) - (len(names) - 1) / 2) * height
    return [cases.index(row.case()) + offset for row in rows if row.provider == provider]


def _number(row: Row, name: str) -> float:
    return float(row.figures.get(name) or 0.0)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=130, facecolor="white", metadata={"Software": None})
    plt.close(figure)
