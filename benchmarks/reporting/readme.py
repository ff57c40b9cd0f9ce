"""The README's results, the plots and the page: generated from the rows and never typed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from benchmarks import results
from benchmarks.environment import ROOT
from benchmarks.errors import BenchmarkError
from benchmarks.reporting import counts, page, plots, timings
from benchmarks.reporting.markdown import CASE, Column, case, cell, fold, listing, pivot, speed, spread, table
from benchmarks.reporting.report import Report, Rows, load
from benchmarks.results import Row

README = ROOT / "README.md"
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


def update(readme: Path = README, folder: Path = results.RESULTS) -> None:
    """Redraw everything under ``folder`` and rewrite what stands between the markers; nothing where a row is none.

    Raises:
        BenchmarkError: a row of another schema, or a README without markers.
    """
    rows = load(folder)
    files = generate(rows)
    before, _, after = split(readme)
    text = f"{before}{BEGIN}\n{render(rows, files, folder)}{END}{after}"
    _replace(folder, rows, files)
    _write(readme, text.encode())


def draw(folder: Path) -> None:
    """Plots and page of the rows under ``folder``, beside them."""
    rows = load(folder)
    _replace(folder, rows, generate(rows))


def generate(rows: Rows) -> dict[str, bytes]:
    """The contents of every file of a report, by its path beside the rows."""
    files = plots.draw(rows)
    return files | {PAGE: page.render(rows, files).encode()}


def _replace(folder: Path, rows: Rows, files: dict[str, bytes]) -> None:
    for device, suite in rows:
        for old in folder.glob(f"{device}/{suite}-*.svg"):
            if old.relative_to(folder).as_posix() not in files:
                old.unlink()
    for name, content in files.items():
        _write(folder / name, content)


def _write(path: Path, content: bytes) -> None:
    """Whoever reads ``path`` meanwhile sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_bytes(content)
    fresh.replace(path)


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


def render(rows: Rows, plotted: Collection[str], folder: Path = results.RESULTS) -> str:
    """Markdown of all rows; ``plotted`` are names of files in ``folder``."""
    link = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else Path(folder.name)
    report = Report(rows, [name for name in plotted if name.endswith(".svg")], link)
    return "\n".join(
        [
            timings.gpu(report),
            report.section("probe", "1×1 convolutions", _probe),
            counts.traffic(report),
            report.section("network", "Whole training step", _moved),
            counts.codegen(report),
            report.section("memory", "Memory", lambda rows: _table(rows, MEMORY)),
            report.section("compile-study", "What torch.compile makes of it", lambda rows: _table(rows, COMPILED)),
            timings.cpu(report),
            report.section("train", "Training parity", _trained),
        ]
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


def _probe(rows: Sequence[Row]) -> str:
    """A line an epilogue and prologue to see, every convolution to open."""
    modes = pivot(rows, ("mode", "dtype"), lambda row: (row.mode, row.dtype), spread)
    cases = pivot(rows, CASE, case, speed)
    return (
        "Speed of a Triton GEMM, which computes statistics and normalises its input on the way, over cuDNN's\n"
        "convolution between kernels: the median over the convolutions of ResNet-50, the slowest and the fastest one.\n"
        f"\n{modes}\n{fold(cases, 'by convolution', 0)}"
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
