"""What is saved for a backward is counted, all of it and once; rows of memory say what they are of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.errors import BenchmarkError
from benchmarks.instruments.interpreter import fast_interpreter, kernels_skipped
from benchmarks.instruments.saved import Saved, saved_for_backward
from benchmarks.providers import BASELINE, EAGER, PROVIDERS
from benchmarks.suite import Request
from benchmarks.suites import memory
from benchmarks.suites.memory import Case

SIZE = 4 * 16 * 8  # bytes of one activation


class _Square(torch.autograd.Function):
    """Keeps its input as the class says: on the context or as autograd wants it."""

    hidden = False

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        if _Square.hidden:
            ctx.x = x.detach()
        else:
            ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        x = ctx.x if _Square.hidden else ctx.saved_tensors[0]
        return 2 * x * grads[0]


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Square, "hidden", True)


def measure(module, x: Tensor) -> Saved:
    owned = [x, *(module.parameters() if isinstance(module, nn.Module) else ())]
    return saved_for_backward(lambda: module(x), owned)


def test_what_autograd_saves_is_counted() -> None:
    x = torch.randn(16, 8, requires_grad=True)
    assert measure(lambda x: _Square.apply(x + 1), x) == Saved(SIZE, SIZE)


@pytest.mark.usefixtures("hidden")
def test_what_is_kept_on_a_context_is_alive_and_not_saved() -> None:
    x = torch.randn(16, 8, requires_grad=True)
    assert measure(lambda x: _Square.apply(x + 1), x) == Saved(0, SIZE)


def test_the_input_parameters_and_the_output_do_not_count() -> None:
    x = torch.randn(16, 8, requires_grad=True)
    module = nn.Linear(8, 8)
    assert measure(module, x) == Saved(0, 0), "an input, a weight, and an output that nobody saved"
    assert measure(lambda x: _Square.apply(x), x) == Saved(0, 0)


def test_a_storage_counts_once() -> None:
    x = torch.randn(16, 8, requires_grad=True)

    def twice(x: Tensor) -> Tensor:
        y = x + 1
        return y.view(-1) * y.flatten() * y.view(2, -1).flatten()

    product = SIZE
    assert measure(twice, x) == Saved(SIZE + product, SIZE + product)


def test_an_output_that_is_saved_counts() -> None:
    x = torch.randn(16, 8, requires_grad=True)
    assert measure(lambda x: x.exp(), x) == Saved(SIZE, SIZE)


BLOCK = Case("basic block", (BASELINE, "fusedres"), (2, 64, 6, 6), "float32", "cpu")
ACTIVATION = 4 * 2 * 64 * 6 * 6
STATISTICS = 4 * 64  # of one vector


def request(tmp_path: Path, **given) -> Request:
    return Request(torch.device("cpu"), tmp_path, **given)


@pytest.fixture(scope="module")
def block() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSEDRES_BACKEND", "triton")
        return memory.measure(BLOCK)


def test_a_block_saves_what_its_formulas_need(block: dict) -> None:
    """Eager: what is normalised, what the ReLUs return, mean and rstd. Kernels: a bit an element for the last ReLU."""
    eager, ours = (block[name]["figures"]["saved_mib"] * 2**20 for name in BLOCK.providers)
    rounding = 2**20 * 1e-4
    assert eager == pytest.approx(4 * ACTIVATION + 4 * STATISTICS, abs=rounding)
    assert ours == pytest.approx(3 * ACTIVATION + ACTIVATION / 32 + 8 * STATISTICS, abs=rounding)
    for answer in block.values():
        assert answer["status"] == "ok", answer
        assert answer["figures"]["alive_mib"] == pytest.approx(answer["figures"]["saved_mib"], rel=0.01)
        assert answer["figures"]["peak_mib"] is None, "no such figure on a CPU"


def test_rows_say_that_kernels_were_interpreted(block: dict) -> None:
    assert block["fusedres"]["note"].startswith("kernels, interpreted")
    assert block[BASELINE]["note"] == ""
    assert block["fusedres"]["check"]["ok"]


def test_what_autograd_does_not_list_is_said() -> None:
    assert "9.0 MiB more" in memory._note(BLOCK, EAGER, {"saved_mib": 1.0, "alive_mib": 10.0})
    assert memory._note(BLOCK, EAGER, {"saved_mib": 1.0, "alive_mib": 1.001}) == ""


def test_a_wrong_provider_has_no_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures = {"saved_mib": 2.0, "alive_mib": 2.0, "peak_mib": None}
    answers = {
        BASELINE: {"figures": dict(figures), "check": {"ok": True}},
        "fusedres": {"figures": dict(figures, saved_mib=1.0), "check": {"ok": False}, "status": "WRONG"},
    }
    monkeypatch.setattr(memory, "apart", lambda *_: answers)
    eager, ours = memory.run(request(tmp_path), [BLOCK])
    assert [eager.figures["saved_share"], ours.figures["saved_share"]] == [1.0, None]
    assert [eager.key, ours.key] == BLOCK.keys
    memory.table([eager, ours])


def test_more_than_the_budget_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = Case("resnet34", (BASELINE, "fusedres + recompute"), (2, 3, 64, 64), "float32", "cpu")
    figures = {"saved_mib": 1.0, "alive_mib": 1.0, "peak_mib": None}
    for saved, status in ((0.72, "ok"), (0.73, "WRONG")):
        answers = {
            BASELINE: {"figures": dict(figures), "check": {"ok": True}},
            "fusedres + recompute": {"figures": dict(figures, saved_mib=saved), "check": {"ok": True}},
        }
        monkeypatch.setattr(memory, "apart", lambda *_, answers=answers: answers)
        assert [row.status for row in memory.run(request(tmp_path), [case])] == ["ok", status]


@pytest.mark.parametrize("workload", ["resnet34", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_networks_keep_to_their_budget(workload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the launchers at work, as in training; what autograd lists, and what is alive."""
    monkeypatch.setenv("FUSEDRES_BACKEND", "triton")
    providers = (BASELINE, "fusedres", "fusedres + recompute")
    case = Case(workload, providers, (2, 3, 128, 128), "float32", "cpu")
    found = {}
    with fast_interpreter(), kernels_skipped(torch.device("cpu")):
        for name in providers:
            found[name] = memory._figures(case, memory._instance(case, name, case.subject.build()))
    for (model, name), most in memory.BUDGET.items():
        if model == workload:
            for kind in ("saved_mib", "alive_mib"):
                assert found[name][kind] <= most * found[BASELINE][kind], (name, kind)


