"""What a suite is, what may be asked of one, and how its rows come to be: measured once, saved as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.table import Table

from benchmarks import results
from benchmarks.environment import describe, folder_name
from benchmarks.results import Key, Row

CPU = torch.device("cpu")
Step = Callable[[str, int], None]  # what is measured now, and how many rows came since


@dataclass(frozen=True)
class Request:
    """What was asked for; ``None`` is everything that is measured by default.

    Args:
        folder: where ``<device>/<suite>.jsonl`` goes.
        batches: in place of those that a workload is measured at.
        quick: the most telling part.
        seconds: begin nothing new of a suite after so long.
        fresh: measure again what is there.
        there: what need not be measured; a suite may still do so beside the rest of a case.
        interpreted_steps: of ``train``, with interpreted kernels.
    """

    device: torch.device
    folder: Path
    dtypes: tuple[str, ...] | None = None
    batches: tuple[int, ...] | None = None
    providers: tuple[str, ...] | None = None
    workloads: tuple[str, ...] | None = None
    quick: bool = True
    seconds: float = 300
    fresh: bool = False
    there: frozenset[Key] = frozenset()
    interpreted_steps: int = 40

    @property
    def whole(self) -> bool:
        """Whether nothing was left out by name."""
        return not (self.dtypes or self.batches or self.providers or self.workloads)


class Case(Protocol):
    """What is measured at once: its rows have to come from one run."""

    @property
    def workload(self) -> str: ...

    @property
    def keys(self) -> Sequence[Key]:
        """Of the rows that it becomes."""
        ...


@dataclass(frozen=True)
class Suite:
    """A kind of measurement.

    Args:
        plan: the cases of a request, most telling first; raises BenchmarkError where it makes no sense.
        run: measures cases; their rows, as they come. Of a case that is out of time, rows that say so.
        table: shows rows on a terminal.
        on_cpu: whether it is measured on the CPU also where there is a GPU.
    """

    name: str
    summary: str
    plan: Callable[[Request], Sequence[Any]]
    run: Callable[[Request, Sequence[Any]], Iterator[Row]]
    table: Callable[[Sequence[Row]], Table]
    on_cpu: bool = False

    def path(self, request: Request) -> Path:
        """The file of its rows."""
        return request.folder / folder_name(self.device(request)) / f"{self.name}.jsonl"

    def device(self, request: Request) -> torch.device:
        return CPU if self.on_cpu else request.device


def drive(suite: Suite, request: Request, cases: Sequence[Case], step: Step) -> list[Row]:
    """Measure those of ``cases`` that are not there yet and save every row as it comes; all rows of ``cases``."""
    path = suite.path(request)
    results.tidy(path)
    if not request.fresh:
        there = results.measured(results.read(path), describe(suite.device(request)))
        request = replace(request, there=frozenset(there))
    missing = [case for case in cases if not request.there.issuperset(case.keys)]
    step(suite.name, sum(len(case.keys) for case in cases) - sum(len(case.keys) for case in missing))
    unmeasured: dict[Key, Row] = {}
    for row in suite.run(request, missing):
        if row.status == "not measured":
            unmeasured[row.key] = row
        else:
            results.append(path, row)
        step(f"{suite.name}: {row.workload} {row.mode}", 1)
    keys = list(dict.fromkeys(key for case in cases for key in case.keys))
    results.tidy(path, keys if request.fresh and request.whole else None)
    rows = unmeasured | {row.key: row for row in results.read(path)}
    return [rows[key] for key in keys if key in rows]
