"""Steps to time, and how: interleaved, warm, medians with quartiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.providers import Instance

Step = Callable[[], object]


def train_step(instance: Instance, x: Tensor, target: Tensor, dtype: torch.dtype) -> Step:
    """Of labels: forward, cross-entropy, backward and an SGD step; of a cotangent: forward and backward."""
    x = x.contiguous(memory_format=instance.memory_format)
    if target.is_floating_point():
        return _gradient_step(instance, x.detach().requires_grad_(), target, dtype)

    def step() -> None:
        instance.module.train()
        instance.optimizer.zero_grad(set_to_none=True)
        with autocast(x, dtype):
            loss = F.cross_entropy(instance.call(x), target)
        loss.backward()
        instance.optimizer.step()

    return step


def _gradient_step(instance: Instance, x: Tensor, cotangent: Tensor, dtype: torch.dtype) -> Step:
    leaves = [x, *instance.module.parameters()]

    def step() -> None:
        instance.module.train()
        with autocast(x, dtype):
            y = instance.call(x)
        torch.autograd.grad(y, leaves, cotangent)

    return step


def inference_step(instance: Instance, x: Tensor, target: Tensor, dtype: torch.dtype) -> Step:
    """Forward in evaluation mode without gradients."""
    del target
    x = x.contiguous(memory_format=instance.memory_format)

    def step() -> None:
        instance.module.eval()
        with torch.no_grad(), autocast(x, dtype):
            instance.call(x)

    return step


STEPS = {"training": train_step, "inference": inference_step}


def autocast(x: Tensor, dtype: torch.dtype) -> torch.autocast:
    """Autocast to ``dtype``, unless the input already has it: then the whole module does."""
    return torch.autocast(x.device.type, dtype=dtype, enabled=x.dtype != dtype)


def seconds(step: Step, device: torch.device) -> float:
    """Wall time of one call, with the device idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def milliseconds(step: Step, device: torch.device) -> float:
    """Time of one call: CUDA events on a GPU, the wall clock elsewhere."""
    if device.type != "cuda":
        return 1e3 * seconds(step, device)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop)


def interleave(steps: Mapping[str, Step], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each step, one call of each a round; every round starts with another one."""
    names = list(steps)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(milliseconds(steps[name], device))
    return samples


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"ms": round(median, 4), "ms_q1": round(low, 4), "ms_q3": round(high, 4)}


def peak_memory_mib(step: Step, device: torch.device) -> float | None:
    """Peak of what one step allocates on top of what was there before it; ``None`` on a CPU."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    seconds(step, device)
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
