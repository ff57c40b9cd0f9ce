"""Byte budgets of the kernels, counted in the interpreter, with every ATen pass beside them."""

from __future__ import annotations

import math

import pytest

from benchmarks.traffic_suite import CASES, measure

pytestmark = [pytest.mark.floor, pytest.mark.usefixtures("triton_backend")]
LAUNCHES = {"forward": 2, "backward": 2, "eval": 1}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_budget(case):
    rows = case.shape[0] * math.prod(case.shape[2:])
    for phase, meter, right in measure(case):
        assert right, phase
        assert meter.passes + meter.aten_passes <= 1.05 * case.budget(phase), phase
        assert len(meter.launches) <= (1 if case.on_chip else LAUNCHES[phase]), phase
        assert meter.stray_bytes == 0, phase
        if rows >= 10_000:
            assert meter.vector_bytes <= 0.05 * meter.passes * meter.nbytes, phase
