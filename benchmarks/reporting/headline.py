"""The ratios that are told first, eager's over ours: above 1 is better. On a screen, the page and in the README."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import geometric_mean
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.providers import EAGER
from benchmarks.reporting.report import Rows
from benchmarks.results import Row
from benchmarks.workloads import TIMED

FUSED = "fusedres"
TITLE = "eager over fusedres: above 1 is better"
HEADER = (TITLE, "training step", "inference", "how")
ON_CPU = "Timed on a CPU: fusedres takes its reference path there. These are not GPU timings."
COUNTED, TIMED_HOW = "counted", "95% interval"
WORST = 6  # lines


class Line(NamedTuple):
    what: str
    training: str = "–"
    inference: str = "–"
    how: str = COUNTED


def device(rows: Rows) -> str:
    """Whose timings are told: a GPU's where there are any."""
    timed = [name for name, suite in rows if suite in TIMED]
    return next((name for name in timed if name != "cpu"), "cpu")


def lines(rows: Rows) -> list[Line]:
    """Counts first, as they hold on any machine; whole networks before layers."""

    def found(suite: str, place: str = "cpu") -> Sequence[Row]:
        return [row for row in rows.get((place, suite), ()) if row.status == "ok"]

    place = device(rows)
    memory = found("memory", place) or found("memory")
    timed = [row for suite in TIMED for row in found(suite, place) if row.provider == FUSED and _speed(row)]
    layers = [row for row in timed if _is_layer(row)]
    return [
        *_network(found("network")), *_traffic(found("traffic")), *_memory(memory), *_host(found("host")),
        *_timed(row for row in timed if row.suite == "models"),
        *(_mean(suite, [r for r in layers if r.suite == suite]) for suite in dict.fromkeys(r.suite for r in layers)),
        *_timed(row for row in timed if row.suite != "models" and not _is_layer(row)),
    ]  # fmt: skip


def worse(rows: Rows) -> list[str]:
    """What is slower than eager, its whole interval, and what costs the host more; the worst first."""
    place = device(rows)
    timed = [row for suite in TIMED for row in rows.get((place, suite), ()) if row.provider.startswith(FUSED)]
    slower = sorted((r for r in timed if (r.figures.get("speedup_high") or 1) < 1), key=_speed)
    return [f"{r.workload} {_size(r.shape)}, {r.mode}, {r.provider}: {_interval(r)}" for r in slower]


def show(rows: Rows, console: Console, page: str, seconds: float) -> None:
    """One screen of at most 40 lines and 100 columns."""
    place = device(rows)
    measured = [row for (name, suite), some in rows.items() if name == place or suite == "network" for row in some]
    at = measured[-1].environment if measured else {}
    say: Callable[[str], None] = lambda text: console.print(escape(text), highlight=False, soft_wrap=True)  # noqa: E731
    say("fusedres against eager PyTorch, channels-last where there are images. Bytes: counted in Triton's")
    say("interpreter, the same on any machine. Host time: a call at tiny sizes; eager's with its arithmetic.")
    say(f"on {at.get('device')}, torch {at.get('torch')}, triton {at.get('triton')}; {seconds:.0f} s")
    if place == "cpu":
        say(ON_CPU)
    table = Table(*HEADER, box=None, padding=(0, 2, 0, 0))
    for line in lines(rows):
        table.add_row(*line)
    console.print(table)
    slow = worse(rows)
    say(f"slower than eager, the whole interval: {len(slow) or 'none'}")
    for text in slow[:WORST]:
        say(f"  {text}"[:100])
    if len(slow) > WORST:
        say(f"  and {len(slow) - WORST} more, on the page")
    bad = [row for row in measured if row.status in ("WRONG", "failed")]
    say(f"wrong or failed: {len(bad) or 'none'}")
    for row in bad[:WORST]:
        say(f"  {row.status}: {row.suite} {row.workload} {row.mode} {row.provider}: {row.note}"[:100])
    say(f"everything: {page}")


def _is_layer(row: Row) -> bool:
    return row.suite == "kernels" or "linear" in row.workload


def _network(rows: Sequence[Row]) -> list[Line]:
    """A whole step's elementwise bytes."""
    moved = {row.provider: row.figures.get("moved_mib") or 0.0 for row in rows}
    eager = next((value for name, value in moved.items() if name.startswith(EAGER)), None)
    names = [name for name in (f"{FUSED}, whole network", f"{FUSED}, per layer") if moved.get(name)]
    return [
        Line(f"bytes, {rows[0].workload}, {name.removeprefix(FUSED + ', ')}", f"{eager / moved[name]:.2f}")
        for name in names
        if eager
    ]


