"""Byte budgets of the kernels, counted in the interpreter, with every ATen pass beside them."""

from __future__ import annotations

import math

import pytest

from benchmarks.suites import traffic_batch_norm, traffic_linear
from benchmarks.suites.traffic import measure

pytestmark = [pytest.mark.floor, pytest.mark.usefixtures("triton_backend")]
LAUNCHES = {"forward": 2, "backward": 2, "eval": 1}


def name(case):
    return "-".join(map(str, case))


@pytest.mark.parametrize("case", traffic_batch_norm.CASES, ids=name)
def test_budget(case):
    rows = case.shape[0] * math.prod(case.shape[2:])
    for phase, meter, right in measure(case):
        assert right, phase
        assert meter.passes + meter.aten_passes <= 1.05 * case.budget(phase), phase
        assert len(meter.launches) <= (1 if case.on_chip else LAUNCHES[phase]), phase
        assert meter.stray_bytes == 0, phase
        if rows >= 10_000:
            assert meter.vector_bytes <= 0.05 * meter.issued_bytes, phase


@pytest.mark.parametrize("case", traffic_linear.CASES, ids=name)
def test_budget_with_products(case):
    for phase, meter, right in measure(case):
        budget = case.budget(phase)
        assert right, phase
        assert meter.distinct_bytes == pytest.approx(budget.kernels, rel=0.05), phase
        assert meter.aten_bytes == pytest.approx(budget.vendor, rel=0.05), phase
        assert len(meter.launches) == budget.launches, phase
        assert meter.stray_bytes == 0, phase
        if case.shape[0] >= 10_000:
            assert meter.vector_bytes <= 0.05 * (meter.distinct_bytes + meter.aten_bytes), phase
