"""Real code for every named architecture, generated without a GPU: spills, access widths, ordering."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.codegen, pytest.mark.floor]
ROOT = Path(__file__).parent.parent
DTYPES = {
    "sm_80": ["float16"],
    "sm_89": ["bfloat16"],
    "sm_90": ["bfloat16", "float32"],
    "sm_100": ["bfloat16"],
    "gfx942": ["bfloat16"],
}
ACTIVATIONS = ("x_ptr", "residual_ptr", "dy_ptr", "ds_ptr", "g_ptr", "z_ptr")
OUTPUTS = ("y_ptr", "s_ptr", "saved_ptr", "dx_ptr", "dresidual_ptr", "dz_ptr", "normalised_ptr", "product_ptr")
PRODUCTS = {"_layer_norm_linear_fwd_kernel", "_linear_layer_norm_fwd_kernel"}
SHARED_KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # a program may use
BITS = {"*fp32": 32, "*bf16": 16, "*fp16": 16, "*u8": 0}  # of an element; none of a mask, which has one in a byte


def run_compiled(arguments: list[str]) -> str:
    """What Python prints in another process: in this one kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def code(arch: str) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in run_compiled(["-m", "benchmarks.instruments.launches", arch, *DTYPES[arch]]).splitlines()
    ]


@pytest.mark.parametrize("arch", DTYPES)
def test_generated_code(arch):
    rows = code(arch)
    assert {row["kernel"] for row in rows} >= {
        "_batch_norm_fwd_stats_kernel",
        "_batch_norm_fwd_apply_kernel",
        "_batch_norm_fwd_on_chip_kernel",
        "_batch_norm_bwd_reduce_kernel",
        "_batch_norm_bwd_apply_kernel",
        "_batch_norm_bwd_on_chip_kernel",
        "_layer_norm_fwd_kernel",
        "_layer_norm_bwd_kernel",
        "_column_sums_kernel",
        "_relu_bias_bwd_kernel",
        *PRODUCTS,
    }
    for row in rows:
        _check_resources(row)
        _check_widths(row)


def _check_resources(row: dict[str, Any]) -> None:
    assert row["spill_bytes"] == 0, row
    assert row["threads"] <= 1024, row
    assert row["shared_bytes"] <= 1024 * SHARED_KIB[row["arch"]], row
    if row["kernel"] in PRODUCTS:
        assert row["matrix"] > 0 or (row["precision"] == "ieee" and row["dtype"] == "float32"), row
    elif not row["arch"].startswith("gfx") and "_on_chip_" not in row["kernel"]:
        # 1,024 threads a multiprocessor of 65,536 registers: enough loads in flight to cover memory's latency.
        assert row["registers"] <= 128, row
    if {"partials_ptr", "counters_ptr"} <= row["tensors"].keys():  # published to other programs of the launch
        assert row["fenced"] is True, row


def _check_widths(row: dict[str, Any]) -> None:
    """As many 128-bit accesses a thread as its share of the tile in every activation needs."""

    def needed(names: tuple[str, ...]) -> int:
        widths = [BITS[row["tensors"][name]] for name in names if name in row["tensors"]]
        # Odd C, or planes of 14x14: rows do not begin at multiples of 16 bytes.
        return sum(row["tile"] * bits // (row["threads"] * 128) for bits in widths if row["align"] * bits >= 128)

    if row["kernel"] not in PRODUCTS:  # they copy asynchronously to shared memory
        assert row["loads"].get("128", 0) >= needed(ACTIVATIONS), row
    if row["kernel"] not in PRODUCTS or not row["arch"].startswith("gfx"):  # MFMA leaves four results side by side
        assert row["stores"].get("128", 0) >= needed(OUTPUTS), row


@pytest.mark.parametrize(("batch", "most"), [(32, 10), (1, 30)])
def test_variants_of_a_resnet50_step(batch, most):
    """Every variant is compiled at its first launch: few of them make a short cold start."""
    program = f"""
import torch, fusedres
from benchmarks.instruments.launches import training_step_launches
model = fusedres.fuse(fusedres.models.resnet50())
launches = training_step_launches(model, ({batch}, 3, 224, 224), torch.bfloat16)
print(len(launches), len(set(launches)))
"""
    launches, variants = map(int, run_compiled(["-c", program]).split())
    assert 2 * 53 <= launches <= 4 * 53
    assert variants <= most
