"""Run a function on two ranks, each a process of its own on the CPU, and get back what they return."""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
TIMEOUT = datetime.timedelta(seconds=120)  # of a collective that the other rank does not reach


def run_ranks(function: Callable[[int], Any]) -> list[Any]:
    """What ``function(rank)`` returned on each rank; a function of a module, which the ranks import.

    Raises:
        ProcessRaisedException: a rank failed.
    """
    # Interpreted also where there is a GPU: the ranks are on the CPU.
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        mp.spawn(_rank, (function, folder), RANKS)  # pyright: ignore[reportPrivateImportUsage]
        return [torch.load(_result(folder, rank), weights_only=False) for rank in range(RANKS)]


def _rank(rank: int, function: Callable[[int], Any], folder: str) -> None:
    from benchmarks.instruments.interpreter import fast_interpreter

    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    store = dist.FileStore(str(Path(folder) / "store"), RANKS)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=TIMEOUT)
    with fast_interpreter():
        torch.save(function(rank), _result(folder, rank))
    dist.destroy_process_group()


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"result-{rank}"
