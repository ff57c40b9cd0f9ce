"""The benchmarks' own rules: nothing wrong is reported, bad requests end in one line, the README matches the rows."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
from benchmarks import digits, parity, providers, report, results, timing, timing_suite, traffic_suite, workloads
from benchmarks.suites.digits import Curve, Recipe
from benchmarks.providers import BASELINE, EAGER, Provider
from benchmarks.results import Row
from benchmarks.workloads import Workload

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def reference_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRES_BACKEND", "reference")


class _SlightlyOff(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x) * 1.001


BLOCK = Workload(
    "residual block", workloads.residual_block, "float32", (2,), (64, 6, 6), workloads.CLASSES, (4, 64, 6, 6),
    channels_last=True, compiled=False,
)  # fmt: skip
LAYERS = workloads.layers(24, 24, "bfloat16", (8, 40), compiled=())


def _measure(workload: Workload, *chosen: Provider, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    monkeypatch.setattr(timing_suite, "CASE_SECONDS", 0.0)
    return list(timing_suite.run("models", CPU, list(chosen), [workload], seconds_limit=60))


def test_models_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _measure(BLOCK, *providers.select(["fusedres", "eager"]), monkeypatch=monkeypatch)
    assert [row.provider for row in rows if row.mode == "training"] == [BASELINE, EAGER, "fusedres"]
    for row in rows:
        assert row.status == "ok", row
        assert row.check["ok"]
        assert row.figures["peak_mib"] is None, "no such figure on a CPU"
        assert (row.figures["ms_q1"] or 0) <= (row.figures["ms"] or 0) <= (row.figures["ms_q3"] or 0)
        assert row.environment["torch"] == torch.__version__
        assert (row.figures["speedup"] == 1.0) or row.provider != BASELINE


def test_a_wrong_provider_gets_no_speedup(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Provider("wrong", True, _SlightlyOff)
    rows = _measure(BLOCK, providers.PROVIDERS[BASELINE], wrong, monkeypatch=monkeypatch)
    verdicts = {(row.provider, row.status) for row in rows}
    assert verdicts == {(BASELINE, "ok"), ("wrong", "WRONG")}
    assert all(row.figures["speedup"] is None for row in rows if row.provider == "wrong")
    assert "| WRONG |" in report._timings_table(rows)


def test_a_provider_that_raises_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(model: nn.Module) -> nn.Module:
        return nn.Sequential(model, nn.Linear(3, 3))

    rows = _measure(BLOCK, providers.PROVIDERS[BASELINE], Provider("broken", True, prepare), monkeypatch=monkeypatch)
    broken = [row for row in rows if row.provider == "broken"]
    assert broken
    assert all(row.status == "failed" and "RuntimeError" in row.note and not row.figures for row in broken)


@pytest.mark.parametrize("workload", LAYERS, ids=lambda workload: workload.name)
def test_layer_rows(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _measure(workload, *providers.select(None), monkeypatch=monkeypatch)
    assert [row.shape for row in rows] == [[8, 24]] * 4 + [[40, 24]] * 4, "each of two providers, in both modes"
    assert {row.provider for row in rows} == {EAGER, "fusedres"}, "there is no memory format to choose"
    for row in rows:
        assert row.status == "ok", row
        assert {"outputs_l2", "evaluation_l2", "gradient of input_max"} < set(row.check)
        assert not any("statistics" in name for name in row.check)
        assert (row.figures["speedup"] == 1.0) or row.provider != EAGER


@pytest.mark.parametrize("workload", LAYERS, ids=lambda workload: workload.name)
@pytest.mark.parametrize("parameter", ["bias", "weight"])
def test_a_layer_with_one_wrong_gradient_is_wrong(
    workload: Workload, parameter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(model: nn.Module) -> nn.Module:
        norm = next(m for m in model.modules() if isinstance(m, nn.LayerNorm))
        getattr(norm, parameter).register_hook(lambda grad: 1.2 * grad)
        return model

    rows = _measure(workload, Provider("wrong", False, prepare), monkeypatch=monkeypatch)
    assert {(row.provider, row.status) for row in rows} == {(EAGER, "ok"), ("wrong", "WRONG")}


def test_signs_that_rounding_decides_do_not_count() -> None:
    torch.manual_seed(0)
    model = workloads.norm_linear_relu(16, 16).bfloat16()
    x, cotangent = (torch.randn(64, 16, dtype=torch.bfloat16) for _ in range(2))
    wanted = parity._without_ties(copy.deepcopy(model).double(), x, cotangent, torch.bfloat16)
    z = model[1](model[0](x)) if isinstance(model, nn.Sequential) else x
    assert 0 < (wanted == 0).sum() < 0.2 * wanted.numel()
    assert z[wanted == 0].abs().max() < z[wanted != 0].abs().median()
    assert torch.equal(wanted[wanted != 0], cotangent[wanted != 0])


def test_what_is_out_of_time_is_said() -> None:
    chosen = workloads.workloads("models", CPU, None)[:1]
    rows = list(timing_suite.run("models", CPU, providers.select(None), chosen, seconds_limit=-1))
    assert len(rows) == 8 == timing_suite.count(providers.select(None), chosen)
    assert {row.status for row in rows} == {"not measured"}


@pytest.mark.parametrize("suite", workloads.SUITES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_workloads_fit_their_modules(suite: str, device: str) -> None:
    for workload in workloads.workloads(suite, torch.device(device), "float32"):
        with torch.device("meta"):
            model, x = workload.build(), torch.empty(2, *workload.sample)
        assert model(x).shape == (2, workload.outputs), workload
        assert not workload.layer or sum(isinstance(m, nn.ReLU) for m in model.modules()) == 1


def test_parity_sees_a_small_error() -> None:
    torch.manual_seed(0)
    model = workloads.residual_block()
    images, labels = [torch.randn(4, 64, 6, 6) for _ in range(2)], torch.tensor([1, 2, 3, 4])
    right = providers.instantiate(providers.PROVIDERS["fusedres"], model, CPU)
    wrong = providers.instantiate(providers.PROVIDERS["fusedres"], model, CPU)
    for norm in (m for m in wrong.module.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eps = 2e-5
    assert parity.check([right], model, images, labels, torch.float32)["fusedres"]["ok"]
    assert not parity.check([wrong], model, images, labels, torch.float32)["fusedres"]["ok"]


def test_interleaving_takes_turns() -> None:
    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    samples = timing.interleave(steps, CPU, 3)
    assert "".join(calls) == "abcbcacab"
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3, "c": 3}
    assert timing.summary([1, 2, 3, 4, 5]) == {"ms": 3, "ms_q1": 2, "ms_q3": 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["mlp", "--dtype", "bfloat16"], "is not measured on cpu"),
        (["models", "--provider", "jax"], "unknown provider 'jax'"),
        (["models", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["models", "--device", "tpu"], "unknown device 'tpu'"),
        (["models", "--device", "cuda"], "torch sees no GPU"),
        (["models", "--device", "cpu", "--dtype", "float16"], "is not measured on cpu"),
        (["train", "--interpreted-steps", "-1"], "must not be negative"),
    ],
)
def test_bad_requests_end_in_one_line(arguments: list[str], message: str) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr + done.stdout


def test_committed_traffic_is_within_budget() -> None:
    rows = results.read(results.RESULTS / "cpu" / "traffic.jsonl")
    assert len(rows) == len(traffic_suite.CASES) * len(traffic_suite.PHASES)
    for row in rows:
        figures = {name: value or 0.0 for name, value in row.figures.items()}
        assert row.status == "ok"
        assert figures["stray_bytes"] == 0
        if "passes" in figures:
            assert figures["passes"] + figures["aten_passes"] <= figures["budget_passes"], row
            height = row.shape[0] * math.prod(row.shape[2:])
        else:
            assert figures["distinct_bytes"] <= 1.05 * figures["budget_bytes"], row
            assert figures["aten_bytes"] <= 1.05 * figures["aten_budget_bytes"], row
            height = row.shape[0]
        assert figures["vector_share"] <= 0.05 or height < 10_000, row


def test_readme_agrees_with_the_rows() -> None:
    _, between, _ = report.split(report.README)
    assert between == report.render(), "run `python -m benchmarks report`"


def test_report_rewrites_only_between_the_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    report.update(readme, tmp_path)
    text = readme.read_text()
    assert text.startswith(f"above\n{report.BEGIN}\n### On a GPU")
    assert text.endswith(f"{report.END}\nbelow\n")
    assert "| not measured |" in text
    assert "old" not in text


def test_rows_are_saved_as_they_come(tmp_path: Path) -> None:
    rows = [Row("mlp", name, "training", EAGER, [4, 8], "float32", "contiguous") for name in "ab"]
    path = tmp_path / "mlp.jsonl"
    for count, _ in enumerate(results.recorded(path, rows), 1):
        assert results.read(path) == rows[:count]


@pytest.mark.parametrize("suite", workloads.SUITES)
def test_plots_show_wins_and_losses(suite: str, tmp_path: Path) -> None:
    figures = {"ms": 2.0, "ms_q1": 1.9, "ms_q3": 2.3, "speedup": 0.8}
    environment: dict[str, str | None] = {"device": "a device"}
    rows = [
        Row(suite, "a", mode, name, [4, 8], "float32", "", status, dict(figures), environment=environment)
        for mode, name, status in (
            ("training", EAGER, "ok"), ("training", "fusedres", "OOM"), ("inference", "fusedres", "ok")
        )
    ]  # fmt: skip
    results.write(tmp_path / "cpu" / f"{suite}.jsonl", rows)
    report.draw(tmp_path)
    assert (tmp_path / "cpu" / f"{suite}.png").stat().st_size > 1000


def test_rows_survive_a_round_trip(tmp_path: Path) -> None:
    row = Row("models", "resnet50", "training", "eager", [4, 3, 8, 8], "float32", "NCHW", "OOM", {"ms": None})
    results.write(tmp_path / "a" / "models.jsonl", [row, row])
    assert results.read(tmp_path / "a" / "models.jsonl") == [row, row]
    with pytest.raises(ValueError, match="status"):
        Row("models", "resnet50", "training", "eager", [4], "float32", "NCHW", "fine")


def test_digits_are_learned() -> None:
    recipe = Recipe()
    eager, fused = digits.train(digits.build_model(), recipe), digits.fused_run(recipe)
    assert min(eager.accuracy, fused.accuracy) > 0.97
    assert len(fused.losses) == 168


def test_digits_curves_agree_on_the_reference_path() -> None:
    recipe = Recipe(steps=40)
    eager = digits.eager_runs(recipe)
    assert digits.agreement(digits.fused_run(recipe), eager).ok


def test_digits_curves_agree_with_the_kernels_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if not pytest.importorskip("triton").knobs.runtime.interpret:
        pytest.skip("kernels are compiled here, not interpreted")
    monkeypatch.setenv("FUSEDRES_BACKEND", "triton")  # no silent fallback
    recipe = Recipe(batch=16, steps=30)
    fused = digits.fused_run(recipe)
    assert len(fused.losses) == 30
    assert digits.agreement(fused, digits.eager_runs(recipe)).ok


def test_agreement_refuses_another_curve() -> None:
    recipe = Recipe(steps=12)
    eager = digits.eager_runs(recipe)
    model = digits.build_model()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eps = 2e-5
    assert not digits.agreement(digits.train(copy.deepcopy(model), recipe), eager).ok


def test_agreement_grows_with_the_spread_of_eager_runs() -> None:
    eager = {"a": Curve([1.0, 1.0, 1.0], 1.0), "b": Curve([1.0, 1.0, 1.2], 1.0)}
    assert digits.agreement(Curve([1.0, 1.0, 1.1], 1.0), eager).ok
    assert not digits.agreement(Curve([1.0, 1.1, 1.1], 1.0), eager).ok, "too far at a step where eager runs agree"
