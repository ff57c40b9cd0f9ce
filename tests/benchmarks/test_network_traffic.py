"""The bytes of a whole training step: as many as its layers need, one by one, and none that was not seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from benchmarks import results
from benchmarks.errors import BenchmarkError
from benchmarks.instruments.compiled import scheduled
from benchmarks.instruments.network import NetworkMeter, is_activation
from benchmarks.providers import BASELINE
from benchmarks.results import Row
from benchmarks.suite import CPU, Request
from benchmarks.suites import traffic_network
from benchmarks.suites.subject import SUBJECTS
from benchmarks.suites.traffic_batch_norm import BUDGET
from benchmarks.suites.traffic_network import (
    COMPILED,
    PER_LAYER,
    VARIANTS,
    WHOLE,
    Part,
    compared,
    fused,
    measure,
    network,
    plan,
    schedule,
)
from fusedres.kernels import layout, tiling
from fusedres.kernels.workspace import num_sms

pytestmark = [pytest.mark.floor, pytest.mark.usefixtures("triton_backend")]
SHAPE = (4, 3, 64, 64)  # large enough for layers of two launches
MIB = 2**20
ROUNDED = MIB * 0.5e-4 + 1  # bytes by which a figure is rounded
# Passes of eager PyTorch, forward and backward: of a BatchNorm with the ReLU and the residual addition behind it.
EAGER = {"bn": (3, 5), "bn_act": (3 + 2, 5 + 3), "bn_add_act": (3 + 3 + 2, 5 + 3)}
LIKE = {"bn": "batch_norm_act", "bn_act": "batch_norm_act", "bn_add_act": "batch_norm_act + residual"}


class Layer(NamedTuple):
    pattern: str
    size: int  # bytes
    on_chip: bool
    compared: int  # bytes: of two values a channel, by every program of the statistics and by the last once more


class Derived(NamedTuple):
    """Passes times bytes, by hand."""

    layers: list[Layer]
    stem: int  # bytes of an activation; of the last block's output, too, and of what blocks get
    pooled: int
    last: int
    inputs: int

    @property
    def forward(self) -> int:
        """Beside the layers: the cast of the images, the pooling with its int64 places, and the average."""
        pixels = SHAPE[0] * SHAPE[1] * SHAPE[2] * SHAPE[3]
        return pixels * (4 + 2) + self.stem + self.pooled * (1 + 4) + self.last + self.last // 4

    @property
    def backward(self) -> int:
        """Beside the layers: two gradients of each block's input, and both poolings, the maximum's filled first."""
        return 3 * self.inputs + self.pooled * (1 + 4) + 2 * self.stem + self.last // 4 + self.last

    def eager(self, phase: int) -> float:
        return sum(EAGER[layer.pattern][phase] * layer.size for layer in self.layers)

    def fused(self, phase: int) -> float:
        name = ("forward", "backward")[phase]
        passes = sum(BUDGET[LIKE[layer.pattern]][name][layer.on_chip] * layer.size for layer in self.layers)
        return passes + sum(layer.compared for layer in self.layers) * (phase == 0)


@pytest.fixture
def miniature(monkeypatch: pytest.MonkeyPatch) -> Part:
    """The suite's network with one narrow block a stage."""
    subject = SUBJECTS["resnet50"]
    monkeypatch.setitem(SUBJECTS, "resnet50", replace(subject, build=subject.miniature))
    return Part("resnet50", BASELINE, SHAPE)


@pytest.fixture
def derived(miniature: Part) -> Derived:
    seen: list[tuple[str, Tensor]] = []
    model = network(miniature.subject.build).to(memory_format=torch.channels_last)  # pyright: ignore
    for name, module in model.named_modules():
        if isinstance(module, (nn.BatchNorm2d, nn.MaxPool2d)):
            module.register_forward_hook(lambda _, __, out, name=name: seen.append((name, out)))
    with torch.no_grad():
        model(torch.randn(SHAPE).to(memory_format=torch.channels_last))
    layers, ends = [], []
    for name, out in seen:
        pattern = "bn" if "downsample" in name else "bn_add_act" if name.endswith("bn3") else "bn_act"
        if name != "maxpool":
            view = layout.rows(out)
            on_chip = tiling.on_chip(view, 2) is not None
            looks = tiling.statistics(view, 2, num_sms(out.device)).programs + 1
            layers.append(Layer(pattern, 2 * out.numel(), on_chip, 0 if on_chip else looks * 2 * 2 * view.C))
        if pattern == "bn_add_act" or name == "maxpool":
            ends.append(2 * out.numel())
    return Derived(layers, layers[0].size, ends[0], ends[-1], sum(ends[:-1]))


def test_what_is_derived_has_both_paths(derived: Derived) -> None:
    assert {layer.on_chip for layer in derived.layers} == {True, False}
    assert len(derived.layers) == 1 + 4 * 4
    assert [layer.pattern for layer in derived.layers].count("bn_add_act") == 4
    assert (derived.stem, derived.pooled) == (2 * 4 * 8 * 32 * 32, 2 * 4 * 8 * 16 * 16)


