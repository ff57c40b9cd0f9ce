"""What is said of torch.compile is what it did: kernels, operators, graph breaks, recompilations; and launches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.errors import BenchmarkError
from benchmarks.instruments.compiled import (
    EXTERN,
    GENERATED,
    AtenCalls,
    Compiled,
    compiled,
    counted_launches,
    recompilations,
)
from benchmarks.suite import Request
from benchmarks.suites import compile_study
from benchmarks.suites.compile_study import MODES, Case, Study
from fusedres.functional import batch_norm_act

BLOCK = Case("basic block", "fusedres", (4, 64, 6, 6), "float32", "cpu")
CODE = """
cpp_fused_relu_0 = async_compile.cpp_pybinding(['const float*'])
triton_poi_fused_add_1 = async_compile.triton('triton_poi_fused_add_1', '''
def call(self, args):
        buf0 = extern_kernels.convolution(primals_2, primals_1, stride=(1, 1))
        assert_size_stride(buf0, (4, 64, 8, 8), (4096, 1, 512, 64), 'torch.ops.aten.convolution.default')
        # buffer buf5 (op: torch.ops.aten.convolution_backward.default) is assumed to be not aligned
        cpp_fused_relu_0(buf0)
        triton_poi_fused_add_1.run(buf0, buf1, stream=stream0)
        triton_poi_fused_add_1.run(buf1, buf2, stream=stream0)
        buf4 = torch.ops.aten.convolution_backward.default(buf3, relu)
        torch.ops.fusedres.batch_norm_stats.default(buf3)
        extern_kernels.mm(buf3, buf4, out=buf5)
"""


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with config.patch({"cpp.vec_isa_ok": True}):  # no probes: they take longer than the rest
        yield


def test_calls_in_generated_code() -> None:
    assert len(GENERATED.findall(CODE)) == 3, "calls, not definitions"
    assert len(EXTERN.findall(CODE)) == 3, "not names in assertions and comments, and not our operators"


@pytest.mark.usefixtures("empty_cache")
def test_accounts_of_a_compiled_step() -> None:
    """One kernel reads 8 x 8 floats and writes as many; a product is left to the library; a print breaks the graph."""
    weight = torch.randn(8, 8)

    @torch.compile
    def step(x: Tensor) -> Tensor:
        y = F.relu(x) + 1
        torch._dynamo.graph_break()
        return y @ weight

    found = compiled(lambda: step(torch.randn(8, 8)))
    assert found == Compiled(generated=1, extern=1, generated_bytes=2 * 4 * 64, graph_breaks=1)
    again = compiled(lambda: step(torch.randn(8, 8)))
    assert again == Compiled(None, None, None, graph_breaks=1), "out of a cache, which says nothing"


def test_recompilations() -> None:
    @torch.compile(backend="eager")
    def dynamic(x: Tensor) -> Tensor:
        return x + 1

    @torch.compile(backend="eager", dynamic=False)
    def static(x: Tensor) -> Tensor:
        return x + 1

    assert recompilations(lambda batch: dynamic(torch.randn(batch, 3)), [6, 5, 4]) == [1, 1, 0]
    assert recompilations(lambda batch: static(torch.randn(batch, 3)), [6, 5, 4]) == [1, 1, 1]


@pytest.mark.usefixtures("triton_backend")
def test_launches_and_their_arguments() -> None:
    """The evaluation kernel reads its input and four vectors, and writes its output."""
    x, vectors = torch.randn(2, 8, 4, 4), [torch.rand(8) for _ in range(4)]
    with counted_launches() as launches:
        batch_norm_act(x, *vectors, act="relu")
    assert launches.count == 1
    assert launches.bytes == 4 * (2 * x.numel() + 4 * 8)


def test_aten_calls_that_compute() -> None:
    x = torch.randn(4, 4)
    with AtenCalls() as calls:
        torch.empty_like(x).copy_(x.view(16).detach().view(4, 4).t().relu())
    assert calls.names == ["relu", "copy_"]


@pytest.mark.usefixtures("triton_backend")
def test_a_block_launches_what_its_layers_need() -> None:
    answers = compile_study.study(BLOCK)
    training, inference = (answers[mode]["figures"] for mode in MODES)
    assert all(answer["status"] == "ok" and answer["check"]["ok"] for answer in answers.values()), answers
    assert (training["launches"], inference["launches"]) == (4, 2), "on-chip: one a layer and direction"
    assert inference["extern_kernels"] == 2, "two convolutions"
    assert training["saved_mib"] == pytest.approx(training["alive_mib"], rel=0.01)
    assert training["kernels"] is None and training["compile_cold_s"] is None, "nothing was compiled"
    assert "interpreted" in answers["training"]["note"]


def test_steps_see_no_gradients_of_before() -> None:
    study = Study(BLOCK)
    instance = study.instance(lambda model: model)
    step = study.step(instance, "training", study.x)
    step()
    first = [parameter.grad.clone() for parameter in instance.module.parameters()]
    step()
    torch.testing.assert_close([parameter.grad for parameter in instance.module.parameters()], first)


def test_a_case_that_cannot_run_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(model: nn.Module) -> nn.Module:
        raise torch.OutOfMemoryError("too large\nfor this")

    monkeypatch.setitem(compile_study.PREPARE, "fusedres", prepare)
    answers = compile_study.study(BLOCK)
    assert [answers[mode]["status"] for mode in MODES] == ["OOM", "OOM"]
    assert answers["training"]["note"] == "OutOfMemoryError: too large"


def test_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The seconds of the second process are the warm ones; nothing else of it counts."""
    asked: list[tuple[bool, str]] = []

    def apart(function: Any, environment: dict[str, str], case: Case) -> dict:
        warm = getattr(function, "keywords", {}).get("warm", False)
        asked.append((warm, environment["TORCHINDUCTOR_CACHE_DIR"]))
        figures = {"compile_warm_s": 1.0} if warm else {"compile_cold_s": 9.0, "launches": 4.0}
        return {mode: {"figures": dict(figures), "check": {"ok": True}} for mode in MODES}

    monkeypatch.setattr(compile_study, "apart", apart)
    rows = list(compile_study.run(Request(torch.device("cpu"), tmp_path), [BLOCK]))
    assert [warm for warm, _ in asked] == [False, True]
    assert len({folder for _, folder in asked}) == 1
    assert [row.key for row in rows] == BLOCK.keys
    assert rows[0].figures == {"compile_cold_s": 9.0, "launches": 4.0, "compile_warm_s": 1.0}
    compile_study.table(rows)
    late = list(compile_study.run(Request(torch.device("cpu"), tmp_path, seconds=-1.0), [BLOCK]))
    assert [row.status for row in late] == ["not measured"] * 2


def test_plan(tmp_path: Path) -> None:
    def plan(**given) -> list[Case]:
        return compile_study.plan(Request(torch.device("cpu"), tmp_path, **given))

    assert [(case.workload, case.provider) for case in plan()] == [
        ("basic block", "torch.compile"), ("basic block", "fusedres"),
    ]  # fmt: skip
    assert {case.workload for case in plan(quick=False)} == {"basic block", "resnet34", "resnet50"}
    assert [case.provider for case in plan(providers=("fusedres + compile",))] == ["fusedres + compile"]
    with pytest.raises(BenchmarkError, match="at least 4"):
        plan(batches=(3,))
    with pytest.raises(BenchmarkError, match="only float32"):
        plan(dtypes=("float16",))
