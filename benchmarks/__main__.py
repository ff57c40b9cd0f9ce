"""``python -m benchmarks [SUITE]``; without a word, all but train."""

from __future__ import annotations

import os

if __name__ == "__main__":  # not in workers, which may interpret kernels
    os.environ.pop("TRITON_INTERPRET", None)

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import NoReturn, TypeVar

from rich.console import Console

from benchmarks import providers, results
from benchmarks.environment import resolve_device
from benchmarks.errors import BenchmarkError, fail
from benchmarks.reporting import preferences
from benchmarks.suite import Request, drive
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
    start = time.monotonic()
    try:
        right = _run(arguments)
    except BenchmarkError as error:
        fail(str(error))
    except KeyboardInterrupt:
        CONSOLE.print("Interrupted. What was measured is saved; the same command goes on from there.")
        return 130
    CONSOLE.print(f"{time.monotonic() - start:.0f} s")
    return 0 if right else 1


def _parse(argv: list[str] | None) -> argparse.Namespace:
    lines = [f"  {suite.name:14} {suite.summary}" for suite in SUITES.values()]
    lines += ["  report         the README's tables, the plots and a page of everything, from the rows"]
    lines += ["  prefer         the package's table of where PyTorch's own kernels are faster, from a GPU's rows"]
    lines += [f"  all            {', '.join(ALL)}, report"]
    parser = _Parser(
        prog="python -m benchmarks", description=__doc__, epilog="suites:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    several = {"action": "append", "default": None}
    choices = [*SUITES, "report", "prefer", "all"]
    parser.add_argument("suite", nargs="?", default="all", choices=choices, metavar="SUITE")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    parser.add_argument("--provider", **several, help=f"repeatable; one of: {', '.join(providers.PROVIDERS)}")
    parser.add_argument("--workload", **several, help="repeatable; by its name in the tables")
    parser.add_argument("--dtype", **several, help=f"repeatable; one of: {', '.join(DTYPES)}")
    parser.add_argument("--batch", **several, type=int, help="repeatable; batch size, or rows of a layer")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="the most telling part (default on a CPU)")
    size.add_argument("--full", action="store_true", help="everything (default on a GPU)")
    parser.add_argument(
        "--output", type=Path, default=results.RESULTS, help="folder of rows; report and all draw there"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what this code has measured here before")
    parser.add_argument("--seconds", type=float, default=300, help="begin nothing new of a timed suite after so long")
    parser.add_argument("--interpreted-steps", type=int, default=40, help="train: steps with interpreted kernels")
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> bool:
    if arguments.suite == "prefer":
        for device, found in preferences.write(arguments.output).items():
            sizes = [speed for points in found["speed"].values() for *_, speed in points]
            CONSOLE.print(f"{device}: PyTorch's own at {sum(s < 1 for s in sizes)} of {len(sizes)} sizes")
        return True
    request = _request(arguments)
    names = {"all": ALL, "report": ()}.get(arguments.suite, (arguments.suite,))
    plans = {name: SUITES[name].plan(request) for name in names}
    known = {case.workload for cases in plans.values() for case in cases}
    for name in request.workloads or ():
        if plans and name not in known:
            raise BenchmarkError(f"unknown workload {name!r}; choose from {', '.join(sorted(known))}")
    if plans and not known:
        raise BenchmarkError(f"{arguments.suite} measures nothing of that kind; see benchmarks/README.md")
    right = True
    for name, cases in plans.items():
        chosen = [case for case in cases if request.workloads is None or case.workload in request.workloads]
        rows = drive(SUITES[name], request, chosen, CONSOLE)
        right &= all(row.status not in ("WRONG", "failed") for row in rows)
    if request.folder.resolve() == results.RESULTS:
        from benchmarks.reporting import readme  # needs matplotlib, which a machine that measures may not have

        readme.update()
        CONSOLE.print("The README's tables and the plots are up to date with the rows.")
    elif arguments.suite in ("report", "all"):
        from benchmarks.reporting import readme

        readme.draw(request.folder)
    return right


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
