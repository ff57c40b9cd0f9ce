"""The choice between kernels and PyTorch's own by measured speed. Every figure in this file is made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fusedres
from benchmarks import __main__ as command
from benchmarks import results
from benchmarks.errors import BenchmarkError
from benchmarks.reporting import preferences
from benchmarks.results import Row
from fusedres import functional, reference
from fusedres.functional import add_batch_norm_act, batch_norm_act
from fusedres.ops import preference

NAME = "A GPU that does not exist"
LARGE, SMALL = (4, 8, 8, 8), (2, 8, 2, 2)
BEYOND = ("bn+add+relu+fork", "bn+add+bn+relu", "bn+relu+maxpool", "bn+add+relu+avgpool")
TABLE = {
    NAME: {
        "torch": "0", "triton": "0", "commit": "none", "date": "2000-01-01",
        "speed": {
            group: [[8, 8, 0.5], [256, 8, 1.5]]
            for group in (
                "bn+relu training float32", "bn+relu inference float32", "add+bn+relu training float32",
                *(f"{kind} training float32" for kind in BEYOND),
            )
        },
    }
}  # fmt: skip


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device with made-up figures; CPU tensors stand in for its."""
    monkeypatch.setenv("FUSEDRES_BACKEND", "auto")
    monkeypatch.setattr(preference, "_MEASURED", TABLE)
    monkeypatch.setattr(preference, "TIMED", ("cpu",))
    monkeypatch.setattr(preference, "device_name", lambda device: NAME)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    preference.measured_speed.cache_clear()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What took the reference path."""
    calls: list[str] = []

    def noting(name: str) -> Any:
        function = getattr(reference, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        return call

    for name in (
        "normalise", "add_normalise", "batch_norm_add_batch_norm_act", "normalise_max_pool2d",
        "batch_norm_act_global_avg_pool2d",
    ):  # fmt: skip
        monkeypatch.setattr(reference, name, noting(name))
    return calls


def activation(shape: tuple[int, ...], memory_format: torch.memory_format = torch.channels_last) -> torch.Tensor:
    return torch.randn(shape).contiguous(memory_format=memory_format)


def run(shape: tuple[int, ...], **changes: Any) -> torch.Tensor:
    statistics = {"running_mean": torch.zeros(8), "running_var": torch.ones(8), "training": True, "act": "relu"}
    return batch_norm_act(**{"input": activation(shape), **statistics, **changes})


@pytest.mark.usefixtures("table")
def test_the_nearest_measured_size_decides(taken):
    run(LARGE)
    assert taken == []
    run(SMALL)
    assert taken == ["normalise"]
    run(SMALL, training=False)
    add_batch_norm_act(activation(SMALL), activation(SMALL), None, None, training=True, act="relu")
    assert taken == ["normalise", "normalise", "add_normalise", "normalise"]


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("function", "first"),
    [
        (lambda x, norm: functional.forked_batch_norm_act(x, norm, residual=x, act="relu"), "normalise"),
        (lambda x, norm: functional.batch_norm_add_batch_norm_act(x, x, norm, norm), "batch_norm_add_batch_norm_act"),
        (lambda x, norm: functional.batch_norm_act_max_pool2d(x, *norm[:7]), "normalise_max_pool2d"),
        (
            lambda x, norm: functional.batch_norm_act_global_avg_pool2d(x, *norm[:7], residual=x),
            "batch_norm_act_global_avg_pool2d",
        ),
    ],
    ids=BEYOND,
)
def test_it_decides_beyond_a_layer_too(function, first, taken):
    norm = functional.BatchNormState(None, None, training=True)
    function(activation(LARGE), norm)
    assert taken == []
    function(activation(SMALL), norm)
    assert taken[0] == first


@pytest.mark.usefixtures("table")
def test_explain_knows_what_lies_beyond_a_layer():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn1, self.bn2, self.relu = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.relu(self.bn1(x) + self.bn2(x.exp()))

    model = fusedres.fuse(Block())
    large, small = (fusedres.explain(model, shape) for shape in (LARGE, SMALL))
    assert [(row["pattern"], row["path"]) for row in large.rows] == [("bn_add_bn_act", "triton")]
    assert [(row["pattern"], row["path"]) for row in small.rows] == [("bn_add_bn_act", "reference")]


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    "changes",
    [
        {"act": None},  # a layer that was not measured
        {"input": activation(SMALL).bfloat16()},
        {"input": activation(SMALL, torch.contiguous_format)},
        {"momentum": None, "num_batches_tracked": torch.tensor(0)},
    ],
    ids=["layer", "dtype", "format", "momentum"],
)
def test_what_was_not_compared_runs_the_kernels(changes, taken):
    run(SMALL, **changes)
    assert taken == []


@pytest.mark.usefixtures("table")
def test_the_variable_forces_kernels(taken, monkeypatch):
    monkeypatch.setenv("FUSEDRES_BACKEND", "triton")
    run(SMALL)
    assert taken == []


@pytest.mark.usefixtures("table")
def test_captured_graphs_run_the_kernels(taken, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr("fusedres.kernels.workspace.counters", lambda device: None)
    run(SMALL)
    assert taken == []


@pytest.mark.usefixtures("table")
def test_compiled_functions_run_the_kernels():
    module = fusedres.nn.BatchNormAct2d(8)
    names: list[str] = []

    def note(graph: torch.fx.GraphModule, _: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch.compile(module, backend=note, fullgraph=True)(activation(SMALL))
    assert any("fusedres.batch_norm_act" in name for name in names)


@pytest.mark.usefixtures("table")
def test_explain_says_which_path_a_size_takes():
    model = fusedres.fuse(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()).to(memory_format=torch.channels_last))
    large, small, unsized = (fusedres.explain(model, shape) for shape in (LARGE, SMALL, None))
    assert [report.rows[0]["path"] for report in (large, small, unsized)] == ["triton", "reference", "triton"]
    assert "at [8, 8]" in small.rows[0]["reason"] and "0.50 of their speed" in small.rows[0]["reason"]
    assert f"measured on {NAME} on 2000-01-01" in str(large)


@pytest.mark.usefixtures("table")
def test_a_device_that_was_not_measured_says_so(taken, monkeypatch):
    monkeypatch.setattr(preference, "_MEASURED", {"Another": TABLE[NAME]})
    preference.measured_speed.cache_clear()
    run(SMALL)
    assert taken == []
    text = str(fusedres.explain(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())))
    assert text.endswith(f"kernels at every size: they were never compared with PyTorch's own on {NAME}")


def row(speed: float | None, **changes: Any) -> Row:
    environment = {
        "device": NAME,
        "driver": "1",
        "torch": "0",
        "triton": "0",
        "commit": "c",
        "date": "2000-01-01T00:00",
    }
    given: dict[str, Any] = {
        "workload": "bn+relu 8x2x2", "mode": "training", "provider": "fusedres", "shape": [2, 8, 2, 2],
        "dtype": "float32", "layout": "channels-last", "figures": {"speedup_high": speed}, "environment": environment,
    }  # fmt: skip
    return Row("kernels", **given | changes)


def test_the_table_comes_from_rows(tmp_path: Path) -> None:
    rows = [
        row(0.5),
        row(1.5, workload="bn+relu 8x8x8", shape=[4, 8, 8, 8]),
        row(0.1, provider="fusedres + CUDA graph"),
        row(0.1, shape=[1, 8, 2, 2], status="WRONG"),
        row(0.1, shape=[3, 8, 2, 2], layout="NCHW"),
        row(None, shape=[5, 8, 2, 2]),
        row(0.8, provider="fusedres + cooperative", figures={"speedup_low": 0.7, "speedup_high": 0.8}),
        row(9.0, provider="fusedres + cooperative", shape=[6, 8, 2, 2]),  # nothing beside it
    ]
    results.write(tmp_path / "a-gpu" / "kernels.jsonl", rows)
    results.write(tmp_path / "cpu" / "kernels.jsonl", [row(0.1, environment={"device": "a processor", "driver": None})])
    file = tmp_path / "preferences.json"
    preferences.write(tmp_path, file)
    points = {"bn+relu training float32": [[8, 8, 0.5], [256, 8, 1.5]]}
    entry: dict[str, Any] = {"torch": "0", "triton": "0", "commit": "c", "date": "2000-01-01", "speed": points}
    entry["cooperative"] = {"bn+relu training float32": [[8, 8, 1.4]]}
    assert json.loads(file.read_text()) == {NAME: entry}


def test_no_rows_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "preferences.json"
    file.write_text("as it was")
    with pytest.raises(BenchmarkError, match="on a GPU"):
        preferences.write(tmp_path, file)
    assert file.read_text() == "as it was"
    with pytest.raises(SystemExit):
        command.main(["prefer", "--output", str(tmp_path)])
    assert "on a GPU" in capsys.readouterr().err


def test_the_package_holds_measured_devices_only() -> None:
    """Each names the commit that was measured; none where no GPU has run."""
    rows = [r for path in results.RESULTS.glob("*/kernels.jsonl") for r in results.read(path)]
    measured = {r.environment.get("device") for r in rows if r.environment.get("driver")}
    table = json.loads(preference.FILE.read_text())
    assert set(table) <= measured
    assert all({"torch", "triton", "commit", "date", "speed"} <= set(entry) for entry in table.values())
