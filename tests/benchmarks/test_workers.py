"""Cases in processes of their own: their environment, what is out of time, and what fails."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest

from benchmarks.errors import BenchmarkError
from benchmarks.results import Key, Row
from benchmarks.workers import apart, spread

NAME = "FUSEDRES_TEST_WORKERS"


@dataclass(frozen=True)
class Case:
    workload: str

    @property
    def keys(self) -> list[Key]:
        return [(self.workload, mode, "fusedres", (2,), "float32", "rows") for mode in ("forward", "backward")]


def work(case: Case) -> list[Row]:
    if case.workload == "broken":
        raise ZeroDivisionError("no such thing")
    note = os.environ.get(NAME, "unset")
    return [Row("s", w, m, p, list(shape), d, layout, note=note) for w, m, p, shape, d, layout in case.keys]


def test_rows_come_from_processes_with_their_own_environment() -> None:
    cases = [Case("a"), Case("b")]
    rows = list(spread("s", work, cases, {NAME: "1"}, 600))
    assert {row.key for row in rows} == {key for case in cases for key in case.keys}
    assert {row.note for row in rows} == {"1"}
    assert NAME not in os.environ


def test_what_is_out_of_time_says_so() -> None:
    cases = [Case(str(number)) for number in range(40)]
    rows = list(spread("s", work, cases, {}, 0))
    assert {row.key for row in rows} == {key for case in cases for key in case.keys}
    assert {(row.status, row.note) for row in rows} == {("ok", "unset"), ("not measured", "out of time")}


def test_a_failure_is_one_line() -> None:
    with pytest.raises(BenchmarkError, match="ZeroDivisionError: no such thing"):
        list(spread("s", work, [Case("broken")], {}, 600))
    with pytest.raises(BenchmarkError, match="ZeroDivisionError"):
        apart(work, {}, Case("broken"))
    assert list(spread("s", work, [], {}, 600)) == []
