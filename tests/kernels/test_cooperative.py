"""The forward in one cooperative launch: arithmetic interpreted, waiting in generated code, all of it on a GPU."""

from __future__ import annotations

import re
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks.instruments import codegen
from benchmarks.instruments.launches_batch_norm import cooperative_launches
from fusedres import reference
from fusedres.functional import add_batch_norm_act, batch_norm_act
from fusedres.kernels import batch_norm_cooperative, tiling
from fusedres.kernels.layout import rows
from fusedres.ops import preference
from tests.kernels.compiled import compiled
from tests.oracle import batch_norm_inputs, check_batch_norm

CPU = torch.device("cpu")
FUNCTIONS = ["plain", "residual", "add"]


@pytest.fixture
def cooperative(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """Asked for, on CPU tensors too, and nothing fits one program; a mock of the launcher, which runs."""
    monkeypatch.setenv("FUSEDRES_BACKEND", "triton")
    monkeypatch.setenv("FUSEDRES_COOPERATIVE", "on")
    monkeypatch.setattr(preference, "TIMED", ("cpu", "cuda"))
    monkeypatch.setattr(tiling, "on_chip", lambda view, itemsize: None)
    launcher = mock.Mock(side_effect=batch_norm_cooperative.batch_norm_fwd_cooperative)
    for module in ("batch_norm_cooperative", "add_batch_norm"):
        monkeypatch.setattr(f"fusedres.kernels.{module}.batch_norm_fwd_cooperative", launcher)
    return launcher


def check(function: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, channels_last: bool) -> None:
    given: dict[str, Any] = {"channels_last": channels_last, "training": True, "act": "relu"}
    inputs = batch_norm_inputs(shape, dtype, residual=function != "plain")
    if function == "add":
        check_batch_norm(add_batch_norm_act, inputs, device, eager=reference.add_batch_norm_act, **given)
    else:
        check_batch_norm(batch_norm_act, inputs, device, **given)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_program_a_channel_tile(cooperative, function, channels_last, dtype):
    """Which finds all that have to arrive in itself."""
    check(function, (2, 19, 4, 4), dtype, CPU, channels_last)
    assert cooperative.called


@pytest.mark.parametrize("channels_last", [True, False])
def test_many_programs(channels_last):
    """The interpreter runs one program after the other, so that none may wait. In a second launch each finds what all
    have published in the first."""
    x = 100 + torch.randn(4, 19, 31, 31).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    view, kept = rows(x), {}
    config = tiling.cooperative(view, x.itemsize, 132)
    assert config is not None and config.programs > 3
    empty = torch.empty

    def again(shape: Any, **options: Any) -> Tensor:
        return kept.setdefault(str(shape), empty(shape, **options))

    def launch() -> tuple[Tensor, Tensor, list[Tensor]]:
        buffers = [torch.zeros(19), torch.ones(19), torch.tensor(0)]
        y, stats, _ = batch_norm_cooperative.batch_norm_fwd_cooperative(
            x, None, view, config, None, None, *buffers, None, 1e-5, "relu", False
        )
        return y, stats, buffers

    with mock.patch.object(batch_norm_cooperative, "_await", lambda *_: None), mock.patch("torch.empty", again):
        launch()
        y, stats, (_, var, count) = launch()
    exact = torch.var_mean(x.double(), (0, 2, 3))
    torch.testing.assert_close(stats[0].double(), exact[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact[0], rtol=1e-5, atol=0)
    assert count == 1
    expected = reference.batch_norm_act(x.double(), None, None, training=True, act="relu")
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=2e-5)


def test_nothing_waits_where_it_was_not_measured(cooperative, monkeypatch):
    monkeypatch.delenv("FUSEDRES_COOPERATIVE")
    check("plain", (2, 19, 4, 4), torch.float32, CPU, True)
    assert not cooperative.called


def test_made_up_figures_switch_it_on(cooperative, monkeypatch):
    monkeypatch.delenv("FUSEDRES_COOPERATIVE")
    monkeypatch.setattr(preference, "device_name", lambda device: "none")
    for ratio, expected in ((0.9, False), (1.1, True)):
        table = {"none": {"cooperative": {"bn+relu training float32": [[32, 19, ratio]]}}}
        monkeypatch.setattr(preference, "_MEASURED", table)
        preference.measured_speed.cache_clear()
        x = torch.randn(2, 19, 4, 4).contiguous(memory_format=torch.channels_last)
        batch_norm_act(x, None, None, training=True, act="relu")
        assert cooperative.called is expected


def code(arch: str, form: str) -> str:
    """What the compiler makes of the kernel."""
    [launch] = cooperative_launches((4, 64, 56, 56), torch.bfloat16, channels_last=True, residual=True, add=False)
    read = "_read_amd" if arch.startswith("gfx") else "_read_nvidia"
    with mock.patch.object(codegen, read, lambda result: result.asm[form]):
        return cast(Any, codegen.compile_launch).__wrapped__(launch, arch)  # not what is cached


@pytest.mark.codegen
@pytest.mark.floor
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100"])
def test_waiting_acquires(arch):
    """A loop of acquiring loads or atomics between the arrival and the partial results, then a barrier."""
    text = compiled(code, arch, "ptx")
    arrival = text.index("atom.global.gpu.acq_rel")
    between = text[arrival : text.index("ld.global.cg", arrival)]
    loop = re.search(
        r"(\$L__BB\w+):.*?(?:ld\.global\.gpu\.acquire|atom\.global\.gpu\.acquire).*?bra\s+\1;", between, re.S
    )
    assert loop, between
    assert "bar.sync" in between[loop.end() :]
    assert "st.global" not in between[: loop.end()], "something is stored behind the arrival"


@pytest.mark.codegen
@pytest.mark.floor
def test_waiting_is_not_hoisted_on_amd():
    text = compiled(code, "gfx942", "llir")
    assert re.search(r"(?:load atomic|atomicrmw \w+) [^\n]* acquire,", text), "the wait is no atomic"


@pytest.mark.gpu
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 64, 56, 56), (2, 256, 28, 28), (1, 67, 56, 56)], ids=str)
def test_oracle_on_a_gpu(cooperative, shape, dtype, channels_last, function):
    check(function, shape, dtype, torch.device("cuda"), channels_last)


