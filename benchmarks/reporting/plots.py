"""Plots of rows, as SVG: small, and the same bytes for the same rows.

Opaque white, the Okabe-Ito colours and a marker for each provider: readable on a light and on a dark page, and
colour-blind. What is slower is shown like what is faster, and what was wrong or failed stands there by name.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

from benchmarks.reporting.report import Rows
from benchmarks.results import Row

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999",
)  # fmt: skip
STYLES = {
    "eager": (GREY, "s"),
    "eager channels-last": (BLACK, "D"),
    "torch.compile": (ORANGE, "o"),
    "torch.compile max-autotune": (VERMILLION, "X"),
    "fusedres": (BLUE, "^"),
    "fusedres + compile": (SKY, "v"),
    "fusedres + CUDA graph": (GREEN, "P"),
    "attorch": (PURPLE, "<"),
    "cuDNN": (YELLOW, "*"),
}
OTHERS = ((GREEN, "h"), (PURPLE, "p"), (VERMILLION, "d"), (SKY, ">"))  # providers of a suite of its own
PEERS = {
    "budget": (BLACK, "|"), "eager": STYLES["eager"], "attorch": STYLES["attorch"],
    "inductor": STYLES["torch.compile"], "floor": (GREEN, "|"),
}  # fmt: skip
OVER = (VERMILLION, "X")
STEPS = {
    "eager channels-last": "eager PyTorch", "torch.compile": "torch.compile's schedule",
    "fusedres, per layer": "fusedres, per layer", "fusedres, whole network": "fusedres, whole network",
}  # fmt: skip
LINES = 26  # cases in one plot
SPEEDS = (0.1, 0.2, 0.35, 0.5, 0.7, 1, 1.4, 2, 3, 4, 6, 8, 12, 16, 32)


@dataclass(frozen=True)
class Chart:
    """One figure of the rows: a line a case, a panel a mode, a marker a provider.

    Args:
        label: of the axis, with the unit, after the figure was multiplied by ``factor``.
        bounds: figures where the whiskers end.
        even: where a line is drawn; the axis is then logarithmic around it.
    """

    name: str
    figure: str
    label: str
    factor: float = 1
    bounds: tuple[str, str] | None = None
    even: float | None = None
    log: bool = False


CHARTS = (
    Chart("speed", "speedup", "speed over {} (×; more is faster; whiskers: 95% interval)",
          bounds=("speedup_low", "speedup_high"), even=1, log=True),
    Chart("bandwidth", "bandwidth_share", "bandwidth (% of the copy bandwidth measured on this device)", 100),
    Chart("peak", "peak_mib", "peak memory of a step (MiB)", log=True),
    Chart("saved", "saved_mib", "memory saved for the backward (MiB)", log=True),
)  # fmt: skip


def draw(rows: Rows) -> dict[str, bytes]:
    """All plots, by path under the folder of the rows: ``<device>/<suite>-<what>.svg``."""
    drawn = {
        f"{device}/{suite}-{name}.svg": _svg(figure, digest(measured))
        for (device, suite), measured in rows.items()
        for name, figure in _figures(suite, measured)
    }
    return dict(sorted(drawn.items()))


def headline(rows: Rows) -> dict[str, bytes]:
    """The one figure at the top: elementwise bytes of a training step, a bar for each way to run it."""
    network = rows.get(("cpu", "network"), ())
    moved = {row.provider: row.figures["moved_mib"] or 0.0 for row in network if row.figures.get("moved_mib")}
    shown = {text: moved[name] for name, text in STEPS.items() if name in moved}
    if not shown:
        return {}
    figure = Figure(figsize=(8, 0.9 + 0.42 * len(shown)), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.barh(list(shown), list(shown.values()), color=[BLUE if "fusedres" in name else GREY for name in shown])
    for place, value in enumerate(shown.values()):
        axes.text(value, place, f" {value:.0f} MiB", va="center")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, 1.15 * max(shown.values()))
    at = network[0]
    axes.set_xlabel(
        f"elementwise bytes of a {at.workload} training step, counted\n"
        f"(MiB; {'×'.join(map(str, at.shape))}, {at.dtype}, channels-last; less is better)"
    )
    return {"headline.svg": _svg(figure, digest(network))}


def digest(rows: Sequence[Row]) -> str:
    """What a plot carries to tell which rows it was drawn from."""
    return hashlib.sha256(json.dumps([asdict(row) for row in rows]).encode()).hexdigest()[:16]


def _figures(suite: str, rows: Sequence[Row]) -> Iterator[tuple[str, Figure]]:
    if suite == "train":
        yield "curves", _curves(rows)
        return
    if suite == "traffic":
        yield from _pages("passes", [row for row in rows if "passes" in row.figures], _traffic)
        yield from _pages("bytes", [row for row in rows if "distinct_bytes" in row.figures], _traffic)
        return
    for chart in CHARTS:
        for dtype in dict.fromkeys(row.dtype for row in rows):
            chosen = [row for row in rows if row.dtype == dtype]
            if any(_number(row, chart.figure) is not None for row in chosen):
                yield from _pages(f"{chart.name}-{dtype}", chosen, lambda part, chart=chart: _dots(chart, part))


def _pages(name: str, rows: Sequence[Row], plot: Callable[[Sequence[Row]], Figure]) -> Iterator[tuple[str, Figure]]:
    """As many plots as it takes to keep the lines of each readable."""
    cases = list(dict.fromkeys(_case(row) for row in rows))
    parts = [cases[start : start + LINES] for start in range(0, len(cases), LINES)]
    for number, part in enumerate(parts, 1):
        chosen = [row for row in rows if _case(row) in part]
        yield f"{name}-{number}" if len(parts) > 1 else name, plot(chosen)


def _case(row: Row) -> str:
    layout = f", {row.layout}" if row.suite == "traffic" else ""
    return f"{row.workload}, {'×'.join(map(str, row.shape))}{layout}"


def _dots(chart: Chart, rows: Sequence[Row]) -> Figure:
    names = list(dict.fromkeys(row.provider for row in rows))
    names.sort(key=lambda name: list(STYLES).index(name) if name in STYLES else len(STYLES))
    styles = {name: STYLES.get(name, OTHERS[place % len(OTHERS)]) for place, name in enumerate(names)}
    figure, panels = _frame(rows, f"{chart.label.format('eager')}, {rows[0].dtype}", 0.14 + 0.06 * len(names))
    for mode, (panel, cases) in panels.items():
        for place, name in enumerate(names):
            chosen = [row for row in rows if (row.mode, row.provider) == (mode, name)]
            heights = [cases.index(_case(row)) + 0.8 * ((place + 0.5) / len(names) - 0.5) for row in chosen]
            _points(panel, chart, chosen, heights, styles[name])
        _axis(panel, chart)
    _legend(figure, rows, styles)
    return figure


def _points(panel: Axes, chart: Chart, rows: Sequence[Row], heights: Sequence[float], style: tuple[str, str]) -> None:
    """One provider; what has no figure because it went wrong is named at the edge."""
    colour, marker = style
    good: list[tuple[float, float, float, float]] = []
    for row, height in zip(rows, heights, strict=True):
        value = _number(row, chart.figure)
        if row.status != "ok":
            place = panel.get_yaxis_transform()
            panel.text(0.01, height, row.status, transform=place, color=colour, fontsize=6, va="center")
        elif value is not None:
            low, high = (_number(row, name) or value for name in chart.bounds or (chart.figure, chart.figure))
            good.append((chart.factor * value, height, chart.factor * low, chart.factor * high))
    if good:
        values, places, lows, highs = zip(*good, strict=True)
        if chart.bounds:
            panel.hlines(places, lows, highs, color=colour, linewidth=1)
        panel.plot(values, places, marker, color=colour, markersize=5, markeredgecolor=BLACK, markeredgewidth=0.3)


def _axis(panel: Axes, chart: Chart) -> None:
    if chart.log and panel.has_data():
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    if chart.even is not None:
        panel.axvline(chart.even, color="black", linewidth=0.8)
        low, high = panel.get_xlim()
        panel.set_xlim(min(low, chart.even / 2), max(high, chart.even * 2))
        panel.xaxis.set_major_locator(FixedLocator(SPEEDS))
        panel.xaxis.set_minor_locator(NullLocator())
    elif not chart.log:
        panel.set_xlim(left=0)


def _traffic(rows: Sequence[Row]) -> Figure:
    """What was moved beside the budget and, where they are known, what others move."""
    passes = "passes" in rows[0].figures
    label = f"reads and writes, of kernels and of ATen operators ({'passes' if passes else 'MiB'}), {rows[0].dtype}"
    figure, panels = _frame(rows, label, 0.24)
    known = [n for n in PEERS if n == "budget" or any(peer(row, n) is not None for row in rows)]
    for row in rows:
        panel, cases = panels[row.mode]
        total, budget = moved(row)
        peers = {name: peer(row, name) for name in known} | {"budget": budget}
        style = OVER if row.status != "ok" or total > 1.05 * budget else STYLES["fusedres"]
        for value, (colour, marker) in [*((peers[name], PEERS[name]) for name in known), (total, style)]:
            if value is not None:
                size = 13 if marker == "|" else 6
                panel.plot(value, cases.index(_case(row)), marker, color=colour, markersize=size)
    for panel, _ in panels.values():
        panel.set_xlim(left=0) if passes else panel.set_xscale("log")
        panel.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    styles = {"fusedres": STYLES["fusedres"], "fusedres, over budget or WRONG": OVER, **{n: PEERS[n] for n in known}}
    _legend(figure, rows, styles)
    return figure


def moved(row: Row) -> tuple[float, float]:
    """What was moved and what may be: in passes, or in MiB where there are products."""
    if "passes" in row.figures:
        names, unit = (("passes", "aten_passes"), ("budget_passes",)), 1
    else:
        names, unit = (("distinct_bytes", "aten_bytes"), ("budget_bytes", "aten_budget_bytes")), 2**20
    total, budget = (sum(_number(row, name) or 0.0 for name in some) / unit for some in names)
    return total, budget


def peer(row: Row, name: str) -> float | None:
    """What somebody else moves, in the unit of :func:`moved`; ``None`` where it is not known."""
    if "passes" in row.figures:
        return _number(row, f"{name}_passes")
    found = _number(row, f"{name}_bytes")
    return None if found is None else found / 2**20


def _curves(rows: Sequence[Row]) -> Figure:
    """Training losses on one logarithmic axis."""
    figure = Figure(figsize=(8, 4), layout="constrained", facecolor="white")
    axes = figure.subplots()
    colours, styles = (BLACK, ORANGE, GREEN, PURPLE, BLUE, VERMILLION, SKY), ("-", "--", "-.", ":", (0, (5, 1)))
    for place, row in enumerate(rows):
        losses = row.check.get("losses", [])
        axes.plot(
            range(1, len(losses) + 1), losses, label=f"{row.provider} ({row.layout})",
            color=colours[place % 7], linestyle=styles[place % 5], linewidth=1.3,
        )  # fmt: skip
    axes.set(yscale="log", xlabel="step", ylabel="cross-entropy of the batch (nats)")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _frame(rows: Sequence[Row], label: str, line: float) -> tuple[Figure, dict[str, tuple[Axes, list[str]]]]:
    """A panel for each mode, and the cases whose lines they share; ``line`` inches for each."""
    modes, cases = (list(dict.fromkeys(names)) for names in ([r.mode for r in rows], [_case(r) for r in rows]))
    figure = Figure(figsize=(12, 1.5 + line * len(cases)), layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(modes), sharex=True, sharey=True, squeeze=False)[0]
    for panel, mode in zip(panels, modes, strict=True):
        panel.set_title(mode, fontsize=10)
        panel.grid(axis="both", linewidth=0.3)
        panel.set_axisbelow(True)
    panels[0].set_yticks(range(len(cases)), cases, fontsize=8)
    panels[0].set_ylim(len(cases) - 0.4, -0.6)
    figure.supxlabel(label, fontsize=10)
    return figure, {mode: (panel, cases) for mode, panel in zip(modes, panels, strict=True)}


def _legend(figure: Figure, rows: Sequence[Row], styles: Mapping[str, tuple[str, str]]) -> None:
    handles = []
    for name, (colour, marker) in styles.items():
        edge = {} if marker == "|" else {"markeredgecolor": BLACK, "markeredgewidth": 0.3}
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", label=name, **edge))
    device = str(rows[0].environment.get("device", ""))
    figure.legend(
        handles=handles, title=device, loc="outside upper center", ncols=5, frameon=False, fontsize=8, title_fontsize=10
    )


def _number(row: Row, name: str) -> float | None:
    return row.figures.get(name)


def _svg(figure: Figure, rows: str) -> bytes:
    """Without a date, a version or random names; text stays text, which is a tenth of its outlines."""
    file = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "fusedres", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Description": f"rows {rows}"})
    return file.getvalue()
