"""Run a function on some ranks, each a process of its own on the CPU, and get back what they return."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
TIMEOUT = datetime.timedelta(seconds=120)  # of a collective that another rank does not reach


def run_ranks(function: Callable[[int], Any], ranks: int = RANKS) -> list[Any]:
    """What ``function(rank)`` returned on each rank; a function of a module, which the ranks import.

    Raises:
        ProcessRaisedException: a rank failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (function, folder, ranks), ranks)  # pyright: ignore[reportPrivateImportUsage]
        return [torch.load(_result(folder, rank), weights_only=False) for rank in range(ranks)]


def _rank(rank: int, function: Callable[[int], Any], folder: str, ranks: int) -> None:
    from benchmarks.instruments.interpreter import fast_interpreter

    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    store = dist.FileStore(str(Path(folder) / "store"), ranks)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    with fast_interpreter():
        torch.save(function(rank), _result(folder, rank))
    dist.destroy_process_group()


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"result-{rank}"
