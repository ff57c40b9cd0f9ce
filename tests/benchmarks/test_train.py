"""Training on the digits: it learns, fused and eager curves agree, and what is off is seen."""

from __future__ import annotations

import copy

import pytest
from torch import nn

pytest.importorskip("rich")
from benchmarks.suites import digits
from benchmarks.suites.digits import Curve, Recipe


@pytest.fixture(autouse=True)
def reference_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRES_BACKEND", "reference")


@pytest.mark.slow
def test_digits_are_learned() -> None:
    recipe = Recipe()
    eager, fused = digits.train(digits.build_model(), recipe), digits.fused_run(recipe)
    assert min(eager.accuracy, fused.accuracy) > 0.97
    assert len(fused.losses) == 168


def test_digits_curves_agree_on_the_reference_path() -> None:
    recipe = Recipe(steps=40)
    eager = digits.eager_runs(recipe)
    assert digits.agreement(digits.fused_run(recipe), eager).ok


def test_digits_curves_agree_with_the_kernels_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if not pytest.importorskip("triton").knobs.runtime.interpret:
        pytest.skip("kernels are compiled here, not interpreted")
    monkeypatch.setenv("FUSEDRES_BACKEND", "triton")  # no silent fallback
    recipe = Recipe(batch=16, steps=8)
    fused = digits.fused_run(recipe)
    assert len(fused.losses) == 8
    assert digits.agreement(fused, digits.eager_runs(recipe)).ok


def test_agreement_refuses_another_curve() -> None:
    recipe = Recipe(steps=12)
    eager = digits.eager_runs(recipe)
    model = digits.build_model()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eps = 2e-5
    assert not digits.agreement(digits.train(copy.deepcopy(model), recipe), eager).ok


def test_agreement_grows_with_the_spread_of_eager_runs() -> None:
    eager = {"a": Curve([1.0, 1.0, 1.0], 1.0), "b": Curve([1.0, 1.0, 1.2], 1.0)}
    assert digits.agreement(Curve([1.0, 1.0, 1.1], 1.0), eager).ok
    assert not digits.agreement(Curve([1.0, 1.1, 1.1], 1.0), eager).ok, "too far at a step where eager runs agree"
