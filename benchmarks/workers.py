"""Cases measured in processes of their own, one a core, whose environment is set before triton is imported there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from benchmarks.environment import describe
from benchmarks.errors import BenchmarkError
from benchmarks.results import Row
from benchmarks.suite import CPU, Case

MOST = 8
# One thread each, as there is a process a core.
INTERPRETED: dict[str, str | None] = {
    "TRITON_INTERPRET": "1", "FUSEDRES_BACKEND": "triton", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
}  # fmt: skip
COMPILED: dict[str, str | None] = {"TRITON_INTERPRET": None, "OMP_NUM_THREADS": "1"}
C = TypeVar("C", bound=Case)
T = TypeVar("T")


def spread(
    suite: str,
    work: Callable[[C], list[Row]],
    cases: Sequence[C],
    environment: Mapping[str, str | None],
    seconds: float,
) -> Iterator[Row]:
    """The rows that ``work`` makes of ``cases``, as they come; those not begun after ``seconds`` say so.

    Args:
        work: a function of a module, as it is found by its name in the other process.
        environment: variables to set; to remove where ``None``.

    Raises:
        BenchmarkError: a process failed; with the reason.
    """
    if not cases:
        return
    deadline = time.monotonic() + seconds
    pool = _pool(min(os.cpu_count() or 1, MOST, len(cases)))
    try:
        with variables(environment):  # which processes inherit as they start
            futures = {pool.submit(work, case): case for case in cases}
        for future in as_completed(futures):
            yield from _missing(suite, futures[future]) if future.cancelled() else _result(future)
            if time.monotonic() > deadline:
                for other in futures:
                    other.cancel()
    finally:
        pool.shutdown(cancel_futures=True)


def apart(function: Callable[..., T], environment: Mapping[str, str | None], *arguments: object) -> T:
    """What ``function`` returns in a process of its own.

    Raises:
        BenchmarkError: it failed; with the reason.
    """
    with _pool(1) as pool, variables(environment):
        return _result(pool.submit(function, *arguments))


def _pool(workers: int) -> ProcessPoolExecutor:
    quietly = (signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: the parent tells
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), signal.signal, quietly)


def _result(future: Future[T]) -> T:
    try:
        return future.result()
    except BrokenProcessPool:
        raise BenchmarkError("a process that measured ended early; out of memory?") from None
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        raise BenchmarkError(f"a process that measured failed: {type(error).__name__}: {reason[-1]}") from error


def _missing(suite: str, case: Case) -> list[Row]:
    return [
        Row(
            suite, workload, mode, provider, list(shape), dtype, layout, "not measured", note="out of time",
            environment=describe(CPU),
        )
        for workload, mode, provider, shape, dtype, layout in case.keys
    ]  # fmt: skip


@contextmanager
def variables(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Environment variables set meanwhile; removed where ``None``."""
    before = {name: os.environ.get(name) for name in changes}
    _apply(changes)
    try:
        yield
    finally:
        _apply(before)


def _apply(changes: Mapping[str, str | None]) -> None:
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
