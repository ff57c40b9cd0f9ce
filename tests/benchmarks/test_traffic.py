"""Byte budgets of the kernels, counted in the interpreter, with every ATen pass beside them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import triton
import triton.language as tl

from benchmarks import results
from benchmarks.suites import traffic_batch_norm, traffic_batch_norm_head, traffic_join, traffic_linear
from benchmarks.suites.traffic import MANY_ROWS, SUBJECTS, Subject, complaints, measure
from fusedres.kernels import batch_norm_forward

pytestmark = pytest.mark.usefixtures("triton_backend")
SMALL = next(case for case in traffic_batch_norm.CASES if case.on_chip and case.layout == "channels-last")
# Eager ATen, training forward and backward, and evaluation.
EAGER = {
    "batch_norm_act": {"forward": 5, "backward": 8, "eval": 4},
    "batch_norm_act + residual": {"forward": 8, "backward": 8, "eval": 7},
    "forked_batch_norm_act + residual": {"forward": 8, "backward": 11, "eval": 7},
    "add_batch_norm_act": {"forward": 8, "backward": 11, "eval": 7},
    "batch_norm_act_conv2d": {"forward": 7, "backward": 11, "eval": 6},
    "add_batch_norm_act_conv2d": {"forward": 10, "backward": 14, "eval": 9},
    "batch_norm_add_batch_norm_act": {"forward": 11, "backward": 13, "eval": 9},
    traffic_join.FORKED: {"forward": 11, "backward": 16, "eval": 9},
}


# Budgets of vectors are of many rows, which take long to interpret: once a family, and once where an image is larger
# than a tile.
MANY = {
    ("batch_norm_act + residual", (8, 64, 56, 56), "channels-last"),
    (traffic_batch_norm_head.HEAD, (208, 16, 7, 7), "channels-last"),
    (f"{traffic_batch_norm_head.HEAD} + residual", (4, 32, 56, 56), "channels-last"),
    ("batch_norm_act_max_pool2d", (1, 16, 112, 112), "channels-last"),
    (traffic_linear.LINEAR_FIRST, (10240, 128, 64), "contiguous"),
}


# In NCHW, on-chip: of these functions another one moves all that they move, and more.
PARTS = {
    "batch_norm_act", "batch_norm_act + residual", traffic_batch_norm_head.HEAD, "batch_norm_act_conv2d",
    "add_batch_norm_act_conv2d", "batch_norm_add_batch_norm_act",
}  # fmt: skip


def is_slow(case: Subject) -> bool:
    """What is left has every function in both layouts with odd channels, in two launches; on-chip; and aligned in
    channels-last, where channels are contiguous. A larger shape moves the same bytes an element."""
    if case.rows >= MANY_ROWS:
        return (case.workload, case.shape, case.layout) not in MANY
    if case.layout != "NCHW":
        return False
    return case.shape == (4, 256, 14, 14) or (case.shape == traffic_batch_norm.ON_CHIP and case.workload in PARTS)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow if is_slow(case) else (), id="-".join(map(str, case)))
        for case in SUBJECTS
    ],
)
def test_budget(case) -> None:
    for counted in measure(case):
        assert complaints(case, counted) == [], counted.phase
        if case.workload in EAGER:
            assert counted.eager.aten_passes == EAGER[case.workload][counted.phase]


@triton.jit
def _load_twice(x_ptr, residual_ptr, s_ptr, base, offsets, mask, ADD: tl.constexpr):
    x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0)
    return (x + 0 * tl.load(x_ptr + base + offsets, mask=mask, other=0.0)).to(tl.float32)


@triton.jit
def _load_strided(x_ptr, residual_ptr, s_ptr, base, offsets, mask, ADD: tl.constexpr):
    x = tl.zeros(offsets.shape, dtype=tl.float32)
    for column in range(16):  # no byte twice, but a sector for every value
        own = mask & (offsets % 16 == column)
        x += tl.load(x_ptr + base + offsets, mask=own, other=0.0).to(tl.float32)
    return x


@pytest.mark.parametrize(
    ("planted", "expected"),
    [(None, ""), (_load_twice, "3.00 passes over an activation, more than 2.00"), (_load_strided, "useful bytes")],
)
def test_planted_traffic_is_refused(monkeypatch: pytest.MonkeyPatch, planted: object, expected: str) -> None:
    if planted:
        monkeypatch.setattr(batch_norm_forward, "_load_sum", planted)
    found = {counted.phase: ", ".join(complaints(SMALL, counted)) for counted in measure(SMALL)}
    assert found["backward"] == ""
    assert all(expected in found[phase] if expected else found[phase] == "" for phase in ("forward", "eval")), found


def test_a_product_that_moves_less_than_its_budget_is_refused() -> None:
    """A budget that is far from what is moved would say nothing."""
    case = next(case for case in traffic_linear.CASES if case.workload == traffic_linear.LINEAR_FIRST)
    with case.meter(case.inputs()) as meter:
        pass
    assert len(case.complaints("forward", meter)) == 2, "bytes and launches"


def test_every_kernel_is_measured() -> None:
    root = Path(__file__).parents[2]
    sources = [path.read_text() for path in (root / "fusedres" / "kernels").glob("*.py")]
    kernels = {name for text in sources for name in re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)}
    rows = results.read(results.RESULTS / "cpu" / "traffic.jsonl")
    # Ranks merge vectors alone, whatever the activation is; test_sync_batch_norm counts their launches and bytes.
    assert {name for row in rows for name in row.note.split(", ")} == kernels - {"_batch_norm_merge_kernel"}
