"""The probe of 1x1 convolutions: its kernel is right, compiles without spills, and its rows say what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
from benchmarks.environment import describe
from benchmarks.errors import BenchmarkError
from benchmarks.instruments import probe_routes
from benchmarks.instruments.probe_kernels import Tile
from benchmarks.instruments.probe_routes import Operands, measure
from benchmarks.results import Row
from benchmarks.suite import Request
from benchmarks.suites import probe
from benchmarks.suites.probe import CUDNN, MODES, TRITON, Convolution, Probed

CPU = torch.device("cpu")
SMALL = (Tile(16, 16, 16, 4, 1, 1), Tile(32, 64, 32, 4, 2, 3))
SHAPES = (Convolution(64, 72, 7, 1, 1), Convolution(67, 35, 9, 2, 1), Convolution(20, 130, 3, 1, 1))
PROGRAM = """
import json, sys
import torch
from benchmarks.instruments.codegen import compile_launch, recorded_launches
from benchmarks.suites.probe import MODES
from benchmarks.instruments.probe_kernels import TILES, Prologue, conv1x1

x = torch.empty(32, 256, 14, 14, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
weight, vector = torch.empty(512, 256, dtype=torch.bfloat16), torch.empty(256)
for number, tile in enumerate(TILES[:2]):
    for mode in MODES:
        prologue = Prologue(vector, vector, vector) if mode in ("prologue", "both") else None
        with recorded_launches() as launches:
            conv1x1(x, weight, 2 if tile is TILES[0] else 1, tile, prologue=prologue, statistics=mode in MODES[1::2])
        code = compile_launch(launches[0], sys.argv[1])
        print(json.dumps([number, mode, code.spill_bytes, code.matrix, code.shared_bytes, code.fenced]))
"""


def tight(operands: Operands, mode: str, tile: Tile) -> dict:
    fused = lambda x: operands.fused(x, mode=mode, tile=tile)  # noqa: E731
    return probe_routes.check(operands, mode, lambda x: operands.separate(x, mode=mode), fused)


def test_kernel_with_everything(device):
    verdict = tight(Operands(Probed(SHAPES[2], 3, "bfloat16"), device), "both", SMALL[0])
    assert verdict["ok"], verdict


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tile", SMALL, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_kernel(shape, dtype, tile, mode, device):
    """Odd channels and rows, several row tiles a program, strided pixels, against float64."""
    verdict = tight(Operands(Probed(shape, 3, dtype), device), mode, tile)
    assert verdict["ok"], verdict


@pytest.mark.slow
def test_a_large_mean_keeps_its_variance(device):
    """At a thousand standard deviations E[x²] − E[x]² has nothing left."""
    operands = Operands(Probed(Convolution(32, 16, 9, 1, 1), 4, "float16"), device)
    operands.xs = [x * 0.01 + 3 for x in operands.xs]
    operands.weight = operands.weight.abs() + 0.5
    y, _ = operands.separate(operands.xs[0], mode="plain")
    assert (y.double().mean((0, 2, 3)) / y.double().std((0, 2, 3))).min() > 1e3
    verdict = tight(operands, "statistics", SMALL[0])
    assert verdict["ok"], verdict


@pytest.mark.slow
@pytest.mark.parametrize("batches", [1, 2])
def test_rows(batches, monkeypatch, device):
    """One row a key, in order, with the chosen tile, and times of both routes."""
    monkeypatch.setattr(probe_routes, "TILES", SMALL)
    monkeypatch.setattr(probe_routes, "ROUNDS", 3)
    case = Probed(Convolution(16, 24, 4, batches, 2), batches, "bfloat16")
    with torch.no_grad():
        rows = measure(case, device)
    assert [row.key for row in rows] == case.keys
    for row in rows:
        assert row.status == "ok" and row.figures["count"] == 2
        assert (row.figures["ms_q1"] or 0) <= (row.figures["ms"] or 0) <= (row.figures["ms_q3"] or 0)
        assert ("speedup" in row.figures) == (row.provider == TRITON) == bool(row.check) == bool(row.note)


def test_what_is_wrong_has_no_speedup(monkeypatch, device):
    monkeypatch.setattr(probe_routes, "TILES", SMALL)
    monkeypatch.setattr(probe_routes, "ROUNDS", 3)
    fused = Operands.fused

    def off(self: Operands, x: torch.Tensor, **options):
        y, stats = fused(self, x, **options)
        return y * 1.05, stats

    monkeypatch.setattr(Operands, "fused", off)
    with torch.no_grad():
        rows = measure(Probed(Convolution(16, 24, 4, 1, 2), 1, "bfloat16"), device)
    wrong = [row for row in rows if row.provider == TRITON]
    assert {row.status for row in wrong} == {"WRONG"} and not any("speedup" in row.figures for row in wrong)
    [cells, everywhere, faster] = [cells for _, cells in probe.decisions(rows)]
    assert cells == ["WRONG"] * 4 and everywhere == faster == ["1.00"] * 4


def test_convolutions_of_resnet50():
    found = probe.convolutions()
    assert len(found) == 15 and sum(c.count for c in found) == 36
    assert [c.name for c in found if c.stride == 2] == ["256→512 /2", "512→1024 /2", "1024→2048 /2"]
    assert Convolution(64, 64, 56, 1, 1) in found


def request(**options) -> Request:
    return Request(torch.device("cuda"), Path("nowhere"), **options)


def test_plan():
    quick, full = (probe.plan(request(quick=quick)) for quick in (True, False))
    assert len(quick) == 24 and len(full) == 60
    assert {(case.dtype, case.of.stride) for case in quick} == {("bfloat16", 1)}
    assert [case.batch for case in full[:24]] == [256] * 12 + [32] * 12
    keys = [key for case in full for key in case.keys]
    assert len(keys) == len(set(keys)) == 2 * 2 * 2 * (12 * 4 + 3 * 2)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"device": CPU}, "GPU"),
        ({"dtypes": ("float32",)}, "float32"),
        ({"providers": ("fusedres",)}, "--provider"),
    ],
)
def test_nonsense_is_refused(options, complaint):
    given = {"device": torch.device("cuda"), "folder": Path("nowhere")} | options
    with pytest.raises(BenchmarkError, match=complaint):
        probe.plan(Request(**given))


def test_out_of_time(monkeypatch):
    monkeypatch.setattr(probe, "describe", lambda device: describe(CPU))
    monkeypatch.setattr(probe.machine, "ceilings", lambda device: {})
    cases = probe.plan(request())[:1]
    rows = list(probe.run(request(seconds=-1), cases))
    assert [row.key for row in rows] == cases[0].keys
    assert {row.status for row in rows} == {"not measured"}


def test_decisions():
    def row(provider: str, ms: float, **figures: float) -> Row:
        return Row(
            "probe", "64→64", "plain", provider, [32, 64, 56, 56], "bfloat16", "channels-last",
            figures={"ms": ms, "count": 2.0, **figures},
        )  # fmt: skip

    rows = [row(CUDNN, 1.0), row(TRITON, 2.0, speedup=0.5, speedup_low=0.4, speedup_high=0.6)]
    assert [cells[0] for _, cells in probe.decisions(rows)] == ["0.50 (0.40-0.60)", "0.50", "1.00"]
    assert probe.table(rows).row_count == 3


@pytest.mark.slow
@pytest.mark.codegen
@pytest.mark.floor
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_generated_code(arch):
    """Matrix instructions in all variants of the first two tiles, and no spills on the architectures they are for."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, arch], env=environment, capture_output=True, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for number, mode, spilled, matrix, shared, fenced in map(json.loads, done.stdout.splitlines()):
        assert matrix > 0, mode
        assert fenced is (True if mode in MODES[1::2] else None), mode
        assert spilled == 0 or (number > 0 and arch == "gfx942"), (number, mode)
        assert shared <= 1024 * (64 if arch == "gfx942" else 163), mode
