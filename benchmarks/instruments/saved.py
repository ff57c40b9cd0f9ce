"""What a forward keeps for its backward: by autograd's account, and by the allocator's."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Saved:
    """Bytes.

    Args:
        saved: of the storages of tensors that autograd saved, each once, without those that are there anyway.
        alive: of what was allocated in the forward and is still there while only the graph is held. Tensors that were
            kept on a ``ctx`` or in a closure are a part of it, but not of ``saved``.
    """

    saved: int
    alive: int


def saved_for_backward(forward: Callable[[], Tensor], owned: Sequence[Tensor]) -> Saved:
    """Run ``forward``, which is warm, and measure what its output's graph holds.

    Args:
        owned: parameters, buffers and inputs, which are there whatever is saved; at least one.
    """
    known = {_address(tensor) for tensor in owned}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[_address(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    def run() -> object:
        with saved_tensors_hooks(note, lambda tensor: tensor):
            return forward().grad_fn

    alive = _allocated(run, owned[0].device)
    return Saved(sum(size for address, size in storages.items() if address not in known), alive)


def peak_bytes(step: Callable[[], object], device: torch.device) -> int | None:
    """Peak of what one warm step allocates on top of what was there before it; ``None`` on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _allocated(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that were allocated in ``run`` and are still there while its result is held.

    On a GPU its caching allocator rounds every tensor up to 512 bytes; on a CPU the profiler sees every allocation.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        held = run()
        gc.collect()
        allocated = torch.cuda.memory_allocated(device) - before
        del held
        return allocated
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        held = run()
        gc.collect()
    del held
    return sum(event.self_cpu_memory_usage for event in profiler.events() or ())


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
