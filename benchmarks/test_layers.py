"""``pytest benchmarks --benchmark-only``: training steps of the layers; a group a layer, a line a provider.

What the suites ``kernels`` and ``mlp`` measure in quick runs, for whoever wants pytest-benchmark's statistics,
comparisons and history. ``extra_info`` holds what the suites' rows hold; a provider that is wrong fails its test.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import parity, timing
from benchmarks.environment import describe, resolve_device
from benchmarks.providers import Instance, Provider, instantiate, select
from benchmarks.results import RESULTS
from benchmarks.rivals import Unsupported
from benchmarks.suite import Request
from benchmarks.timing import Batch, Step
from benchmarks.workloads import DTYPES, Workload, workloads

pytest.importorskip("pytest_benchmark")
DEVICE = resolve_device(None)
LAYERS = [w for suite in ("kernels", "mlp") for w in workloads(suite, Request(DEVICE, RESULTS)) if w.layer]
CASES = [
    pytest.param(workload, provider.name, id=f"{workload.name}-{provider.name}".replace(" ", "_"))
    for workload in LAYERS
    for provider in workload.entrants(select(None, DEVICE, quick=True))
]
ROUNDS, WARM_UP = 20, 0.1  # of the turns that the speedup comes from; seconds


@dataclass(frozen=True)
class Layer:
    """One layer at its first batch size.

    Args:
        steps: of the providers that are right.
        verdicts: of all providers that could be made.
        rejected: why the others could not.
        speedups: over the baseline, from steps that took turns.
    """

    steps: dict[str, Step]
    verdicts: dict[str, dict[str, Any]]
    rejected: dict[str, str]
    speedups: dict[str, dict[str, float]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """More of them wait for each other wherever the machine has other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("workload", "provider"), CASES)
def test_layer(workload: Workload, provider: str, benchmark: Any) -> None:
    compare(_of(workload.name), workload, provider, benchmark)


def compare(layer: Layer, workload: Workload, provider: str, benchmark: Any) -> None:
    """Time one provider's step, if its results are right."""
    if provider in layer.rejected:
        pytest.skip(layer.rejected[provider])
    verdict = layer.verdicts[provider]
    assert verdict["ok"], f"WRONG: {verdict}"
    step, turns = layer.steps[provider], itertools.count()

    def call() -> None:
        step(next(turns), lambda: None)
        timing.synchronize(DEVICE)

    benchmark.group = workload.name
    benchmark.extra_info |= {
        "correct": verdict["ok"],
        "check": verdict,
        "bytes": least_bytes(workload),
        "baseline": workload.baseline,
        **layer.speedups[provider],
        "shape": [workload.batches[0], *workload.sample],
        "dtype": workload.dtype,
        "environment": describe(DEVICE),
    }
    benchmark(call)


@functools.lru_cache(maxsize=1)  # the providers of a layer come one after another
def _of(name: str) -> Layer:
    [workload] = (workload for workload in LAYERS if workload.name == name)
    return measure(workload, workload.entrants(select(None, DEVICE, quick=True)))


def measure(workload: Workload, providers: Sequence[Provider]) -> Layer:
    """Check all providers of a layer, and time those that are right in turns."""
    torch.compiler.reset()
    torch.manual_seed(0)
    dtype, model = DTYPES[workload.dtype], workload.build().to(DTYPES[workload.weights or workload.dtype])
    instances: list[Instance] = []
    rejected = {}
    for provider in providers:
        try:
            instances.append(instantiate(provider, model, DEVICE, channels_last=workload.channels_last))
        except (Unsupported, ImportError) as error:
            rejected[provider.name] = str(error)
    batches = [_batch(workload, model, seed) for seed in range(parity.INPUTS)]
    verdicts = parity.check(instances, model, batches, dtype, channels_last=workload.channels_last)
    right = [i for i in instances if verdicts[i.provider.name]["ok"]]
    steps = {i.provider.name: timing.train_step(i, batches, dtype) for i in right}
    timing.warm_up(steps, DEVICE, WARM_UP)
    samples = timing.interleave(steps, DEVICE, ROUNDS, queued=True)
    speedups = {name: timing.speedup(samples[workload.baseline], taken) for name, taken in samples.items()}
    return Layer(steps, verdicts, rejected, speedups)


def _batch(workload: Workload, model: nn.Module, seed: int) -> Batch:
    """Inputs, and a cotangent for each output."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=generator, device=DEVICE).to(DTYPES[workload.dtype])

    shape = (workload.batches[0], *workload.sample)
    inputs = tuple(normal(shape) for _ in range(workload.inputs))
    return Batch(inputs, tuple(normal(size) for size in workload.outputs(shape[0])))


def least_bytes(workload: Workload) -> int:
    """What a training step has to move: the budget of a BatchNorm; of a product, each tensor once a product.

    The product, the gradient of its input and that of its weight each read two of input, weight and output (or its
    gradient) and write the third.
    """
    rows = workload.batches[0]
    if cost := workload.cost["training"].bytes:
        return round(rows * cost)
    features, outputs = math.prod(workload.sample), math.prod(workload.output)
    return 3 * (rows * features + features * outputs + rows * outputs) * DTYPES[workload.dtype].itemsize
