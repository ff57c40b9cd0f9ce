"""Timings of layers and models, training and inference, providers interleaved with the baseline in one run."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import torch
import torch._dynamo.config
import torch.compiler.config
from rich.table import Table
from torch import Tensor, nn

from benchmarks import machine, parity, timing
from benchmarks.environment import describe
from benchmarks.providers import Instance, Provider, instantiate, select
from benchmarks.results import Key, Row
from benchmarks.rivals import Unsupported
from benchmarks.suite import Request, Suite
from benchmarks.timing import STEPS, Batch, Step
from benchmarks.workers import variables
from benchmarks.workloads import DTYPES, TIMED, Workload, workloads

MODEL_SECONDS, LAYER_SECONDS = {"cuda": 5.0, "cpu": 2.0}, 0.5  # of timed rounds, for each case and mode
WARM_UP = 0.2  # of those seconds
TIMED_INPUTS = 2  # of a check at the timed size, which is large: float64 takes its time
MIN_ROUNDS, MAX_ROUNDS = {"cuda": 20, "cpu": 12}, 200
# A frame is compiled anew for each provider, mode and size. Beyond the limit, Dynamo would run the model eagerly and
# say so in a warning alone: such a provider has failed.
DYNAMO = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}
UNCHECKED = {"ok": False, "error": "not checked, as it fails in another mode"}
HEADER = ("workload", "mode", "batch", "dtype", "provider", "ms", "quartiles", "forward + backward", "host µs",
          "MiB", "speedup", "interval", "check")  # fmt: skip


@dataclass(frozen=True)
class Timed:
    """A workload at one batch size: both modes of every provider come from one run."""

    suite: str
    of: Workload
    batch: int
    providers: tuple[Provider, ...]

    @property
    def workload(self) -> str:
        return self.of.name

    @property
    def keys(self) -> list[Key]:
        return [self.row(mode, provider).key for mode in STEPS for provider in self.providers]

    def row(self, mode: str, provider: Provider, status: str = "ok", note: str = "") -> Row:
        layout = "contiguous"
        if self.of.channels_last:
            layout = "channels-last" if provider.channels_last else "NCHW"
        shape = [self.batch, *self.of.sample]
        return Row(self.suite, self.workload, mode, provider.name, shape, self.of.dtype, layout, status, note=note)

    def without(self, there: frozenset[Key]) -> Timed:
        """With the providers that are missing, and the baseline, which is measured again beside them."""
        missing = [p for p in self.providers if not there.issuperset(self.row(mode, p).key for mode in STEPS)]
        return replace(self, providers=tuple(self.of.entrants(missing)))


def plan(suite: str, request: Request) -> list[Timed]:
    """Every workload at its first batch size, then at its second, and so on.

    A network on a GPU takes long enough to be a case a provider, beside the baseline: what is measured is saved.
    """
    chosen = select(request.providers, request.device, quick=request.quick)
    apart = suite == "models" and request.device.type == "cuda"
    cases = [
        (number, Timed(suite, workload, batch, tuple(providers)))
        for workload in workloads(suite, request)
        for entrants in [workload.entrants(chosen)]
        for providers in (_pairs(workload, entrants) if apart else [entrants])
        for number, batch in enumerate(workload.batches)
    ]
    return [case for _, case in sorted(cases, key=lambda numbered: numbered[0])]


def _pairs(workload: Workload, entrants: list[Provider]) -> list[list[Provider]]:
    """Each with the baseline; where there is no other, that alone."""
    others = [p for p in entrants if p.name != workload.baseline]
    return [workload.entrants([other]) for other in others] or [entrants]


def run(request: Request, cases: Sequence[Timed]) -> Iterator[Row]:
    """Measure; what was not begun in time comes out as rows that say so."""
    if request.device.type == "cpu":
        torch.set_num_threads(1)  # more threads wait for each other wherever the machine has other work
    deadline = time.monotonic() + request.seconds
    for workload, group in groupby(cases, key=lambda case: case.of):
        measurement = _Measurement(workload, request.device)
        for case in group:
            if time.monotonic() > deadline:
                yield from (case.row(m, p, "not measured", "out of time") for m in STEPS for p in case.providers)
                continue
            # Without caches the first step shows the compile time.
            caches = torch.compiler.config.patch(force_disable_caches=True)  # pyright: ignore[reportAttributeAccessIssue]
            limits = torch._dynamo.config.patch(DYNAMO)  # pyright: ignore[reportAttributeAccessIssue]
            kernels = request.device.type == "cuda" and case.suite == "kernels"
            with caches, limits, variables({"FUSEDRES_BACKEND": "triton"} if kernels else {}):
                yield from measurement.rows(case.without(request.there))


class _Measurement:
    """One workload. Of each case: first steps, the correctness check, then the timings."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self.workload, self.device = workload, device
        self.dtype = DTYPES[workload.dtype]
        self.environment = describe(device) | machine.ceilings(device)

    def rows(self, case: Timed) -> Iterator[Row]:
        _forget()
        instances, rejected = self._instances(case)
        batches = self._batches((case.batch, *self.workload.sample))
        steps = {(mode, i.provider.name): STEPS[mode](i, batches, self.dtype) for mode in STEPS for i in instances}
        first, broken = self._first_steps(steps)
        broken |= {(mode, name): ("unsupported", reason) for mode in STEPS for name, reason in rejected.items()}
        failed = {name for (_, name), (status, _) in broken.items() if status != "OOM"}
        verdicts: dict[str, dict[str, Any]] = {}
        try:
            verdicts = self._check(case, [i for i in instances if i.provider.name not in failed])
        except torch.OutOfMemoryError:
            broken |= {key: ("OOM", "in the check, in float64") for key in steps if key not in broken}
        for mode in STEPS:
            runnable = {name: step for (of, name), step in steps.items() if of == mode and (of, name) not in broken}
            figures: dict[str, dict[str, float | None]] = {}
            try:
                figures = self._figures(case, mode, runnable)
            except torch.OutOfMemoryError:
                broken |= {(mode, name): ("OOM", "beside the other providers") for name in runnable}
            except Exception as error:  # at a later step than the first
                broken |= {(mode, name): ("failed", parity.first_line(error)) for name in runnable}
            environment = self.environment | machine.conditions(self.device)
            for provider in case.providers:
                name = provider.name
                row = case.row(mode, provider, *broken.get((mode, name), ("ok", "")))
                row.environment = environment
                if name in figures:
                    _fill(row, verdicts.get(name, UNCHECKED), figures[name] | {"first_step_s": first[mode, name]})
                yield row

    @cached_property
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        weights = DTYPES[self.workload.weights or self.workload.dtype] if self.workload.layer else torch.float32
        return self.workload.build().to(weights)

    def _instances(self, case: Timed) -> tuple[list[Instance], dict[str, str]]:
        """Those that can be made, and why the others cannot."""
        instances, rejected = [], {}
        for provider in case.providers:
            try:
                instance = instantiate(
                    provider, self.model, self.device, channels_last=self.workload.channels_last
                )  # fmt: skip
            except (Unsupported, ImportError) as error:
                rejected[provider.name] = parity.first_line(error)
            else:
                instances.append(instance)
        return instances, rejected

    def _first_steps(self, steps: dict[tuple[str, str], Step]) -> tuple[dict, dict[tuple[str, str], tuple[str, str]]]:
        """Seconds of the first step by mode and provider, and status and note of those that could not run."""
        first, broken = {}, {}
        for key, step in steps.items():
            try:
                first[key] = round(timing.seconds(step, self.device), 3)
            except Unsupported as error:
                broken[key] = ("unsupported", parity.first_line(error))
            except torch.OutOfMemoryError:
                broken[key] = ("OOM", "")
                torch.cuda.empty_cache()
            except Exception as error:  # a provider that cannot run is a result, not the end of the benchmark
                broken[key] = ("failed", parity.first_line(error))
        return first, broken

    def _check(self, case: Timed, instances: list[Instance]) -> dict[str, dict[str, Any]]:
        """At the workload's size, or at the timed one if that compiles nothing anew and float64 fits the memory."""
        sizes = {self.workload.checked(case.batch): parity.INPUTS}
        if any(instance.provider.compiles for instance in instances):
            sizes = {(case.batch, *self.workload.sample): TIMED_INPUTS} | sizes
        *larger, last = sizes
        for shape in larger:
            with suppress(torch.OutOfMemoryError):
                return self._check_at(shape, sizes[shape], instances)
        return self._check_at(last, sizes[last], instances)

    def _check_at(self, shape: tuple[int, ...], inputs: int, instances: list[Instance]) -> dict[str, dict[str, Any]]:
        batches = (self._batch(shape, seed) for seed in range(1, inputs + 1))
        return parity.check(instances, self.model, batches, self.dtype, channels_last=self.workload.channels_last)

    def _figures(self, case: Timed, mode: str, steps: dict[str, Step]) -> dict[str, dict[str, float | None]]:
        if not steps:
            return {}
        layer, limit = self.workload.layer, LAYER_SECONDS if self.workload.layer else MODEL_SECONDS[self.device.type]
        round_seconds = timing.warm_up(steps, self.device, WARM_UP * limit)
        rounds = max(MIN_ROUNDS[self.device.type], min(MAX_ROUNDS, int(limit / max(round_seconds, 1e-9))))
        replayed = {p.name for p in case.providers if p.replays}
        peaks = {n: None if n in replayed else timing.peak_memory_mib(s, self.device) for n, s in steps.items()}
        hosts = {name: timing.host_microseconds(step, self.device) if layer else None for name, step in steps.items()}
        samples = timing.interleave(steps, self.device, rounds, queued=layer)
        baseline = samples.get(self.workload.baseline)
        found = {}
        for name, taken in samples.items():
            figures = timing.summary(taken)
            ratio = timing.speedup(baseline, taken) if baseline else {}
            costs = self._rates(case, mode, figures["ms"] or 0)
            found[name] = figures | ratio | costs | {"peak_mib": peaks[name], "host_us": hosts[name]}
        return found

    def _rates(self, case: Timed, mode: str, ms: float) -> dict[str, float | None]:
        """Samples a second, and what the step needs over its time: beside the machine's own, of bytes or operations."""
        figures: dict[str, float | None] = {"samples_per_s": _rounded(1e3 * case.batch / ms)}
        cost = self.workload.cost.get(mode)
        if cost is not None and cost.bytes:
            rate = case.batch * cost.bytes / ms / 1e6
            figures |= {"gb_s": _rounded(rate), "bandwidth_share": self._share(rate, "copy_gb_s")}
        if cost is not None and cost.flops:
            rate = case.batch * cost.flops / ms / 1e9
            figures |= {"tflop_s": _rounded(rate), "matmul_share": self._share(rate, "matmul_tflop_s")}
        return figures

    def _share(self, rate: float, ceiling: str) -> float:
        return _rounded(rate / float(self.environment[ceiling] or 0))

    def _batches(self, shape: tuple[int, ...]) -> list[Batch]:
        """As many as it takes to leave the L2 cache behind."""
        first = self._batch(shape, 100)
        targets = () if isinstance(first.target, Tensor) else first.target
        size = sum(t.numel() * t.element_size() for t in (*first.inputs, *targets))
        count = timing.input_sets(size, self.device)
        return [first, *(self._batch(shape, 100 + seed) for seed in range(1, count))]

    def _batch(self, shape: tuple[int, ...], seed: int) -> Batch:
        """Inputs, and the labels of a model or the cotangents of a layer.

        In the format that most providers want, so that they share one copy: the largest are gigabytes.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        normal = partial(torch.randn, generator=generator, device=self.device)
        dtype = self.dtype if self.workload.layer else torch.float32
        inputs = tuple(normal(shape).to(dtype) for _ in range(self.workload.inputs))
        memory_format = torch.channels_last if self.workload.channels_last else torch.contiguous_format
        if not self.workload.layer:
            [classes] = self.workload.output
            labels = torch.randint(classes, shape[:1], generator=generator, device=self.device)
            return Batch(inputs, labels).formatted(memory_format)
        targets = tuple(normal(size).to(dtype) for size in self.workload.outputs(shape[0]))
        return Batch(inputs, targets).formatted(memory_format)


def _forget() -> None:
    """What was compiled and captured. A captured graph is a cycle that keeps its memory until it is collected."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _fill(row: Row, verdict: dict[str, Any], figures: dict[str, float | None]) -> None:
    """Figures and check; what is wrong has no speedup."""
    row.figures, row.check = figures, verdict
    if verdict["ok"]:
        return
    row.status, row.note = ("failed", verdict["error"]) if "error" in verdict else ("WRONG", "")
    row.figures = figures | dict.fromkeys(("speedup", "speedup_low", "speedup_high"))


