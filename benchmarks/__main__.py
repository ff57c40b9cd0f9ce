"""``python -m benchmarks [models|mlp|traffic|train|report|all]``; without a word, all but train."""

from __future__ import annotations

import os

os.environ.pop("TRITON_INTERPRET", None)  # timings are of compiled kernels; traffic sets it for its own processes

import argparse
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import plots, providers, report, results, timing_suite, traffic_suite, train_suite
from benchmarks.environment import folder_name, resolve_device
from benchmarks.errors import BenchmarkError, fail
from benchmarks.results import Row
from benchmarks.workloads import DTYPES, SUITES, Workload, workloads

CONSOLE = Console(width=None if sys.stdout.isatty() else 150)
warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")  # by us, on purpose


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message)


def main(argv: list[str] | None = None) -> int:
    """0 when everything measured was also right, 1 when something was not, 2 for a request that makes no sense."""
    arguments = _parse(argv)
    start = time.monotonic()
    try:
        right = _run(arguments)
    except BenchmarkError as error:
        fail(str(error))
    CONSOLE.print(f"{time.monotonic() - start:.0f} s")
    return 0 if right else 1


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "suite", nargs="?", default="all", choices=[*SUITES, "traffic", "train", "report", "all"],
        help="what to measure (default: all, which is models, mlp, traffic and report)",
    )  # fmt: skip
    parser.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    parser.add_argument("--provider", action="append", help=f"one of: {', '.join(providers.PROVIDERS)}; repeatable")
    parser.add_argument("--dtype", help=f"one of: {', '.join(DTYPES)}")
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="folder for rows and plots")
    parser.add_argument("--seconds", type=float, default=300, help="begin nothing new of a timed suite after so long")
    parser.add_argument("--interpreted-steps", type=int, default=40, help="train: steps with interpreted kernels")
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> bool:
    device = resolve_device(arguments.device)
    chosen = providers.select(arguments.provider)
    timed = {suite: workloads(suite, device, arguments.dtype) for suite in SUITES}
    if arguments.interpreted_steps < 0:
        raise BenchmarkError(f"--interpreted-steps must not be negative, got {arguments.interpreted_steps}")
    folder: Path = arguments.results
    right = True
    for suite, found in timed.items():
        if arguments.suite in (suite, "all"):
            right &= _timings(suite, folder / folder_name(device), device, chosen, found, arguments.seconds)
    if arguments.suite in ("traffic", "all"):
        right &= _traffic(folder / "cpu")
    if arguments.suite == "train":
        right &= _train(folder / "cpu", arguments.interpreted_steps)
    if folder.resolve() == results.RESULTS:
        report.update()
        CONSOLE.print("The README's tables and the plots are up to date with the rows.")
    else:
        report.draw(folder)
    return right


def _timings(
    suite: str,
    folder: Path,
    device: torch.device,
    chosen: list[providers.Provider],
    found: list[Workload],
    limit: float,
) -> bool:
    path = folder / f"{suite}.jsonl"
    measured = results.recorded(path, timing_suite.run(suite, device, chosen, found, seconds_limit=limit))
    rows = _collect(suite, measured, timing_suite.count(chosen, found))
    if device.type == "cpu":
        CONSOLE.print(
            "[bold]These are not GPU timings:[/] reduced size, and on a CPU fusedres takes its reference path, "
            "so about 1.0x is expected."
        )
    table = Table("workload", "mode", "batch", "dtype", "provider", "ms", "quartiles", "samples/s", "speedup", "check")
    for row in rows:
        figures = {k: "" if v is None else f"{v:.4g}" for k, v in row.figures.items()}
        table.add_row(
            row.workload, row.mode, str(row.shape[0]), row.dtype, row.provider, figures.get("ms", ""),
            f"{figures.get('ms_q1', '')}-{figures.get('ms_q3', '')}", figures.get("samples_per_s", ""),
            figures.get("speedup", ""), row.status + (f": {row.note}" if row.note else ""),
        )  # fmt: skip
    return _show(path, rows, table)


def _traffic(folder: Path) -> bool:
    total = len(traffic_suite.CASES) * len(traffic_suite.PHASES)
    rows = _collect("traffic", traffic_suite.run(), total)
    rows.sort(key=traffic_suite.position)
    table = Table("function", "shape", "layout", "phase", "launches", "moved", "budget", "ATen", "vectors", "check")
    for row in rows:
        table.add_row(
            row.workload, "x".join(map(str, row.shape)), row.layout, row.mode, f"{row.figures['launches']:.0f}",
            *report.moved(row), f"{100 * (row.figures['vector_share'] or 0):.1f}%", row.status,
        )  # fmt: skip
    path = folder / "traffic.jsonl"
    results.write(path, rows)
    return _show(path, rows, table)


def _train(folder: Path, interpreted_steps: int) -> bool:
    total = 5 + bool(interpreted_steps)
    curves: dict[str, list[float]] = {}
    rows = []
    with _progress() as progress:
        task = progress.add_task("train", total=total)
        for row, curve in train_suite.run(interpreted_steps):
            rows.append(row)
            if row.figures["accuracy"] is not None:
                curves[row.provider] = curve.losses
            progress.advance(task)
    plots.curves(curves, folder / "train.png")
    table = Table("run", "path", "steps", "final loss", "held-out accuracy", "furthest from eager", "allowed", "check")
    for row in rows:
        figures = {k: "" if v is None else f"{v:.4g}" for k, v in row.figures.items()}
        names = ("steps", "loss", "accuracy", "difference", "allowed")
        table.add_row(row.provider, row.layout, *(figures[name] for name in names), row.status)
    path = folder / "train.jsonl"
    results.write(path, rows)
    return _show(path, rows, table)


def _collect(name: str, rows: Iterable[Row], total: int) -> list[Row]:
    collected = []
    with _progress() as progress:
        task = progress.add_task(name, total=total)
        for row in rows:
            collected.append(row)
            progress.update(task, advance=1, description=f"{name}: {row.workload} {row.mode}")
    return collected


def _progress() -> Progress:
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=CONSOLE)


def _show(path: Path, rows: list[Row], table: Table) -> bool:
    CONSOLE.print(table)
    CONSOLE.print(f"rows: {path}", soft_wrap=True)
    return all(row.status in ("ok", "OOM", "not measured") for row in rows)


if __name__ == "__main__":
    raise SystemExit(main())