def moved(answer: dict[str, Any]) -> tuple[float, float]:
    assert answer["status"] == "ok", answer["check"]
    return answer["figures"]["forward_mib"] * MIB, answer["figures"]["backward_mib"] * MIB


def test_eager_moves_what_its_layers_do(miniature: Part, derived: Derived) -> None:
    answer = measure(miniature)
    wanted = derived.eager(0) + derived.forward, derived.eager(1) + derived.backward
    assert moved(answer) == pytest.approx(wanted, abs=ROUNDED)
    figures = answer["figures"]
    norms = sum(layer.size for layer in derived.layers)
    assert figures["norm_mib"] * MIB == pytest.approx(8 * norms, abs=ROUNDED)
    assert figures["accumulation_mib"] * MIB == pytest.approx(3 * derived.inputs, abs=ROUNDED)
    assert (figures["launches"], figures["kernel_mib"]) == (0, 0)


def test_fused_layers_move_what_their_budgets_say(miniature: Part, derived: Derived) -> None:
    """Beside eager's rest, the average's gradient is brought into the layers' memory format."""
    answer = measure(replace(miniature, provider=fused(PER_LAYER)))
    wanted = derived.fused(0) + derived.forward, derived.fused(1) + derived.backward + 2 * derived.last
    assert moved(answer) == pytest.approx(wanted, abs=ROUNDED)
    figures = answer["figures"]
    assert figures["launches"] == 2 * sum(2 - layer.on_chip for layer in derived.layers)
    assert figures["kernel_mib"] * MIB == pytest.approx(derived.fused(0) + derived.fused(1), abs=ROUNDED)
    assert figures["accumulation_mib"] * MIB == pytest.approx(3 * derived.inputs, abs=ROUNDED)
    assert answer["check"]["gradients_l2"][1] < 0.9, "else a gradient of zero would be right"


def test_a_pass_too_many_is_seen(miniature: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy in the forward; its gradient is handed on as it is."""
    plain = measure(miniature)["figures"]

    class Copy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clone()

    def build() -> nn.Module:
        model = SUBJECTS["resnet50"].miniature()
        model.maxpool = nn.Sequential(Copy(), model.maxpool)
        return model

    monkeypatch.setitem(SUBJECTS, "resnet50", replace(miniature.subject, build=build))
    figures = measure(miniature)["figures"]
    stem = 2 * 4 * 8 * 32 * 32 / MIB
    assert figures["forward_mib"] - plain["forward_mib"] == pytest.approx(2 * stem, abs=2e-4)
    assert figures["other_mib"] - plain["other_mib"] == pytest.approx(2 * stem, abs=2e-4)


@pytest.mark.parametrize("readers", [1, 2, 3])
def test_gradients_that_meet_are_added(readers: int) -> None:
    """Two reads and a write for each further reader, also where ATen adds in place."""
    x = torch.randn(2, 16, 8, 8).bfloat16().requires_grad_()
    y = x.relu()
    outputs = [F.relu(y) for _ in range(readers)]
    cotangents = [torch.randn_like(y) for _ in outputs]
    with (meter := NetworkMeter(x)):
        torch.autograd.backward(outputs, cotangents)
    passes = {kind: size / x.nbytes for kind, size in meter.moved(backward=True).items() if size}
    wanted = {"relu": 3.0 * (1 + readers)} | ({"accumulation": 3.0 * (readers - 1)} if readers > 1 else {})
    assert passes == wanted


def test_max_pooling_reads_no_input_in_its_backward() -> None:
    """It reads a gradient and 64-bit places, and fills what it writes."""
    x = torch.randn(2, 16, 8, 8).bfloat16().requires_grad_()
    with (forward := NetworkMeter(x)):
        y = F.max_pool2d(x, 3, 2, 1)
    gradient = torch.randn_like(y)
    with (backward := NetworkMeter(x)):
        y.backward(gradient)
    assert forward.moved(backward=False)["pool"] / x.nbytes == 1 + (1 + 4) / 4
    assert backward.moved(backward=True)["pool"] / x.nbytes == 2 + (1 + 4) / 4


@triton.jit
def _product_kernel(x_ptr, y_ptr):
    offsets = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, tl.dot(x, x))


@triton.jit
def _pool_kernel(x_ptr, y_ptr):
    offsets = tl.arange(0, 128)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets) + tl.load(x_ptr + offsets + 128) + tl.load(x_ptr + offsets))


def test_kernels_by_what_they_do() -> None:
    """Products are counted beside the rest, as convolutions are; what a pooling reads again comes from a cache."""
    x, y = torch.randn(2, 8, 4, 4), torch.empty(2, 8, 4, 4)
    with (meter := NetworkMeter(x)):
        _product_kernel[(1,)](x, y)
        F.conv2d(x, torch.randn(8, 8, 1, 1))
    assert (meter.kernels, meter.operators) == ({}, {})
    assert meter.product_bytes == 4 * x.nbytes
    with (meter := NetworkMeter(x)):
        _pool_kernel[(1,)](x, y)
    assert meter.kernels == {"_pool_kernel": (1, x.nbytes * 3 // 2)}
    assert meter.product_bytes == 0


def test_what_counts_as_an_activation() -> None:
    meter = NetworkMeter(torch.empty(4, 3, 8, 8))
    kinds = {
        "activation": [torch.empty(4, 64, 1, 1, dtype=torch.bfloat16)],
        "mask": [torch.empty(9, dtype=torch.uint8), torch.empty(4, 8, 2, 2, dtype=torch.int64)],
        "vector": [torch.empty(64, 4, 1, 1), torch.empty(4, 64), torch.empty(2, 7, 64), torch.empty(9).int()],
    }  # fmt: skip
    for kind, tensors in kinds.items():
        assert [meter.kind(tensor) for tensor in tensors] == [kind] * len(tensors)


def test_a_weight_that_looks_like_an_activation_is_refused(miniature: Part) -> None:
    for count in (measure, schedule):
        with pytest.raises(BenchmarkError, match="a weight begins with 8"):
            count(replace(miniature, shape=(8, 3, 32, 32)))


class Between(nn.Module):
    """One BatchNorm and ReLU between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 16, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.bn(self.first(x))))


