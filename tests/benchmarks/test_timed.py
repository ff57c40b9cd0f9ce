"""Timed suites: nothing wrong is reported, what cannot run is a row, and what is timed is what is said."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
from benchmarks import layers, parity, providers, rivals, timing, workloads
from benchmarks.errors import BenchmarkError
from benchmarks.providers import BASELINE, EAGER, PROVIDERS, Provider
from benchmarks.results import Row
from benchmarks.suite import CPU, Request
from benchmarks.suites import timed
from benchmarks.suites.timed import Timed
from benchmarks.timing import Batch
from benchmarks.workloads import TIMED, Workload

GPU = torch.device("cuda")
REQUEST = Request(CPU, Path("unused"), seconds=60)
BLOCK = Workload(
    "basic block", workloads.basic_block, "float32", (2,), (64, 6, 6), (workloads.CLASSES,), check=(4, 64, 6, 6),
    channels_last=True, compiled=False,
)  # fmt: skip
LINEAR = workloads.linear_layers(24, 24, "bfloat16", (8,), compiled=())
NORMS = [
    workloads.norm_layer(kind, 16, 5, 5, dtype="bfloat16", batches=(4,), compiled=False)
    for kind in workloads.NORM_LAYERS
]
LAYERS = [*LINEAR, *NORMS]


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRES_BACKEND", "reference")
    monkeypatch.setattr(timed, "MODEL_SECONDS", {"cuda": 0.0, "cpu": 0.0})
    monkeypatch.setattr(timed, "LAYER_SECONDS", 0.0)
    monkeypatch.setattr(timed, "MIN_ROUNDS", {"cpu": 3})


def measure(workload: Workload, *chosen: Provider, request: Request = REQUEST) -> list[Row]:
    entrants = tuple(workload.entrants(list(chosen)))
    return list(timed.run(request, [Timed("suite", workload, batch, entrants) for batch in workload.batches]))


def changed(change: Callable[[nn.Module], object]) -> Callable[[nn.Module], nn.Module]:
    def prepare(model: nn.Module) -> nn.Module:
        change(model)
        return model

    return prepare


def test_model_rows():
    rows = measure(BLOCK, *providers.select(["fusedres", "eager"], CPU))
    assert [row.provider for row in rows if row.mode == "training"] == [BASELINE, EAGER, "fusedres"]
    for row in rows:
        assert row.status == "ok", row
        assert row.check["ok"]
        figures: Any = row.figures
        environment: Any = row.environment
        assert figures["peak_mib"] is figures["host_us"] is None, "no such figures on a CPU"
        assert figures["ms_q1"] <= figures["ms"] <= figures["ms_q3"]
        assert figures["speedup_low"] <= figures["speedup"] <= figures["speedup_high"]
        assert figures["speedup"] == 1.0 or row.provider != BASELINE
        assert (figures["forward_ms"] is None) == (row.mode == "inference")
        assert row.environment["torch"] == torch.__version__
        assert environment["copy_gb_s"] > 0
        assert environment["matmul_tflop_s"] > 0


@pytest.mark.parametrize("workload", LAYERS, ids=lambda workload: workload.name)
def test_layer_rows(workload: Workload):
    rows = measure(workload, *providers.select(None, CPU))
    assert {row.provider for row in rows} == {EAGER, "fusedres", *([BASELINE] if workload.channels_last else [])}
    for row in rows:
        assert row.status == "ok", row
        assert {"outputs_l2", "evaluation_l2", "gradient of input 1_max"} < set(row.check)
        assert ("gradient of input 2_l2" in row.check) == ("add" in workload.name)
        assert any("statistics" in name for name in row.check) == (workload in NORMS)
        assert row.figures["speedup"] == 1.0 or row.provider != workload.baseline
        rate, share = ("gb_s", "bandwidth_share") if workload in NORMS else ("tflop_s", "matmul_share")
        assert all((row.figures[name] or 0) > 0 for name in (rate, share))


def test_a_wrong_provider_gets_no_speedup():
    class SlightlyOff(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x) * 1.001

        def load_state_dict(self, state, *args, **kwargs):  # pyright: ignore[reportIncompatibleMethodOverride]
            return self.model.load_state_dict(state, *args, **kwargs)

    rows = measure(BLOCK, PROVIDERS[BASELINE], Provider("wrong", True, SlightlyOff))
    assert {(row.provider, row.status) for row in rows} == {(BASELINE, "ok"), ("wrong", "WRONG")}
    for row in rows:
        assert row.provider != "wrong" or all(row.figures[f"speedup{end}"] is None for end in ("", "_low", "_high"))


@pytest.mark.parametrize("workload", LAYERS, ids=lambda workload: workload.name)
@pytest.mark.parametrize("parameter", ["bias", "weight"])
def test_a_layer_with_one_wrong_gradient_is_wrong(workload: Workload, parameter: str):
    def change(model: nn.Module) -> None:
        norm = next(m for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm2d)))
        getattr(norm, parameter).register_hook(lambda grad: 1.2 * grad)

    rows = measure(workload, Provider("wrong", workload.channels_last, changed(change)))
    assert {(row.provider, row.status) for row in rows} == {(workload.baseline, "ok"), ("wrong", "WRONG")}


def test_wrong_statistics_are_wrong():
    def change(model: nn.Module) -> None:
        next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).momentum = 0.11

    rows = measure(NORMS[1], Provider("wrong", True, changed(change)))
    assert {row.status for row in rows if row.provider == "wrong"} == {"WRONG"}


def test_a_provider_that_raises_is_a_row():
    def prepare(model: nn.Module) -> nn.Module:
        return nn.Sequential(model, nn.Linear(3, 3))

    rows = measure(BLOCK, PROVIDERS[BASELINE], Provider("broken", True, prepare))
    broken = [row for row in rows if row.provider == "broken"]
    assert broken
    assert all(row.status == "failed" and "RuntimeError" in row.note and not row.figures for row in broken)


def test_a_provider_that_has_no_such_layer_is_a_row():
    def prepare(model: nn.Module) -> nn.Module:
        raise rivals.Unsupported("no such layer")

    rows = measure(BLOCK, PROVIDERS[BASELINE], Provider("rival", True, prepare))
    found = [row for row in rows if row.provider == "rival"]
    assert [(row.status, row.note) for row in found] == [("unsupported", "Unsupported: no such layer")] * 2


def test_out_of_memory_is_a_row():
    def prepare(model: nn.Module) -> nn.Module:
        def hook(*_: object) -> None:
            if model.training:
                raise torch.OutOfMemoryError("CUDA out of memory")

        model.register_forward_hook(hook)
        return model

    rows = measure(BLOCK, PROVIDERS[BASELINE], Provider("large", True, prepare))
    assert [row.status for row in rows if row.provider == "large"] == ["OOM", "failed"], "not checked: not timed"
    assert {row.status for row in rows if row.provider == BASELINE} == {"ok"}


def test_out_of_memory_in_the_check_is_a_row(monkeypatch: pytest.MonkeyPatch):
    """float64 takes more than any provider; nothing is left to time then."""

    def check(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(parity, "check", check)
    rows = measure(BLOCK, PROVIDERS[BASELINE], PROVIDERS["fusedres"])
    assert len(rows) == 4
    assert all(row.status == "OOM" and "check" in row.note and not row.figures for row in rows)


def test_out_of_memory_while_timing_is_a_row(monkeypatch: pytest.MonkeyPatch):
    def interleave(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(timing, "interleave", interleave)
    rows = measure(BLOCK, PROVIDERS[BASELINE])
    assert [(row.status, row.figures) for row in rows] == [("OOM", {})] * 2


def test_providers_share_their_inputs():
    """In the format that most of them want; a copy for each would not fit a GPU."""
    for workload in LAYERS:
        [batch] = timed._Measurement(workload, CPU)._batches((4, *workload.sample))[:1]
        wanted = batch.formatted(torch.channels_last)
        assert [x.data_ptr() for x in batch.inputs] == [x.data_ptr() for x in wanted.inputs]
        assert [x.data_ptr() for x in batch.target] == [x.data_ptr() for x in wanted.target]


def test_a_layer_that_is_right_now_and_then_is_wrong():
    turns = iter(range(1000))

    def change(model: nn.Module) -> None:
        def hook(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
            return output if next(turns) // 2 % 5 == 4 else 1.1 * output  # training and evaluation take turns

        model.register_forward_hook(hook)

    rows = measure(NORMS[1], Provider("racy", True, changed(change)))
    assert {row.status for row in rows if row.provider == "racy"} == {"WRONG"}


@pytest.mark.parametrize("error", [float("inf"), 0.0])
def test_nobody_is_right_where_eager_is_not_finite(error: float):
    rows = [{"outputs": (error, error)}]
    assert not parity._verdict(rows, [[{"outputs": (float("inf"),) * 2}]], torch.float16)["ok"]


def test_the_memory_of_captured_graphs_is_not_a_step_s(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "peak_memory_mib", lambda step, device: 5.0)
    graphed = Provider("graphed", True, lambda model: model, replays=True)
    rows = measure(NORMS[0], PROVIDERS[BASELINE], graphed)
    assert {(row.provider, row.figures["peak_mib"]) for row in rows} == {(BASELINE, 5.0), ("graphed", None)}


def test_out_of_time_is_said():
    request = replace(REQUEST, seconds=-1)
    cases = timed.plan("models", request)
    rows = list(timed.run(request, cases))
    assert [row.key for row in rows] == [key for case in cases for key in case.keys]
    assert {row.status for row in rows} == {"not measured"}


def test_what_is_there_is_left_out_but_for_the_baseline():
    chosen = providers.select(["eager", BASELINE, "fusedres"], CPU)
    case = Timed("suite", BLOCK, 2, tuple(chosen))
    there = frozenset(key for key in case.keys if key[2] != "fusedres")
    rows = list(timed.run(replace(REQUEST, there=there), [case]))
    assert {row.provider for row in rows} == {BASELINE, "fusedres"}
    assert {row.key for row in rows} | there == set(case.keys)


@pytest.mark.parametrize("suite", TIMED)
@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("quick", [True, False])
def test_workloads_fit_their_modules(suite: str, device: torch.device, quick: bool):
    found = workloads.workloads(suite, Request(device, Path("unused"), quick=quick))
    assert found
    assert len({(w.name, w.dtype) for w in found}) == len(found)
    for workload in found:
        with torch.device("meta"):
            model, x = workload.build(), torch.empty(2, *workload.sample)
        outputs = timing.as_tuple(model(*[x] * workload.inputs))
        assert {y.shape for y in outputs} == {(2, *workload.output)}, workload
        assert not workload.layer or sum(isinstance(m, nn.ReLU) for m in model.modules()) <= 1


def test_batches_are_replaced():
    found = workloads.workloads("kernels", replace(REQUEST, batches=(3, 5)))
    assert {w.batches for w in found} == {(3, 5)}


def test_every_batch_norm_shape_is_there():
    """Those of ResNet-50 and -34 at 224x224, from the papers' tables of output sizes."""
    shapes = set(workloads.batch_norm_shapes())
    assert {("bn+relu", 64, 112, 112), ("bn+relu", 64, 56, 56), ("bn+relu", 128, 56, 56)} < shapes
    for channels, side in ((256, 56), (512, 28), (1024, 14), (2048, 7)):
        assert {("bn", channels, side, side), ("bn+add+relu", channels, side, side)} < shapes
    for channels, side in ((64, 56), (128, 28), (256, 14), (512, 7)):
        assert {("bn+relu", channels, side, side), ("bn+add+relu", channels, side, side)} < shapes
    for channels, side in ((256, 56), (512, 28), (1024, 14), (2048, 7), (128, 28), (256, 14), (512, 7)):
        assert ("bn+add+bn+relu", channels, side, side) in shapes
    assert {("bn+relu+maxpool", 64, 112, 112), ("bn+add+relu+avgpool", 2048, 7, 7)} < shapes
    assert len(shapes) == 23 + 7 + 1 + 2