def activation(shape: tuple[int, ...] = (4, 64, 56, 56)) -> Tensor:
    return torch.randn(shape, device="cuda").bfloat16().contiguous(memory_format=torch.channels_last)


def forward(x: Tensor) -> list[Tensor]:
    mean, var = torch.zeros(x.shape[1], device="cuda"), torch.ones(x.shape[1], device="cuda")
    count = torch.zeros((), dtype=torch.int64, device="cuda")
    out = batch_norm_act(x, mean, var, training=True, momentum=None, act="relu", num_batches_tracked=count)
    return [out, mean, var, count]


@pytest.mark.gpu
def test_bit_for_bit(cooperative):
    """Launch after launch: a program that left too early, or counters that did not return to zero, would show."""
    x = activation()
    first, wrong = forward(x), torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(10_000):
        for got, want in zip(forward(x), first, strict=True):
            wrong += (got != want).any()
    assert wrong.item() == 0
    assert cooperative.called


@pytest.mark.gpu
def test_as_two_launches_give(cooperative, monkeypatch):
    x = activation()
    ours = forward(x)
    monkeypatch.setenv("FUSEDRES_COOPERATIVE", "off")
    for got, want in zip(ours, forward(x), strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
def test_two_streams_at_once(cooperative):
    inputs = [activation() for _ in range(2)]
    expected = [forward(x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(500):
        results = []
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                results.append(forward(x))
        torch.cuda.synchronize()
        for result, wanted in zip(results, expected, strict=True):
            assert all(torch.equal(got, want) for got, want in zip(result, wanted, strict=True))


@pytest.mark.gpu
def test_replays_of_a_graph(cooperative):
    x = activation()
    forward(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward(x)
    for _ in range(100):
        x.copy_(activation())
        graph.replay()
        assert all(torch.equal(got, want) for got, want in zip(captured[:1], forward(x)[:1], strict=True))