def test_inductors_schedule() -> None:
    """Statistics read x, the rest reads it and writes y; in the backward both kernels read dy, x and y as a mask."""
    model = Between().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    x = torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)
    y = torch.randn(4, 16, 16, 16).to(memory_format=torch.channels_last)
    compiled = torch.compile(model, dynamic=False)
    graphs = scheduled(lambda: compiled(x).backward(y), lambda shape: is_activation(shape, 4))
    assert [(graph.backward, graph.bytes / y.nbytes) for graph in graphs] == [(False, 3), (True, 7)]
    assert [graph.kernels for graph in graphs] == [3, 2], "two, and a counter; two"


@pytest.fixture
def rows() -> Iterator[list[Row]]:
    def row(provider: str, moved: float) -> Row:
        return Row(
            "network", "resnet50", "training", provider, [8], "bfloat16", "channels-last",
            figures={"moved_mib": moved}, check={"ok": True, "complaints": []},
        )  # fmt: skip

    yield [row(BASELINE, 100.0), row(fused(PER_LAYER), 70.0), row(fused(WHOLE), 50.0)]


def test_shares_and_the_budget(rows: list[Row]) -> None:
    baseline, layers, whole = compared(rows)
    assert [row.figures["eager_share"] for row in rows] == [1.0, 0.7, 0.5]
    assert [row.figures["per_layer_share"] for row in rows] == [round(100 / 70, 4), 1.0, round(50 / 70, 4)]
    assert {row.status for row in (baseline, layers, whole)} == {"ok"}, "only the whole network has a budget"


@pytest.mark.parametrize(("moved", "complaint"), [(61.0, "per_layer_share"), (63.0, "eager_share")])
def test_a_network_over_its_budget_is_wrong(rows: list[Row], moved: float, complaint: str) -> None:
    rows[-1].figures["moved_mib"] = moved
    whole = compared(rows)[-1]
    assert whole.status == "WRONG" and not whole.check["ok"]
    assert any(text.startswith(complaint) for text in whole.check["complaints"])


def test_a_variant_that_failed_has_no_share(rows: list[Row]) -> None:
    rows[1].figures.clear()
    rows[1].status = "failed"
    assert [row.figures["per_layer_share"] for row in compared(rows)] == [None, None, None]


def test_a_variant_that_cannot_run_is_a_result(miniature: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "no such", {"nonsense": True})
    [row] = traffic_network.work(replace(miniature, provider=fused("no such")))
    assert row.status == "failed" and "nonsense" in row.note


def test_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(VARIANTS, "without stem", {"disable": {"stem"}})
    request = Request(CPU, tmp_path)
    [case] = plan(request)
    assert case.shape == (8, 3, 64, 64)
    assert {BASELINE, COMPILED, fused(PER_LAYER)} <= set(case.providers) and fused("without stem") not in case.providers
    [case] = plan(replace(request, quick=False, providers=("fusedres",)))
    assert {BASELINE, fused("without stem")} <= set(case.providers) and COMPILED not in case.providers
    assert len(case.keys) == len(case.providers)
    assert plan(replace(request, dtypes=("float32",))) == []
    with pytest.raises(BenchmarkError, match="at least 2 images"):
        plan(replace(request, batches=(1,)))


def test_the_whole_network_is_measured_within_its_budget() -> None:
    measured = {row.provider: row for row in results.read(results.RESULTS / "cpu" / "network.jsonl")}
    assert {fused(name) for name in VARIANTS} <= measured.keys()
    whole = measured[fused(WHOLE)]
    assert whole.status == "ok" and whole.figures["accumulation_mib"] == 0
