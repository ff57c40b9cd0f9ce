"""Steps to time, and how: interleaved, warm, inputs in rotation, medians with quartiles and intervals."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.providers import Instance

Mark = Callable[[], None]
Step = Callable[[int, Mark], object]  # of a turn, which picks the inputs; marks the end of its parts
RESAMPLES = 1000
LONG = 20  # milliseconds of a step that what ran before it hardly changes
SETTLED = 2e-3  # seconds after which a step on a CPU follows itself
WAIT_CYCLES = 2_000_000  # about a millisecond


@dataclass(frozen=True)
class Batch:
    """Inputs of a module, and its labels or the cotangents of its outputs."""

    inputs: tuple[Tensor, ...]
    target: Tensor | tuple[Tensor, ...]
    _forms: dict[torch.memory_format, Batch] = field(default_factory=dict, repr=False, compare=False)

    def formatted(self, memory_format: torch.memory_format) -> Batch:
        """With images in ``memory_format``, cotangents too.

        One copy for all that ask: where in memory a copy lies was seen to change a step's time by 5%.
        """
        if memory_format not in self._forms:
            target = self.target if isinstance(self.target, Tensor) else _formatted(self.target, memory_format)
            self._forms[memory_format] = Batch(_formatted(self.inputs, memory_format), target)
        return self._forms[memory_format]


def _formatted(tensors: tuple[Tensor, ...], memory_format: torch.memory_format) -> tuple[Tensor, ...]:
    return tuple(t.contiguous(memory_format=memory_format) if t.dim() == 4 else t for t in tensors)


def train_step(instance: Instance, batches: Sequence[Batch], dtype: torch.dtype) -> Step:
    """Of labels: forward, cross-entropy, backward and an SGD step; of cotangents: forward and backward.

    Marks the end of the forward, loss included, and of the backward.
    """
    own = [batch.formatted(instance.memory_format) for batch in batches]
    if not isinstance(own[0].target, Tensor):
        return _gradient_step(instance, own, dtype)

    def step(turn: int, mark: Mark) -> None:
        batch = own[turn % len(own)]
        _set_mode(instance.module, training=True)
        instance.optimizer.zero_grad(set_to_none=True)
        with autocast(batch.inputs[0], dtype):
            loss = F.cross_entropy(instance.call(*batch.inputs), batch.target)  # pyright: ignore[reportArgumentType]
        mark()
        loss.backward()
        mark()
        instance.optimizer.step()

    return step


def _gradient_step(instance: Instance, batches: list[Batch], dtype: torch.dtype) -> Step:
    parameters = list(instance.module.parameters())
    own = [Batch(tuple(x.detach().requires_grad_() for x in batch.inputs), tuple(batch.target)) for batch in batches]

    def step(turn: int, mark: Mark) -> None:
        batch = own[turn % len(own)]
        _set_mode(instance.module, training=True)
        with autocast(batch.inputs[0], dtype):
            outputs = as_tuple(instance.call(*batch.inputs))
        mark()
        torch.autograd.grad(outputs, [*batch.inputs, *parameters], batch.target)
        mark()

    return step


def inference_step(instance: Instance, batches: Sequence[Batch], dtype: torch.dtype) -> Step:
    """Forward in evaluation mode without gradients; marks nothing."""
    own = [batch.formatted(instance.memory_format).inputs for batch in batches]

    def step(turn: int, mark: Mark) -> None:
        del mark
        inputs = own[turn % len(own)]
        _set_mode(instance.module, training=False)
        with torch.no_grad(), autocast(inputs[0], dtype):
            instance.call(*inputs)

    return step


def _set_mode(module: nn.Module, *, training: bool) -> None:
    """Where it is another one: to set it anew takes the host's time, and makes Dynamo check its guards the long way."""
    if module.training != training:
        module.train(training)


STEPS = {"training": train_step, "inference": inference_step}


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def autocast(x: Tensor, dtype: torch.dtype) -> torch.autocast:
    """Autocast to ``dtype``, unless the input already has it: then the whole module does."""
    return torch.autocast(x.device.type, dtype=dtype, enabled=x.dtype != dtype)