def test_providers_on_devices():
    names = [p.name for p in providers.select(None, GPU)]
    assert names[:2] == [EAGER, BASELINE]
    assert {"torch.compile", "fusedres", "fusedres + compile", "fusedres + CUDA graph"} < set(names)
    assert "torch.compile max-autotune" not in names, "asked for by name"
    assert "fusedres + CUDA graph" not in [p.name for p in providers.select(None, CPU)]
    for name, message in (("jax", "unknown provider 'jax'"), ("fusedres + CUDA graph", "it needs a GPU")):
        with pytest.raises(BenchmarkError, match=message):
            providers.select([name], CPU)


def test_the_join_is_the_same_fused():
    torch.manual_seed(0)
    model = layers.AddBatchNormRelu(6).double()
    fused = layers.fused(copy.deepcopy(model))
    x, residual = torch.randn(2, 2, 6, 5, 5, dtype=torch.float64)
    for wanted, found in zip(model(x, residual), fused(x, residual), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert fused.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(fused.state_dict(), model.state_dict())


def test_signs_that_rounding_decides_do_not_count():
    torch.manual_seed(0)
    model = layers.norm_linear_relu(16, 16).bfloat16()
    x, cotangent = (torch.randn(64, 16, dtype=torch.bfloat16) for _ in range(2))
    batch = parity._without_ties(copy.deepcopy(model).double(), Batch((x,), (cotangent,)), torch.bfloat16)
    [wanted] = batch.target
    z = nn.Sequential(*list(model.children())[:2])(x)
    assert 0 < (wanted == 0).sum() < 0.2 * wanted.numel()
    assert z[wanted == 0].abs().max() < z[wanted != 0].abs().median()
    assert torch.equal(wanted[wanted != 0], cotangent[wanted != 0])


def test_parity_sees_a_small_error():
    torch.manual_seed(0)
    model = workloads.basic_block()
    labels = torch.tensor([1, 2, 3, 4])
    batches = [Batch((torch.randn(4, 64, 6, 6),), labels) for _ in range(2)]
    right = providers.instantiate(PROVIDERS["fusedres"], model, CPU)
    wrong = providers.instantiate(PROVIDERS["fusedres"], model, CPU)
    for norm in (m for m in wrong.module.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eps = 2e-5
    assert parity.check([right], model, batches, torch.float32)["fusedres"]["ok"]
    assert not parity.check([wrong], model, batches, torch.float32)["fusedres"]["ok"]


def test_interleaving_takes_turns(monkeypatch: pytest.MonkeyPatch):
    """Forwards and backwards, each step right behind itself, and none with the inputs that were just in the cache."""
    monkeypatch.setattr(timing, "SETTLED", 0)
    calls: list[tuple[str, int, bool]] = []

    def step(name: str) -> timing.Step:
        return lambda turn, mark: calls.append((name, turn, mark is not timing._no_mark))

    samples = timing.interleave({name: step(name) for name in "abc"}, CPU, 6)
    timed = [(name, turn) for name, turn, is_timed in calls if is_timed]
    assert "".join(name for name, _ in timed) == "abccbabcaacbcabbac"
    assert [turn for _, turn in timed] == list(range(18))
    assert [(name, turn) for name, turn, is_timed in calls if not is_timed] == [
        (name, turn - 1) for name, turn in timed
    ]
    assert {name: len(values) for name, values in samples.items()} == {"a": 6, "b": 6, "c": 6}


def test_inputs_take_turns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "SETTLED", 0)
    seen = []
    instance = providers.instantiate(PROVIDERS[EAGER], nn.Linear(3, 2), CPU)
    instance.call = lambda x: seen.append(x.data_ptr()) or instance.module(x)
    batches = [Batch((torch.randn(4, 3),), (torch.randn(4, 2),)) for _ in range(3)]
    for build in timing.STEPS.values():
        seen.clear()
        timing.interleave({"a": build(instance, batches, torch.float32)}, CPU, 7)
        timed = seen[1::2]  # the others go before each
        assert len(set(timed)) == 3
        assert timed[:3] == timed[3:6]


def test_parts_of_a_step():
    figures = timing.summary([[1, 2, 0.5], [2, 3, 0.5], [3, 4, 0.5]])
    assert figures == {"ms": 5.5, "ms_q1": 4.5, "ms_q3": 6.5, "forward_ms": 2, "backward_ms": 3}
    assert timing.summary([[1], [2], [3], [4], [5]])["ms_q3"] == 4
    assert timing.summary([[1], [2]])["forward_ms"] is None


def test_interval_of_a_ratio():
    rounds = [[1.0 + 0.001 * (i % 7)] for i in range(50)]
    clear = timing.speedup([[2 * lap for lap in laps] for laps in rounds], rounds)
    assert clear["speedup_low"] <= clear["speedup"] == 2.0 <= clear["speedup_high"]
    assert clear["speedup_high"] - clear["speedup_low"] < 0.02
    noisy = timing.speedup([[1.0], [9.0]] * 10, [[9.0], [1.0]] * 10)
    assert noisy["speedup_low"] < 0.5
    assert noisy["speedup_high"] > 2
    assert timing.speedup(rounds, rounds) == {"speedup": 1.0, "speedup_low": 1.0, "speedup_high": 1.0}


def test_on_a_gpu_the_host_is_ahead(monkeypatch: pytest.MonkeyPatch):
    """Of what is queued while the GPU waits, the events see the GPU's time alone."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, other: Event) -> float:
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("idle"))

    def step(turn: int, mark: Callable[[], None]) -> None:
        mark()
        log.append("step")

    assert timing.laps(step, 0, GPU, queued=True) == [2.5, 2.5]
    assert log == ["idle", "sleep", "event", "event", "step", "event", "idle"]
    log.clear()
    assert timing.milliseconds(lambda: log.append("call"), GPU) == 2.5
    assert log == ["idle", "sleep", "event", "call", "event", "idle"]
    log.clear()
    assert (timing.host_microseconds(lambda turn, mark: log.append("step"), GPU, calls=1) or 0) > 0
    assert log == ["idle", "sleep", "step", "idle"]


@pytest.mark.filterwarnings("ignore:User provided device_type")
def test_a_graph_is_captured_once_for_each_mode_and_shape(monkeypatch: pytest.MonkeyPatch):
    captured: list[tuple[bool, tuple[int, ...]]] = []

    def capture(call: nn.Module, samples: tuple[torch.Tensor, ...]) -> nn.Module:
        assert not torch.is_autocast_cache_enabled()
        assert [x.requires_grad for x in samples] == [True, True]
        captured.append((next(call.children()).training, tuple(samples[0].shape)))
        return call

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    workload = NORMS[2]
    instance = providers.instantiate(replace(PROVIDERS["fusedres + CUDA graph"]), workload.build(), CPU)
    parts = []
    for batch in (4, 6):
        measurement = timed._Measurement(replace(workload, dtype="float32"), CPU)
        step = timing.train_step(instance, measurement._batches((batch, *workload.sample)), torch.float32)
        parts += timing.interleave({"graph": step}, CPU, 3)["graph"]
    assert captured == [(True, (4, *workload.sample)), (True, (6, *workload.sample))]
    assert [len(laps) for laps in parts] == [3] * 6
