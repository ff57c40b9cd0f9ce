"""RESULTS.md, the README's table, the plots and the page: generated from the rows and never typed."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from benchmarks import results
from benchmarks.environment import ROOT
from benchmarks.errors import BenchmarkError
from benchmarks.reporting import counts, headline, page, plots, timings
from benchmarks.reporting.markdown import Column, cell, fold, listing, table, where
from benchmarks.reporting.report import Report, Rows, load
from benchmarks.results import Row
from benchmarks.suites import SUITES
from benchmarks.workloads import TIMED

README, TABLES = ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md"
LINK, ROWS = Path("results"), 10
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
PAGE = "index.html"
MEMORY = (
    Column("saved MiB", "saved_mib"), Column("of eager's", "saved_share", ".0%"), Column("alive MiB", "alive_mib"),
    Column("peak MiB", "peak_mib"),
)  # fmt: skip
COMPILED = (
    Column("launches", "launches", ".0f"), Column("their MiB", "launch_mib"),
    Column("Inductor's kernels", "kernels", ".0f"), Column("their MiB", "inductor_mib"),
    Column("library calls", "extern_kernels", ".0f"), Column("saved MiB", "saved_mib"),
    Column("graph breaks", "graph_breaks", ".0f"), Column("recompilations", "recompilations", ".0f"),
    Column("again", "recompilations_again", ".0f"), Column("cold s", "compile_cold_s", ".3g"),
    Column("warm s", "compile_warm_s", ".3g"),
)  # fmt: skip
MOVED = (
    Column("moved MiB", "moved_mib"), Column("of eager's", "eager_share", ".1%"),
    Column("of per layer", "per_layer_share", ".1%"), Column("forward", "forward_mib"),
    Column("backward", "backward_mib"), Column("BatchNorm", "norm_mib"), Column("ReLU", "relu_mib"),
    Column("residuals", "add_mib"), Column("gradients added", "accumulation_mib"), Column("pooling", "pool_mib"),
    Column("other", "other_mib"), Column("fused kernels", "kernel_mib"), Column("launches", "launches", ".0f"),
    Column("operators", "operators", ".0f"),
)  # fmt: skip
TRAINED = (
    Column("steps", "steps", ".0f"), Column("final loss", "loss", ".4f"),
    Column("held-out accuracy", "accuracy", ".1%"), Column("furthest from eager", "difference", ".2g"),
    Column("allowed", "allowed", ".2g"),
)  # fmt: skip


def publish(folder: Path, into: Path = results.RESULTS, readme: Path = README, tables: Path = TABLES) -> None:
    """Merge the rows of ``folder`` into those of ``into``; redraw all of it, both texts too.

    Raises:
        BenchmarkError: a row of another schema, or a README without markers; nothing is written.
    """
    before, _, after = split(readme)
    rows = merged(load(into), load(folder))
    files = generate(rows)
    link = Path(os.path.relpath(into, tables.parent))
    texts = {tables: render(rows, files, link), readme: f"{before}{BEGIN}\n{summary(rows)}{END}{after}"}
    for (device, suite), found in rows.items():
        results.write(into / device / f"{suite}.jsonl", found)
    _replace(into, rows, files)
    for path, text in texts.items():
        results.replace(path, text.encode())


def merged(old: Rows, new: Rows) -> Rows:
    """One row a key; the new one where there are two."""
    keys = sorted({*old, *new})
    return {key: list({row.key: row for row in (*old.get(key, ()), *new.get(key, ()))}.values()) for key in keys}


def summary(rows: Rows) -> str:
    """The README's table."""
    found, place = headline.lines(rows), headline.device(rows)
    some = [row for (device, _), part in rows.items() if device == place for row in part]
    told = headline.ON_CPU + " No GPU has measured anything yet: speed there is not known.\n" if place == "cpu" else ""
    return (
        f"{table(headline.HEADER, found[:ROWS])}\n{told}{where(some)}\n"
        "All rows: [benchmarks/RESULTS.md](benchmarks/RESULTS.md).\n"
    )


def draw(folder: Path) -> None:
    """Plots and page of the rows under ``folder``, beside them."""
    rows = load(folder)
    _replace(folder, rows, generate(rows))


def generate(rows: Rows) -> dict[str, bytes]:
    """The contents of every file of a report, by its path beside the rows."""
    files = plots.draw(rows) | plots.headline(rows)
    return files | {PAGE: page.render(rows, files).encode()}


def _replace(folder: Path, rows: Rows, files: dict[str, bytes]) -> None:
    for device, suite in rows:
        for old in folder.glob(f"{device}/{suite}-*.svg"):
            if old.relative_to(folder).as_posix() not in files:
                old.unlink()
    for name, content in files.items():
        results.replace(folder / name, content)


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


def render(rows: Rows, plotted: Collection[str], link: Path = LINK) -> str:
    """Markdown of all rows; ``plotted`` are names of files in ``link``, as seen from where the text lies."""
    report = Report(rows, [name for name in plotted if name.endswith(".svg")], link)
    missing = [name for name in SUITES if name not in {suite for _, suite in rows}]
    where_not = "" if any(device != "cpu" for device, suite in rows if suite in TIMED) else " Nothing on a GPU."
    said = f"Not measured: {', '.join(missing) or 'no suite'}.{where_not}\n" if missing or where_not else ""
    parts = [
        timings.gpu(report),
        counts.traffic(report),
        report.section("network", "Whole training step", _moved),
        counts.codegen(report),
        report.section("memory", "Memory", lambda rows: _table(rows, MEMORY)),
        report.section("compile-study", "What torch.compile makes of it", lambda rows: _table(rows, COMPILED)),
        timings.cpu(report),
        report.section("train", "Training parity", _trained),
    ]
    return "\n".join(
        [f"# Results\n\nGenerated by `python -m benchmarks report --publish`. {said}", *filter(None, parts)]
    )


def _moved(rows: Sequence[Row]) -> str:
    """What moves most first."""
    ordered = sorted(rows, key=lambda row: -(row.figures.get("moved_mib") or 0.0))
    return (
        "What a training step reads and writes beside its convolutions and its classifier, counted on a CPU: ATen's\n"
        "operators, kernels in Triton's interpreter, and of `torch.compile` Inductor's schedule for a CPU. Variants\n"
        "of the fused step switch fusions off, for ablation. These are byte counts, not times.\n\n"
        + listing(ordered, MOVED, empty="")
    )


def _table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    return fold(listing(rows, columns, empty=""), f"{len(rows)} measurements", 6)


def _trained(rows: Sequence[Row]) -> str:
    header = ["run", "path", "batch", *(column.heading for column in TRAINED)]
    cells = (
        [row.provider, row.layout, str(row.shape[0]), *(cell(row, column, "") for column in TRAINED)] for row in rows
    )
    return (
        "A small residual network on scikit-learn's 8×8 digits (1347 images, 450 held out), all runs from the same\n"
        "weights and batches. The fused loss curve has to stay as near to an eager one as eager curves with other\n"
        f"summation orders stay to each other.\n\n{table(header, cells)}"
    )
