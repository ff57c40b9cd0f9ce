"""Functions run where kernels are compiled: in one other process a session, as in this one they may be interpreted."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from benchmarks.workers import COMPILED, variables

T = TypeVar("T")


def compiled(function: Callable[..., T], *arguments: object) -> T:
    """What ``function`` of a module returns there."""
    return _process().submit(function, *arguments).result()


@functools.cache
def _process() -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with variables(COMPILED):  # which the process inherits as it starts
        pool.submit(int).result()
    return pool
