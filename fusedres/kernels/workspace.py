"""Arrival counters of the reductions, zero between launches, and where kernels are launched."""

from __future__ import annotations

import contextlib
import functools
import itertools
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fusedres.kernels.tiling import MAX_CHANNEL_TILES

COUNTERS = MAX_CHANNEL_TILES + 1  # one for every channel tile, and one for the launch
STREAMS = 64  # streams of a device that have counters of their own; further ones pay a memset a launch

_slots: dict[tuple[torch.device, int], int] = {}
_HERE = contextlib.nullcontext()
_next_slot = itertools.count()  # one draw a stream, also when threads ask at once


def counters(device: torch.device) -> Tensor:
    """``COUNTERS`` zero integers that no other launch uses at the same time.

    Every stream has its own and reuses them: launches on a stream follow each other and leave the counters at zero.
    While a CUDA graph is captured each launch gets fresh ones, zeroed at every replay, because two replays may
    overlap; they belong to the graph and are not kept.
    """
    if device.type == "cpu" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    key = (device, torch._C._cuda_getCurrentRawStream(device.index))
    slot = _slots.get(key)
    if slot is None:
        slot = _slots.setdefault(key, min(next(_next_slot), STREAMS))
    if slot == STREAMS:
        return torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return reserve(device)[slot]


@functools.cache
def reserve(device: torch.device) -> tuple[Tensor, ...]:
    """Allocate the counters of a GPU, once; also called while tracing for it, by the operators' fakes.

    The first run of a compiled function may be inside a memory pool of a CUDA graph, where nothing may be kept.
    """
    with _disable_current_modes():
        slab = torch.zeros((STREAMS, COUNTERS), dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()  # other streams use it without waiting for this one
        return slab.unbind()


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of the device; interpreted kernels are tiled as for an H100."""
    return 132 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def warp_size(device: torch.device) -> int:
    """Threads of a warp: 64 on AMD's accelerators, 32 elsewhere."""
    return 64 if device.type != "cpu" and torch.version.hip else 32


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes ``device`` current for a launch; Triton launches on the current one."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)