def test_a_provider_that_raises_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(model: nn.Module) -> nn.Module:
        raise RuntimeError("no\nway")

    monkeypatch.setitem(PROVIDERS, "fusedres", type(PROVIDERS[EAGER])("fusedres", True, prepare))
    answer = memory.measure(Case("basic block", ("fusedres",), (2, 64, 6, 6), "float32", "cpu"))
    assert answer["fusedres"] == {"status": "failed", "note": "RuntimeError: no"}


def test_a_process_that_fails_becomes_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def apart(*_: object) -> None:
        raise BenchmarkError("it broke")

    monkeypatch.setattr(memory, "apart", apart)
    rows = list(memory.run(request(tmp_path), [BLOCK]))
    assert [(row.status, row.note, row.figures) for row in rows] == [("failed", "it broke", {})] * 2
    late = list(memory.run(request(tmp_path, seconds=-1.0), [BLOCK]))
    assert [row.status for row in late] == ["not measured"] * 2


def test_plan(tmp_path: Path) -> None:
    cases = memory.plan(request(tmp_path))
    assert [case.workload for case in cases] == ["resnet34"]
    assert all(case.providers == (EAGER, BASELINE, "fusedres", "fusedres + recompute") for case in cases)
    [mlp] = [c for c in memory.plan(request(tmp_path, quick=False)) if c.workload == "residual_mlp"]
    assert mlp.providers == (EAGER, "fusedres", "fusedres + recompute"), "there is no memory format to choose"
    assert memory.plan(request(tmp_path, providers=("fusedres",), batches=(2,)))[0].providers == (BASELINE, "fusedres")
    with pytest.raises(BenchmarkError, match="only float32"):
        memory.plan(request(tmp_path, dtypes=("bfloat16",)))
