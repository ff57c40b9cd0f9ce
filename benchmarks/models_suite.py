"""ResNet-34 and ResNet-50, training steps and inference, every provider interleaved in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.compiler.config
from torch import Tensor, nn

from benchmarks import parity
from benchmarks.environment import describe
from benchmarks.errors import BenchmarkError
from benchmarks.providers import BASELINE, Instance, Provider, instantiate
from benchmarks.results import Row
from benchmarks.timing import STEPS, Step, interleave, peak_memory_mib, seconds, summary
from fusedres import models

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLASSES = 1000
CASE_SECONDS, MIN_ROUNDS, MAX_ROUNDS = 5.0, 10, 100


@dataclass(frozen=True)
class Workload:
    """A model in one dtype and the batch sizes it is measured at."""

    name: str
    build: Callable[[], nn.Module]
    dtype: str
    batches: tuple[int, ...]
    image: tuple[int, int, int]
    check_batch: int
    check_image: tuple[int, int, int]
    compiled: bool = True

    def cases(self) -> list[tuple[str, int]]:
        return [(mode, batch) for mode in STEPS for batch in self.batches]


def residual_block() -> nn.Module:
    """One basic block of ResNet-34 with a classifier, small enough to compile on a CPU."""
    block = next(models.resnet34().layer1.children())
    return nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


def workloads(device: torch.device, dtype: str | None) -> list[Workload]:
    """What is measured on ``device``, most telling first; ``dtype`` keeps one.

    Raises:
        BenchmarkError: an unknown dtype, or one that is not measured there.
    """
    if dtype is not None and dtype not in DTYPES:
        raise BenchmarkError(f"unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    if device.type == "cuda":
        full, small = (3, 224, 224), (3, 64, 64)
        found = [
            Workload(name, build, wanted, (32, 128), full, 8, small)
            for wanted in ("bfloat16", "float32", "float16")
            for name, build in (("resnet50", models.resnet50), ("resnet34", models.resnet34))
            if wanted != "float16" or dtype == wanted
        ]
    else:
        image, small, block = (3, 64, 64), (3, 48, 48), (64, 14, 14)
        found = [
            Workload("residual block", residual_block, "float32", (8,), block, 8, block),
            Workload("resnet34", models.resnet34, "float32", (4,), image, 4, small, compiled=False),
            Workload("resnet50", models.resnet50, "float32", (4,), image, 4, small, compiled=False),
        ]
    found = [w for w in found if dtype in (None, w.dtype)]
    if not found:
        raise BenchmarkError(f"dtype {dtype!r} is not measured on {device.type}; only float32 is")
    return found


def run(
    device: torch.device, providers: list[Provider], chosen: list[Workload], *, seconds_limit: float
) -> Iterator[Row]:
    """Measure; workloads not begun after ``seconds_limit`` come out as rows that say so."""
    if device.type == "cpu":
        torch.set_num_threads(1)  # more threads wait for each other wherever the machine has other work
    deadline = time.monotonic() + seconds_limit
    for workload in chosen:
        torch.compiler.reset()
        entrants = [p for p in providers if workload.compiled or p.name != "torch.compile"]
        if time.monotonic() > deadline:
            for mode, batch in workload.cases():
                for provider in entrants:
                    yield _row(workload, mode, batch, provider, device, "not measured", note="out of time")
            continue
        # Without caches the first step shows the compile time.
        with torch.compiler.config.patch(force_disable_caches=True):  # pyright: ignore[reportAttributeAccessIssue]
            yield from _Measurement(workload, entrants, device).rows()


class _Measurement:
    """One workload: first steps, the correctness check, then the timings of every case."""

    def __init__(self, workload: Workload, providers: list[Provider], device: torch.device) -> None:
        torch.manual_seed(0)
        self.workload, self.device = workload, device
        self.dtype = DTYPES[workload.dtype]
        self.model = workload.build()
        self.instances = [instantiate(provider, self.model, device) for provider in providers]
        self.first: dict[tuple[str, int, str], float] = {}
        self.broken: dict[tuple[str, int, str], tuple[str, str]] = {}

    def rows(self) -> Iterator[Row]:
        for mode, batch in self.workload.cases():
            self._first_steps(mode, batch)
        verdicts = self._check()
        for mode, batch in self.workload.cases():
            yield from self._case(mode, batch, verdicts)

    def _first_steps(self, mode: str, batch: int) -> None:
        for instance in self.instances:
            step = self._step(mode, batch, instance)
            key = (mode, batch, instance.provider.name)
            try:
                self.first[key] = seconds(step, self.device)
            except torch.OutOfMemoryError:
                self.broken[key] = ("OOM", "")
                instance.optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
            except Exception as error:  # a provider that cannot run is a result, not the end of the benchmark
                self.broken[key] = ("failed", f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")

    def _check(self) -> dict[str, dict]:
        size = (self.workload.check_batch, *self.workload.check_image)
        generator = torch.Generator().manual_seed(1)
        images = [torch.randn(size, generator=generator).to(self.device) for _ in range(parity.INPUTS)]
        labels = torch.randint(CLASSES, size[:1], generator=generator).to(self.device)
        failed = {name for (_, _, name), (status, _) in self.broken.items() if status == "failed"}
        able = [i for i in self.instances if i.provider.name not in failed]
        return parity.check(able, self.model, images, labels, self.dtype)

    def _case(self, mode: str, batch: int, verdicts: dict[str, dict]) -> Iterator[Row]:
        able = [i for i in self.instances if (mode, batch, i.provider.name) not in self.broken]
        steps = {i.provider.name: self._step(mode, batch, i) for i in able}
        warm = [seconds(step, self.device) for _ in range(3) for step in steps.values()]
        rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(CASE_SECONDS / max(sum(warm[-len(steps) :]), 1e-9))))
        peaks = {name: peak_memory_mib(step, self.device) for name, step in steps.items()}
        samples = interleave(steps, self.device, rounds)
        figures = {name: summary(values) for name, values in samples.items()}
        for instance in self.instances:
            name = instance.provider.name
            if name not in figures:
                status, note = self.broken[mode, batch, name]
                yield _row(self.workload, mode, batch, instance.provider, self.device, status, note=note)
                continue
            verdict = verdicts.get(name, {"ok": False})
            row = _row(
                self.workload, mode, batch, instance.provider, self.device, "ok" if verdict["ok"] else "WRONG",
                check=verdict,
            )  # fmt: skip
            row.figures = self._figures(figures, name, batch, peaks[name], self.first[mode, batch, name])
            if not verdict["ok"]:
                row.figures["speedup"] = None
            yield row

    def _figures(
        self, figures: dict[str, dict[str, float]], name: str, batch: int, peak: float | None, first: float
    ) -> dict[str, float | None]:
        median = figures[name]["ms"]
        baseline = figures.get(BASELINE, {}).get("ms")
        return {
            **figures[name],
            "images_per_s": round(1e3 * batch / median, 2),
            "first_step_s": round(first, 3),
            "peak_mib": peak,
            "speedup": round(baseline / median, 4) if baseline else None,
        }

    def _step(self, mode: str, batch: int, instance: Instance) -> Step:
        generator = torch.Generator().manual_seed(2)
        images: Tensor = torch.randn(batch, *self.workload.image, generator=generator).to(self.device)
        labels = torch.randint(CLASSES, (batch,), generator=generator).to(self.device)
        return STEPS[mode](instance, images, labels, self.dtype)


def _row(
    workload: Workload, mode: str, batch: int, provider: Provider, device: torch.device, status: str,
    note: str = "", check: dict | None = None,
) -> Row:  # fmt: skip
    return Row(
        "models", workload.name, mode, provider.name, [batch, *workload.image], workload.dtype,
        "channels-last" if provider.channels_last else "NCHW", status, {}, check or {}, note, describe(device),
    )  # fmt: skip
