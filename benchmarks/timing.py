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


def train_step(instance: Instance, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Step:
    """Forward, cross-entropy, backward and an SGD step; 16-bit dtypes run under autocast."""
    images = images.to(memory_format=instance.memory_format)

    def step() -> None:
        instance.module.train()
        instance.optimizer.zero_grad(set_to_none=True)
        with autocast(images.device, dtype):
            loss = F.cross_entropy(instance.call(images), labels)
        loss.backward()
        instance.optimizer.step()

    return step


def inference_step(instance: Instance, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Step:
    """Forward in evaluation mode without gradients."""
    del labels
    images = images.to(memory_format=instance.memory_format)

    def step() -> None:
        instance.module.eval()
        with torch.no_grad(), autocast(images.device, dtype):
            instance.call(images)

    return step


STEPS = {"training": train_step, "inference": inference_step}


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


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
