"""Timings of models and layers, training and inference, every provider interleaved in one run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cached_property
from itertools import product

import torch
import torch.compiler.config
from torch import Tensor, nn

from benchmarks import parity
from benchmarks.environment import describe
from benchmarks.providers import Instance, Provider, instantiate
from benchmarks.results import Row
from benchmarks.timing import STEPS, Step, interleave, peak_memory_mib, seconds, summary
from benchmarks.workloads import DTYPES, Workload

CASE_SECONDS, MIN_ROUNDS, MAX_ROUNDS = 5.0, 10, 100
Case = tuple[str, int]  # mode and batch


def count(providers: list[Provider], chosen: list[Workload]) -> int:
    """How many rows :func:`run` yields."""
    return sum(len(STEPS) * len(workload.batches) * len(workload.entrants(providers)) for workload in chosen)


def run(
    suite: str, device: torch.device, providers: list[Provider], chosen: list[Workload], *, seconds_limit: float
) -> Iterator[Row]:
    """Measure; what was not begun after ``seconds_limit`` comes out as rows that say so."""
    if device.type == "cpu":
        torch.set_num_threads(1)  # more threads wait for each other wherever the machine has other work
    deadline = time.monotonic() + seconds_limit
    for workload in chosen:
        torch.compiler.reset()
        measurement = _Measurement(suite, workload, workload.entrants(providers), device)
        for batch in workload.batches:
            if time.monotonic() > deadline:
                yield from measurement.missing(batch)
                continue
            # Without caches the first step shows the compile time.
            with torch.compiler.config.patch(force_disable_caches=True):  # pyright: ignore[reportAttributeAccessIssue]
                yield from measurement.rows(batch)


class _Measurement:
    """One workload. Of each batch: first steps, the correctness check, then the timings."""

    def __init__(self, suite: str, workload: Workload, providers: list[Provider], device: torch.device) -> None:
        self.suite, self.workload, self.providers, self.device = suite, workload, providers, device
        self.dtype = DTYPES[workload.dtype]
        self.first: dict[tuple[str, int, str], float] = {}
        self.broken: dict[tuple[str, int, str], tuple[str, str]] = {}
        self.verdicts: dict[tuple[int, ...], dict[str, dict]] = {}

    def missing(self, batch: int) -> Iterator[Row]:
        for mode, provider in product(STEPS, self.providers):
            yield self._row((mode, batch), provider, "not measured", note="out of time")

    def rows(self, batch: int) -> Iterator[Row]:
        for mode in STEPS:
            self._first_steps((mode, batch))
        shape = self.workload.checked(batch)
        if shape not in self.verdicts:
            self.verdicts[shape] = self._check(shape)
        for mode in STEPS:
            yield from self._case((mode, batch), self.verdicts[shape])

    @cached_property
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.workload.build().to(self._input_dtype)

    @cached_property
    def instances(self) -> list[Instance]:
        return [
            instantiate(provider, self.model, self.device, channels_last=self.workload.channels_last)
            for provider in self.providers
        ]

    @property
    def _input_dtype(self) -> torch.dtype:
        return self.dtype if self.workload.layer else torch.float32

    def _first_steps(self, case: Case) -> None:
        for instance, step in zip(self.instances, self._steps(case, self.instances), strict=True):
            key = (*case, instance.provider.name)
            try:
                self.first[key] = seconds(step, self.device)
            except torch.OutOfMemoryError:
                self.broken[key] = ("OOM", "")
                instance.optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
            except Exception as error:  # a provider that cannot run is a result, not the end of the benchmark
                self.broken[key] = ("failed", f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")

    def _check(self, shape: tuple[int, ...]) -> dict[str, dict]:
        inputs = [self._input(shape, seed) for seed in range(1, parity.INPUTS + 1)]
        failed = {name for (_, _, name), (status, _) in self.broken.items() if status == "failed"}
        able = [i for i in self.instances if i.provider.name not in failed]
        return parity.check(
            able, self.model, inputs, self._target(shape[0]), self.dtype, channels_last=self.workload.channels_last
        )

    def _case(self, case: Case, verdicts: dict[str, dict]) -> Iterator[Row]:
        able = [i for i in self.instances if (*case, i.provider.name) not in self.broken]
        steps = dict(zip((i.provider.name for i in able), self._steps(case, able), strict=True))
        warm = [seconds(step, self.device) for _ in range(3) for step in steps.values()]
        rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(CASE_SECONDS / max(sum(warm[-len(steps) :]), 1e-9))))
        peaks = {name: peak_memory_mib(step, self.device) for name, step in steps.items()}
        samples = interleave(steps, self.device, rounds)
        figures = {name: summary(values) for name, values in samples.items()}
        for provider in self.providers:
            name = provider.name
            if name not in figures:
                status, note = self.broken[(*case, name)]
                yield self._row(case, provider, status, note=note)
                continue
            verdict = verdicts.get(name, {"ok": False})
            row = self._row(case, provider, "ok" if verdict["ok"] else "WRONG", check=verdict)
            row.figures = self._figures(figures, case, name, peaks[name])
            if not verdict["ok"]:
                row.figures["speedup"] = None
            yield row

    def _figures(
        self, figures: dict[str, dict[str, float]], case: Case, name: str, peak: float | None
    ) -> dict[str, float | None]:
        median = figures[name]["ms"]
        baseline = figures.get(self.workload.baseline, {}).get("ms")
        return {
            **figures[name],
            "samples_per_s": round(1e3 * case[1] / median, 2),
            "first_step_s": round(self.first[(*case, name)], 3),
            "peak_mib": peak,
            "speedup": round(baseline / median, 4) if baseline else None,
        }

    def _steps(self, case: Case, instances: list[Instance]) -> list[Step]:
        mode, batch = case
        x, target = self._input((batch, *self.workload.sample), 0), self._target(batch)
        return [STEPS[mode](instance, x, target, self.dtype) for instance in instances]

    def _input(self, shape: tuple[int, ...], seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(self._input_dtype)

    def _target(self, batch: int) -> Tensor:
        """Labels of a model, the cotangent of a layer."""
        generator = torch.Generator(self.device).manual_seed(100)
        if self.workload.layer:
            size = (batch, self.workload.outputs)
            return torch.randn(size, generator=generator, device=self.device).to(self.dtype)
        return torch.randint(self.workload.outputs, (batch,), generator=generator, device=self.device)

    def _row(self, case: Case, provider: Provider, status: str, note: str = "", check: dict | None = None) -> Row:
        workload, (mode, batch) = self.workload, case
        layout = "contiguous"
        if workload.channels_last:
            layout = "channels-last" if provider.channels_last else "NCHW"
        return Row(
            self.suite, workload.name, mode, provider.name, [batch, *workload.sample], workload.dtype, layout, status,
            {}, check or {}, note, describe(self.device),
        )  # fmt: skip
