"""``python -m benchmarks [SUITE]``; without a word, the quick part of most suites and one screen of what came out."""

from __future__ import annotations

import os

from benchmarks.extras import need

if __name__ == "__main__":  # not in workers, which may interpret kernels
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes about itself otherwise
    need("torch", "numpy", "rich")

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import NoReturn, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import providers, results
from benchmarks.environment import resolve_device
from benchmarks.errors import BenchmarkError, fail
from benchmarks.suite import Case, Request, drive
from benchmarks.suites import ALL, SUITES
from benchmarks.workloads import DTYPES

T = TypeVar("T")
CONSOLE = Console(width=None if sys.stdout.isatty() else 170)
warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")  # by us, on purpose


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message)


def main(argv: list[str] | None = None) -> int:
    """0 when everything measured was also right, 1 when something was not, 2 for a request that makes no sense."""
    arguments = _parse(argv)
    try:
        right = _run(arguments)
    except OSError as error:
        fail(f"{error.filename or arguments.output}: {error.strerror or error}; choose a folder with --output FOLDER")
    except BenchmarkError as error:
        fail(str(error))
    except KeyboardInterrupt:
        kept = f"What was measured is kept in {arguments.output}"
        CONSOLE.print(f"Interrupted. {kept}; the same command goes on from there.", soft_wrap=True)
        return 130
    return 0 if right else 1


def _parse(argv: list[str] | None) -> argparse.Namespace:
    lines = [f"  {suite.name:14} {suite.summary}" for suite in SUITES.values()]
    lines += ["  report         plots and a page of everything, from the rows of --output"]
    lines += [f"  all            {', '.join(ALL)}, report: the default"]
    parser = _Parser(
        prog="python -m benchmarks", description=__doc__, epilog="suites:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    several = {"action": "append", "default": None}
    choices = [*SUITES, "report", "all"]
    parser.add_argument("suite", nargs="?", default="all", choices=choices, metavar="SUITE")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    parser.add_argument("--provider", **several, help=f"repeatable; one of: {', '.join(providers.PROVIDERS)}")
    parser.add_argument("--workload", **several, help="repeatable; by its name in the tables")
    parser.add_argument("--dtype", **several, help=f"repeatable; one of: {', '.join(DTYPES)}")
    parser.add_argument("--batch", **several, type=int, help="repeatable; batch size, or rows of a layer")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="the most telling part (default on a CPU)")
    size.add_argument("--full", action="store_true", help="everything (default on a GPU)")
    parser.add_argument("--output", type=Path, default=results.OURS, help="folder of rows; report and all draw there")
    parser.add_argument("--tables", action="store_true", help="all: each suite's table, as a suite by its name shows")
    parser.add_argument("--publish", action="store_true", help="report: into benchmarks/results and the README too")
    parser.add_argument("--fresh", action="store_true", help="measure again what this code has measured here before")
    parser.add_argument("--seconds", type=float, default=300, help="begin nothing new of a timed suite after so long")
    parser.add_argument("--interpreted-steps", type=int, default=40, help="train: steps with interpreted kernels")
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> bool:
    if arguments.publish and arguments.suite != "report":
        raise BenchmarkError("--publish goes with report; run: python -m benchmarks report --publish")
    drawn = arguments.suite in ("all", "report")
    if arguments.suite == "train":
        need("sklearn", extra="train")
    if drawn:
        need("matplotlib", "jinja2")  # which a machine that measures may not have
    if arguments.suite == "report":
        _writable(arguments.output)
    start = time.monotonic()
    right = arguments.suite == "report" or _measure(arguments, _request(arguments))
    if drawn:
        from benchmarks.reporting import headline, publish
        from benchmarks.reporting.report import load

        publish.draw(arguments.output)
        page = arguments.output.resolve() / publish.PAGE
        headline.show(load(arguments.output), CONSOLE, page.as_uri(), time.monotonic() - start)
        if arguments.publish:
            publish.publish(arguments.output)
            CONSOLE.print("Published: benchmarks/results, benchmarks/RESULTS.md and the README's table.")
    return right


def _measure(arguments: argparse.Namespace, request: Request) -> bool:
    """Whether everything measured was also right."""
    with Progress(
        TextColumn("{task.description:44.44}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"), TimeElapsedColumn(),
        console=CONSOLE, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task("planning", total=None)
        plans = _plans(arguments, request)
        _writable(request.folder)
        progress.update(task, total=sum(len(case.keys) for cases in plans.values() for case in cases))

        def step(text: str, count: int) -> None:
            progress.update(task, description=text, advance=count)

        found = {name: drive(SUITES[name], request, cases, step) for name, cases in plans.items()}
    for name, rows in found.items():
        if rows and (arguments.tables or arguments.suite == name):
            CONSOLE.print(SUITES[name].table(rows))
            CONSOLE.print(f"rows: {SUITES[name].path(request)}", soft_wrap=True)
    return all(row.status not in ("WRONG", "failed") for rows in found.values() for row in rows)


def _plans(arguments: argparse.Namespace, request: Request) -> dict[str, list[Case]]:
    names = ALL if arguments.suite == "all" else (arguments.suite,)
    plans = {name: SUITES[name].plan(request) for name in names}
    known = {case.workload for cases in plans.values() for case in cases}
    for name in request.workloads or ():
        if name not in known:
            raise BenchmarkError(f"unknown workload {name!r}; choose from {', '.join(sorted(known))}")
    if not known:
        raise BenchmarkError(f"{arguments.suite} measures nothing of that kind; see benchmarks/README.md")
    chosen = request.workloads or known
    return {name: [case for case in cases if case.workload in chosen] for name, cases in plans.items()}


def _writable(folder: Path) -> None:
    """Before anything is measured.

    Raises:
        BenchmarkError: nothing can be saved there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BenchmarkError(f"cannot write to {folder}: {error.strerror}; choose another by --output FOLDER") from None


def _request(arguments: argparse.Namespace) -> Request:
    device = resolve_device(arguments.device)
    if arguments.interpreted_steps < 0:
        raise BenchmarkError(f"--interpreted-steps must not be negative, got {arguments.interpreted_steps}")
    for batch in arguments.batch or ():
        if batch < 1:
            raise BenchmarkError(f"--batch must be positive, got {batch}")
    for dtype in arguments.dtype or ():
        if dtype not in DTYPES:
            raise BenchmarkError(f"unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    providers.select(arguments.provider, device)

    def once(values: list[T] | None) -> tuple[T, ...] | None:
        return None if values is None else tuple(dict.fromkeys(values))

    return Request(
        device, arguments.output, once(arguments.dtype), once(arguments.batch), once(arguments.provider),
        once(arguments.workload), arguments.quick or (device.type == "cpu" and not arguments.full),
        arguments.seconds, arguments.fresh, interpreted_steps=arguments.interpreted_steps,
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