def _traffic(rows: Sequence[Row]) -> list[Line]:
    """BatchNorm's functions: passes of a step, and of inference, over the functions' sizes."""
    known = [row for row in rows if row.figures.get("eager_passes") and row.figures.get("passes")]
    modes = (("forward", "backward"), ("eval",))
    cells = [_over(known, names, "eager_passes", ("passes", "aten_passes")) for names in modes]
    return [Line(f"bytes of {len({row.workload for row in known})} BatchNorm functions, mean", *cells)] if known else []


def _over(rows: Sequence[Row], modes: Sequence[str], theirs: str, ours: Sequence[str]) -> str:
    """Mean over cases of the ratio of sums over ``modes``."""
    sums: dict[tuple[str, tuple[int, ...], str], list[float]] = {}
    for row in rows:
        if row.mode in modes:
            both = sums.setdefault((row.workload, tuple(row.shape), row.layout), [0.0, 0.0])
            both[0] += row.figures.get(theirs) or 0.0
            both[1] += sum(row.figures.get(name) or 0.0 for name in ours)
    ratios = [a / b for a, b in sums.values() if a and b]
    return f"{geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "–"


def _memory(rows: Sequence[Row]) -> list[Line]:
    """A line a model; recomputation beside it."""
    cells: dict[str, list[str]] = {}
    for row in rows:
        if row.provider.startswith(FUSED) and (share := row.figures.get("saved_share")):
            how = row.provider.removeprefix(FUSED).removeprefix(" + ")
            cells.setdefault(row.workload, []).append(f"{1 / share:.2f}{how and f' ({how})'}")
    return [Line(f"saved for backward, {name}", ", ".join(some)) for name, some in cells.items()]


def _host(rows: Sequence[Row]) -> list[Line]:
    """Eager's arithmetic is in its figure, and ours is not: the note says so."""
    sums: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.provider in (EAGER, FUSED) and row.figures.get("host_us"):
            sums.setdefault(("inference" if row.mode == "inference" else "training", row.provider), []).append(
                row.figures["host_us"] or 0.0
            )
    cells = [
        f"{sum(sums[mode, EAGER]) / sum(sums[mode, FUSED]):.2f}"
        if (mode, EAGER) in sums and (mode, FUSED) in sums
        else "–"
        for mode in ("training", "inference")
    ]
    return [Line("host time a call, BatchNorm layers", cells[0], cells[1], "timed")] if sums else []


def _timed(rows: Iterable[Row]) -> list[Line]:
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(f"{row.workload} {_size(row.shape)}{_dtype(row)}", {})[row.mode] = _interval(row)
    return [
        Line(f"speed, {name}", found.get("training", "–"), found.get("inference", "–"), TIMED_HOW)
        for name, found in cells.items()
    ]


def _mean(suite: str, rows: Sequence[Row]) -> Line:
    """Geometric mean over layers; their intervals add as independent errors of logarithms do."""
    cells = []
    for mode in ("training", "inference"):
        chosen = [row.figures for row in rows if row.mode == mode]
        if not chosen:
            cells.append("–")
            continue
        mean = geometric_mean([f["speedup"] or 1 for f in chosen])
        widths = [math.log((f.get("speedup_high") or 1) / (f.get("speedup_low") or 1)) / 2 for f in chosen]
        half = math.exp(math.hypot(*widths) / len(chosen))
        cells.append(f"{mean:.2f} ({mean / half:.2f}–{mean * half:.2f})")
    count = len({row.workload for row in rows})
    return Line(
        f"speed, {count} {'BatchNorm' if suite == 'kernels' else 'LayerNorm'} layers, mean",
        cells[0],
        cells[1],
        TIMED_HOW,
    )


def _speed(row: Row) -> float:
    return row.figures.get("speedup") or 0.0


def _interval(row: Row) -> str:
    value, low, high = (row.figures.get(name) for name in ("speedup", "speedup_low", "speedup_high"))
    return f"{value:.2f}" if low is None or high is None else f"{value:.2f} ({low:.2f}–{high:.2f})"


def _dtype(row: Row) -> str:
    return "" if row.dtype == "float32" else f", {row.dtype}"


def _size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
