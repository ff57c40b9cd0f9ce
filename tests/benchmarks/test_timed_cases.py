"""Timed suites: what one case is, at which size it is checked, and how often that compiles a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("rich")

from benchmarks import parity, results
from benchmarks.providers import BASELINE, PROVIDERS, Provider
from benchmarks.suite import drive
from benchmarks.suites import timed
from benchmarks.suites.timed import Timed
from benchmarks.timing import Batch
from tests.benchmarks.test_timed import BLOCK, GPU, REQUEST, measure, quickly

__all__ = ["quickly"]  # for every test here, too


def test_a_model_is_compiled_once_a_size_and_mode():
    """Checked as it is timed, at the size at which it is timed; beyond its limit Dynamo would run it eagerly."""
    compiled: list[tuple[str, int]] = []

    def compiler(name: str) -> Provider:
        def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
            [batch] = (x.shape[0] for x in inputs if x.dim() == 4 and x.shape[1:] == BLOCK.sample)
            compiled.append((name, batch))
            return module

        return Provider(name, True, lambda model: torch.compile(model, backend=backend, dynamic=False), compiles=True)

    names = ["one", "another", "a third", "a fourth", "a fifth"]
    rows = measure(replace(BLOCK, batches=(2, 5), compiled=True), *map(compiler, names), PROVIDERS["fusedres"])
    assert {row.status for row in rows} == {"ok"} and {row.check["ok"] for row in rows} == {True}
    assert Counter(compiled) == {(name, batch): 2 for name in names for batch in (2, 5)}


def checked_at(monkeypatch: pytest.MonkeyPatch, largest: float = float("inf")) -> list[int]:
    """The batch sizes that checks are given from here on; larger ones are out of memory."""
    given: list[int] = []
    check = parity.check

    def spy(instances: list[Any], model: nn.Module, batches: Iterable[Batch], *args: Any, **kwargs: Any) -> Any:
        taken = list(batches)
        given.extend(len(batch.inputs[0]) for batch in taken)
        if given[-1] > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return check(instances, model, taken, *args, **kwargs)

    monkeypatch.setattr(parity, "check", spy)
    return given


def test_what_is_not_compiled_is_checked_at_the_small_size(monkeypatch: pytest.MonkeyPatch):
    given = checked_at(monkeypatch)
    measure(BLOCK, PROVIDERS["fusedres"])
    assert given == [4] * parity.INPUTS


def test_where_float64_does_not_fit_a_compiled_model_is_checked_at_the_small_size(monkeypatch: pytest.MonkeyPatch):
    given = checked_at(monkeypatch, largest=4)
    compiler = Provider("compiler", True, partial(torch.compile, backend="eager", dynamic=False), compiles=True)
    rows = measure(replace(BLOCK, batches=(5,), compiled=True), compiler)
    assert {row.status for row in rows} == {"ok"}
    assert given == [5] * timed.TIMED_INPUTS + [4] * parity.INPUTS


def test_on_a_gpu_networks_are_measured_a_provider_at_a_time():
    """So that what has been measured is saved when time runs out; each in turns with the baseline."""
    request = replace(REQUEST, device=GPU, quick=False, batches=(256, 32), dtypes=("bfloat16",))
    names = ["fusedres", BASELINE, "fusedres + CUDA graph"]
    cases = timed.plan("models", replace(request, providers=tuple(names)))
    found = [(case.batch, case.workload, [p.name for p in case.providers]) for case in cases]
    assert found[:3] == [
        (256, "resnet50", [BASELINE, "fusedres"]), (256, "resnet50", [BASELINE, "fusedres + CUDA graph"]),
        (256, "preact_resnet50", [BASELINE, "fusedres"]),
    ]  # fmt: skip
    assert [batch for batch, *_ in found] == [256] * 8 + [32] * 8
    [alone, *_] = timed.plan("models", replace(request, providers=(BASELINE,)))
    assert [p.name for p in alone.providers] == [BASELINE]
    [together, *_] = timed.plan("kernels", replace(request, providers=tuple(names)))
    assert len(together.providers) == 3


def test_an_interruption_keeps_the_providers_before(tmp_path: Path):
    """The same command goes on from there, and shows each row once."""

    def stop(model: nn.Module) -> nn.Module:
        raise KeyboardInterrupt

    def measured(prepare: Callable[[nn.Module], nn.Module]) -> list[str]:
        others = [PROVIDERS["fusedres"], Provider("another", True, prepare)]
        cases = [Timed("models", BLOCK, 2, tuple(p)) for p in timed._pairs(BLOCK, [PROVIDERS[BASELINE], *others])]
        return [row.provider for row in drive(suite, request, cases, lambda text, count: None)]

    [suite] = (suite for suite in timed.TIMED_SUITES if suite.name == "models")
    request = replace(REQUEST, folder=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        measured(stop)
    before = results.read(suite.path(request))
    assert [row.provider for row in before] == [BASELINE, "fusedres"] * 2
    assert measured(lambda model: model) == [BASELINE, "fusedres"] * 2 + ["another"] * 2
    fused = [row for row in results.read(suite.path(request)) if row.provider == "fusedres"]
    assert fused == [row for row in before if row.provider == "fusedres"], "not measured again"
