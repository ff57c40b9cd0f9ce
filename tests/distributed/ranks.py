"""Run functions on two ranks, each a process of its own on the CPU, and get back what they return."""

from __future__ import annotations

import datetime
import functools
import io
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANKS = 2
TIMEOUT = datetime.timedelta(seconds=120)  # of a collective that the other rank does not reach


def run_ranks(function: Callable[[int], Any]) -> list[Any]:
    """What ``function(rank)`` returned on each rank; a function of a module, which the ranks import.

    Raises:
        Exception: what a rank raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        jobs = [_processes().submit(_rank, rank, function, folder) for rank in range(RANKS)]
        return [torch.load(io.BytesIO(job.result()), weights_only=False) for job in jobs]


@functools.cache
def _processes() -> ProcessPoolExecutor:
    """Kept for the session: most of a short run is the import of PyTorch."""
    return ProcessPoolExecutor(RANKS, multiprocessing.get_context("spawn"), _prepare)


def _prepare() -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # also where there is a GPU: the ranks are on the CPU
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)


def _rank(rank: int, function: Callable[[int], Any], folder: str) -> bytes:
    """In one of the processes; the other cannot take both ranks, since the first waits for the second."""
    from benchmarks.instruments.interpreter import fast_interpreter

    torch._dynamo.reset()
    store = dist.FileStore(str(Path(folder) / "store"), RANKS)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=TIMEOUT)
    try:
        with fast_interpreter():
            result = io.BytesIO()
            torch.save(function(rank), result)
    finally:
        dist.destroy_process_group()
    return result.getvalue()