def input_sets(size: int, device: torch.device) -> int:
    """How many inputs of ``size`` bytes to rotate, so that the L2 cache holds none of them when its turn comes.

    At most 64: what is smaller than that is in the cache inside of a network, too.
    """
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(64, -(-2 * cache // max(size, 1))))


class Stopwatch:
    """Milliseconds between its marks: by CUDA events on a GPU, by the wall clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.device.type != "cuda":
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def laps(self) -> list[float]:
        synchronize(self.device)
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.device.type != "cuda":
            return [1e3 * (stop - start) for start, stop in pairs]
        return [start.elapsed_time(stop) for start, stop in pairs]


def laps(step: Step, turn: int, device: torch.device, *, queued: bool = False) -> list[float]:
    """Milliseconds of the parts of one step, which starts on an idle device.

    Args:
        queued: keep a GPU busy until the host has queued the step, so that it is the GPU's time alone.
    """
    watch = Stopwatch(device)
    synchronize(device)
    if queued and device.type == "cuda":
        torch.cuda._sleep(WAIT_CYCLES)
    watch.mark()
    step(turn, watch.mark)
    watch.mark()
    return watch.laps()


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of one call, on a GPU without that of the host, which launches it."""
    [lap] = laps(lambda turn, mark: call(), 0, device, queued=True)
    return lap


def seconds(step: Step, device: torch.device) -> float:
    """Wall time of one step, with the device idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    step(0, _no_mark)
    synchronize(device)
    return time.perf_counter() - start


def _no_mark() -> None:
    pass


def warm_up(steps: Mapping[str, Step], device: torch.device, limit: float) -> float:
    """Run all steps in turn for ``limit`` seconds, at least three times; the seconds that a last round took."""
    start, rounds, last = time.perf_counter(), 0, 0.0
    while rounds < 3 or time.perf_counter() - start < limit:
        last = sum(seconds(step, device) for step in steps.values())
        rounds += 1
    return last


def interleave(
    steps: Mapping[str, Step], device: torch.device, rounds: int, *, queued: bool = False
) -> dict[str, list[list[float]]]:
    """Milliseconds of the parts of each step, one call of each a round.

    Every round starts with another one, and goes through them forwards or backwards in turn: what ran right before a
    step leaves it the caches and the heap. Each call has the inputs behind those of the call before it, whosever that
    was: the L2 cache would still hold them.
    On a CPU a step follows itself, as it does in a training loop: code that several of the steps share is in the
    processor's caches, and what only one of them runs would be the slower for it.
    """
    names = list(steps)
    samples: dict[str, list[list[float]]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn // 2 % len(names)
        order = names[first:] + names[:first]
        for place, name in enumerate(reversed(order) if turn % 2 else order):
            call = turn * len(names) + place
            if device.type == "cpu" and (not samples[name] or sum(samples[name][-1]) < LONG):
                _again(steps[name], call)
            samples[name].append(laps(steps[name], call, device, queued=queued))
    return samples


def _again(step: Step, call: int) -> None:
    start = time.perf_counter()
    while True:
        step(call - 1, _no_mark)
        if time.perf_counter() - start >= SETTLED:
            return


def host_microseconds(step: Step, device: torch.device, calls: int = 20) -> float | None:
    """Median time the host takes to queue one step while the GPU is busy; ``None`` on a CPU, where it is all one."""
    if device.type != "cuda":
        return None
    samples = []
    for turn in range(calls):
        synchronize(device)
        torch.cuda._sleep(WAIT_CYCLES)
        start = time.perf_counter()
        step(turn, _no_mark)
        samples.append(1e6 * (time.perf_counter() - start))
    synchronize(device)
    return round(statistics.median(samples), 1)


def summary(samples: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """Median and quartiles of whole steps; medians of forward and backward, where they were marked."""
    low, median, high = statistics.quantiles([sum(parts) for parts in samples], n=4, method="inclusive")
    marked = len(samples[0]) == 3
    forward, backward = (statistics.median(parts[i] for parts in samples) if marked else None for i in range(2))
    figures = {"ms": median, "ms_q1": low, "ms_q3": high, "forward_ms": forward, "backward_ms": backward}
    return {name: None if value is None else round(value, 5) for name, value in figures.items()}


def speedup(baseline: Sequence[Sequence[float]], samples: Sequence[Sequence[float]]) -> dict[str, float]:
    """Ratio of medians, and its 95% interval by a bootstrap over the rounds (Efron 1979), which pairs the two."""
    ours, theirs = (np.array([sum(parts) for parts in rows]) for rows in (samples, baseline))
    rounds = np.random.default_rng(0).integers(len(ours), size=(RESAMPLES, len(ours)))
    ratios = np.median(theirs[rounds], axis=1) / np.median(ours[rounds], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    ratio = float(np.median(theirs) / np.median(ours))
    return {name: round(float(value), 4) for name, value in
            (("speedup", ratio), ("speedup_low", low), ("speedup_high", high))}  # fmt: skip


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
