"""Scratch memory of the reductions: arrival counters, zero between launches, and partial results."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from fusedres.kernels.tiling import MAX_CHANNEL_TILES

COUNTERS = MAX_CHANNEL_TILES + 1

_workspaces: dict[tuple[int, int], Tensor] = {}


def workspace(device: torch.device, floats: int) -> Tensor:
    """A float32 tensor of ``COUNTERS`` zero counters and at least ``floats`` free elements behind them.

    One for every stream, reused: launches on a stream follow each other and leave the counters at zero. While
    a CUDA graph is captured the memory belongs to the graph, so that it gets its own, zeroed at every replay:
    two graphs, or a graph and its capturing stream, may run at once.
    """
    if device.type == "cpu" or torch.cuda.is_current_stream_capturing():
        return _new(device, floats)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    scratch = _workspaces.get(key)
    if scratch is None or scratch.numel() < COUNTERS + floats:
        scratch = _workspaces[key] = _new(device, max(floats, 1 << 18))
    return scratch


def _new(device: torch.device, floats: int) -> Tensor:
    scratch = torch.empty(COUNTERS + floats, dtype=torch.float32, device=device)
    scratch[:COUNTERS].zero_()
    return scratch


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of the device; interpreted kernels are tiled as for an H100."""
    return 132 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes ``device`` current for a launch; Triton launches on the current one."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
