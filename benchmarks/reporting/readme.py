"""The README's results, generated from the committed rows and never typed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.environment import ROOT
from benchmarks.errors import BenchmarkError
from benchmarks.reporting import plots
from benchmarks.results import Row
from benchmarks.workloads import TIMED as SUITES, workloads

README = ROOT / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
NOT_MEASURED = "not measured"
SPEED = "speed over eager"
FOLDED = 60  # lines; a longer table has to be opened


def update(readme: Path = README, folder: Path = results.RESULTS) -> None:
    """Redraw the plots and rewrite what stands between the markers."""
    draw(folder)
    before, _, after = split(readme)
    readme.write_text(f"{before}{BEGIN}\n{render(folder)}{END}{after}")


def split(readme: Path) -> tuple[str, str, str]:
    """The text before, between and after the markers.

    Raises:
        BenchmarkError: the markers are missing.
    """
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        raise BenchmarkError(f"{readme.name} lacks the markers {BEGIN} and {END}")
    before, rest = text.split(BEGIN, 1)
    between, after = rest.split(END, 1)
    return before, between.lstrip("\n"), after


def draw(folder: Path) -> None:
    """One plot beside each file of rows."""
    for path in (path for suite in SUITES for path in sorted(folder.glob(f"*/{suite}.jsonl"))):
        plots.speeds(results.read(path), path.with_suffix(".png"))
    for path in sorted(folder.glob("*/traffic.jsonl")):
        plots.traffic(results.read(path), path.with_suffix(".png"))


def render(folder: Path = results.RESULTS) -> str:
    """Markdown of everything under ``folder``."""
    parts = [_gpu(folder), _traffic(folder / "cpu"), _cpu(folder / "cpu"), _digits(folder / "cpu")]
    return "\n".join(part for part in parts if part)


def _gpu(folder: Path) -> str:
    text = "### On a GPU\n\n"
    for suite in SUITES:
        measured = [path for path in sorted(folder.glob(f"*/{suite}.jsonl")) if path.parent.name != "cpu"]
        if not measured:
            text += f"No GPU has been measured with `{suite}` so far. `make gpu` on a machine with one fills this in.\n"
            text += f"\n{_unmeasured(suite)}\n"
        for path in measured:
            text += _timings(path)
    return text


def _unmeasured(suite: str) -> str:
    dtypes: dict[tuple[str, str], list[str]] = {}
    for w in workloads(suite, torch.device("cuda"), None):
        dtypes.setdefault((w.name, _input(w.batches, w.sample)), []).append(w.dtype)
    cells = [[*case, ", ".join(names), NOT_MEASURED] for case, names in dtypes.items()]
    return _table(["workload", "input", "dtype", "ms"], cells)


def _timings(path: Path) -> str:
    rows = results.read(path)
    return f"{_where(rows[0])}\n\n{_timings_table(rows)}\n{_image(path, SPEED)}\n"


def _traffic(folder: Path) -> str:
    rows = results.read(folder / "traffic.jsonl")
    if not rows:
        return ""
    cases: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.workload, "×".join(map(str, row.shape)), row.layout), {})[row.mode] = row
    phases = list(dict.fromkeys(row.mode for row in rows))
    header = ["function", "shape", "layout", *phases, "launches", "ATen", "vectors", "check"]
    cells = [
        [
            *case, *(" of ".join(moved(row)[:2]) for row in found),
            " + ".join(f"{row.figures['launches']:.0f}" for row in found),
            " + ".join(moved(row)[2] for row in found),
            _percent(max(row.figures.get("vector_share") or 0.0 for row in found)),
            ", ".join(dict.fromkeys(row.status for row in found)),
        ]
        for case, by_phase in cases.items()
        for found in [[by_phase[phase] for phase in phases]]
    ]  # fmt: skip
    return (
        "### Memory traffic\n\n"
        f"Bytes that the kernels move, counted exactly in Triton's interpreter ({rows[0].dtype}), and the budget;\n"
        "launches, and what ATen operators move beside the kernels, in the order of the columns. Functions of\n"
        "BatchNorm: issued bytes, in passes over one activation (one pass reads or writes it once). Functions with a\n"
        "product, M×K×N of M rows: KiB, each byte once a tensor and launch, as operands come from a cache again;\n"
        "ATen's are the products of the vendor library. `vectors`: the largest share of vectors and partial sums.\n"
        "These are byte counts, not times.\n"
        f"{_where(rows[0])}\n\n{_table(header, cells)}\n{_image(folder / 'traffic.jsonl', 'traffic and budget')}"
    )


def moved(row: Row) -> tuple[str, str, str]:
    """What kernels move, their budget and what ATen operators move: passes, or KiB where there are products."""
    names, unit = ("passes", "budget_passes", "aten_passes"), 1
    if "passes" not in row.figures:
        names, unit = ("distinct_bytes", "budget_bytes", "aten_bytes"), 1024
    total, budget, aten = (f"{(row.figures[name] or 0) / unit:.5g}" for name in names)
    return total, budget, aten


def _cpu(folder: Path) -> str:
    measured = [path for suite in SUITES if (path := folder / f"{suite}.jsonl").exists()]
    if not measured:
        return ""
    return (
        "### On a CPU, at reduced size\n\n"
        "**These are not GPU timings.** On a CPU fusedres takes its reference path, which is eager PyTorch, so\n"
        "about 1.0x over eager is expected; what the run shows is that every provider computes the same thing and\n"
        "what conversion costs. One thread.\n\n"
    ) + "".join(_timings(path) for path in measured)


def _digits(folder: Path) -> str:
    rows = results.read(folder / "train.jsonl")
    if not rows:
        return ""
    header = ["run", "path", "steps", "batch", "final loss", "held-out accuracy", "furthest from eager", "allowed"]
    cells = [
        [
            row.provider, row.layout, f"{row.figures['steps']:.0f}", str(row.shape[0]), _number(row, "loss", ".4f"),
            _percent(row.figures.get("accuracy")), _number(row, "difference", ".2g"), _number(row, "allowed", ".2g"),
        ]
        for row in rows
    ]  # fmt: skip
    return (
        "### Training parity\n\n"
        "A small residual network on scikit-learn's 8×8 digits (1347 images, 450 held out), all runs from the same\n"
        "weights and batches. The fused loss curve has to stay as near to an eager one as eager curves with other\n"
        f"summation orders stay to each other.\n{_where(rows[0])}\n\n"
        f"{_table(header, cells)}\n{_image(folder / 'train.jsonl', 'loss curves')}"
    )


def _timings_table(rows: Sequence[Row]) -> str:
    header = [
        "workload", "mode", "input", "dtype", "provider", "ms (quartiles)", "samples/s", "speedup",
        "first step s", "peak MiB",
    ]  # fmt: skip
    cells = []
    for row in rows:
        empty = NOT_MEASURED if row.status in ("ok", NOT_MEASURED) else row.status
        ms = empty
        if row.status == "ok":
            ms = f"{row.figures['ms']:.4g} ({row.figures['ms_q1']:.4g}–{row.figures['ms_q3']:.4g})"
        numbers = [
            _number(row, name, style, empty)
            for name, style in (
                ("samples_per_s", ".4g"),
                ("speedup", ".2f"),
                ("first_step_s", ".3g"),
                ("peak_mib", ".0f"),
            )
        ]
        case = [row.workload, row.mode, _input(row.shape[:1], row.shape[1:]), row.dtype]
        cells.append([*case, row.provider, ms, *numbers])
    table = _table(header, cells)
    if len(cells) <= FOLDED:
        return table
    return f"<details><summary>{len(cells)} measurements</summary>\n\n{table}\n</details>\n"


def _input(batches: Sequence[int], sample: Sequence[int]) -> str:
    return f"{', '.join(map(str, batches))} of {'×'.join(map(str, sample))}"


def _number(row: Row, name: str, style: str, empty: str = "") -> str:
    value = row.figures.get(name)
    shown = value is not None and row.status == "ok"
    return f"{value:{style}}" if shown else empty


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def _where(row: Row) -> str:
    e = row.environment
    versions = f"torch {e['torch']}, triton {e['triton']}"
    driver = f", driver {e['driver']}" if e.get("driver") else ""
    return f"Measured on {e['device']}{driver}, {versions}, commit {e['commit']}, {(e['date'] or '')[:10]}."


def _image(path: Path, text: str) -> str:
    image = path.with_suffix(".png")
    return f"![{text}]({image.relative_to(ROOT) if image.is_relative_to(ROOT) else image.name})\n"


def _table(header: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
