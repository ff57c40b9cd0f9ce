"""Real code for every named architecture, generated without a GPU: spills, access widths, ordering."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.results import Row

pytestmark = [pytest.mark.codegen, pytest.mark.floor]
ROOT = Path(__file__).parents[2]
KERNELS = {
    name
    for path in (ROOT / "kernels").glob("*.py")
    for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
}
DTYPES = {
    "sm_80": ["float16"],
    "sm_89": ["bfloat16"],
    "sm_90": ["bfloat16", "float32"],
    "sm_100": ["bfloat16"],
    "gfx942": ["bfloat16"],
}


def run_compiled(arguments: list[str]) -> str:
    """What Python prints in another process: in this one kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def code(arch: str) -> list[Row]:
    """The rows of the code suite for one architecture."""
    program = f"""
import json
from dataclasses import asdict
from benchmarks.suites.codegen import cases, measure
for case in cases([{arch!r}], {DTYPES[arch]!r}):
    for row in measure(case):
        print(json.dumps(asdict(row)))
"""
    return [Row(**json.loads(line)) for line in run_compiled(["-c", program]).splitlines()]


@pytest.mark.parametrize("arch", DTYPES)
def test_generated_code(arch: str) -> None:
    rows = code(arch)
    assert {row.workload for row in rows} == KERNELS
    assert len({row.key for row in rows}) == len(rows), "a launch without a name of its own"
    assert [(row.key, row.note) for row in rows if row.status != "ok"] == []
    for row in rows:
        figures = {name: value or 0 for name, value in row.figures.items()}
        assert figures["bytes_in_flight"] > 0, row
        assert 0 < figures["occupancy"] <= 1, row


def complaints(plant: str, launches: str, arch: str = "sm_90") -> list[str]:
    """What is wrong with the code of ``launches`` while ``plant``, a target and its replacement, is patched."""
    program = f"""
import json, torch
from unittest import mock
from benchmarks.instruments import launches_batch_norm, limits
from benchmarks.instruments.codegen import compile_launch
with mock.patch({plant}):
    found = {launches}
print(json.dumps([text for launch in found for text in limits.complaints(
    launch, {arch!r}, compile_launch(launch, {arch!r}))]))
"""
    return json.loads(run_compiled(["-c", program]))


OPTIONS = "channels_last=True, residual=True, training=True"
LAYER = f"launches_batch_norm.batch_norm_launches((8, 64, 56, 56), torch.bfloat16, {OPTIONS})"


@pytest.mark.parametrize(
    ("plant", "complaint"),
    [
        ("'fusedres.kernels.tiling.cdiv', lambda a, b: -(-a // b)", None),  # nothing planted
        ("'fusedres.kernels.tiling._num_warps', lambda *_: 1", "spills"),  # 128 elements a thread
        ("'fusedres.kernels.tiling._tile', lambda *_: (2048, 2)", "stores of 128 bits"),  # two channels side by side
        ("'fusedres.kernels.tiling._tile', lambda *_: (8, 8)", "bytes in flight"),  # two elements a thread
    ],
)
def test_planted_faults_are_refused(plant: str, complaint: str | None) -> None:
    found = complaints(plant, LAYER)
    assert any(complaint in text for text in found) if complaint else found == []


@pytest.mark.parametrize(("batch", "most"), [(32, 16), (1, 30)])
def test_variants_of_a_resnet50_step(batch, most):
    """Every variant is compiled at its first launch: few of them make a short cold start."""
    program = f"""
import torch, fusedres
from benchmarks.instruments.launches_batch_norm import training_step_launches
model = fusedres.fuse(fusedres.models.resnet50())
launches = training_step_launches(model, ({batch}, 3, 224, 224), torch.bfloat16)
print(len(launches), len(set(launches)))
"""
    launches, variants = map(int, run_compiled(["-c", program]).split())
    assert 2 * 49 <= launches < 4 * 53
    assert variants <= most


def test_the_number_of_ranks_makes_no_variant() -> None:
    program = """
import torch
from benchmarks.instruments.codegen import recorded_launches
from fusedres.kernels.sync_batch_norm import merge
vector = torch.empty(64)
with recorded_launches() as launches:
    for ranks in (2, 8, 64):
        merge(torch.empty(ranks, 129), vector, vector, vector, vector, torch.tensor(0), 0.1, 1e-5)
print(len(launches), len(set(launches)))
"""
    assert run_compiled(["-c", program]).split() == ["3", "1"]