def table(rows: Sequence[Row]) -> Table:
    """Whole steps, and what they are made of."""
    on_gpu = any(row.environment.get("driver") for row in rows)
    title = None if on_gpu else (
        "These are not GPU timings: reduced size, and on a CPU fusedres takes its reference path, so about 1.0x is "
        "expected."
    )  # fmt: skip
    shown = Table(*HEADER, title=title)
    for row in rows:
        f = {k: "" if v is None else f"{v:.4g}" for k, v in row.figures.items()}

        def span(first: str, last: str, join: str = "-", f: dict[str, str] = f) -> str:
            return f"{f[first]}{join}{f[last]}" if f.get(first) else ""

        shown.add_row(
            row.workload, row.mode, str(row.shape[0]), row.dtype, row.provider, f.get("ms", ""),
            span("ms_q1", "ms_q3"), span("forward_ms", "backward_ms", " + "), f.get("host_us", ""),
            f.get("peak_mib", ""), f.get("speedup", ""), span("speedup_low", "speedup_high"),
            row.status + (f": {row.note}" if row.note else ""),
        )  # fmt: skip
    return shown


SUMMARIES = {
    "kernels": "every BatchNorm layer of ResNet-34 and -50: training and inference of all providers",
    "mlp": "LayerNorm, Linear and ReLU in both orders, and residual MLPs",
    "models": "training steps and inference of whole networks",
}
TIMED_SUITES = [Suite(name, SUMMARIES[name], partial(plan, name), run, table) for name in TIMED]
