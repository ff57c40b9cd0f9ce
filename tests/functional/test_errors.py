"""Bad input is refused by name and value, before anything is launched or updated."""

from __future__ import annotations

import pytest
import torch

from fusedres import functional
from fusedres.functional import add_batch_norm_act, batch_norm_act
from fusedres.nn import BasicBlock, BatchNormAct2d, as_batch_norm_act


def arguments(**changes):
    given = {
        "input": torch.randn(2, 3, 4, 4),
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "weight": torch.ones(3),
        "bias": torch.zeros(3),
        "training": True,
        "num_batches_tracked": torch.tensor(0),
    }
    return given | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"act": "gelu"}, ValueError, "act must be .*'gelu'"),
        ({"act": True}, ValueError, "act must be"),
        ({"input": torch.ones(2, 3, 4, 4, dtype=torch.int32)}, TypeError, r"input .* torch\.int32"),
        ({"input": torch.ones(2, 3, 4, 4, dtype=torch.complex64)}, TypeError, r"input .* torch\.complex64"),
        ({"input": torch.randn(3)}, ValueError, r"input .*2 dimensions.*\(3,\)"),
        ({"residual": torch.randn(2, 3, 4, 5)}, ValueError, r"residual .*\(2, 3, 4, 4\).*\(2, 3, 4, 5\)"),
        ({"residual": torch.randn(1, 3, 1, 1)}, ValueError, "residual"),
        ({"residual": torch.ones(2, 3, 4, 4, dtype=torch.int64)}, TypeError, r"residual .*torch\.int64"),
        ({"residual": torch.empty(2, 3, 4, 4, device="meta")}, ValueError, "residual must be on cpu, got meta"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must have shape \(3,\), got \(4,\)"),
        ({"bias": torch.ones(1, 3)}, ValueError, r"bias must have shape \(3,\), got \(1, 3\)"),
        ({"weight": torch.ones(3, dtype=torch.float64)}, TypeError, r"weight .*torch\.float64"),
        ({"bias": torch.ones(3, dtype=torch.int64)}, TypeError, r"bias .*torch\.int64"),
        ({"weight": torch.ones(3, device="meta")}, ValueError, "weight must be on cpu, got meta"),
        ({"running_mean": torch.zeros(2)}, ValueError, r"running_mean must have shape \(3,\), got \(2,\)"),
        ({"running_var": torch.zeros(7)}, ValueError, r"running_var must have shape \(3,\), got \(7,\)"),
        ({"running_mean": None}, ValueError, "running_mean and running_var"),
        ({"running_mean": None, "running_var": None, "training": False}, ValueError, "training is False"),
        ({"input": torch.randn(1, 3, 1, 1)}, ValueError, r"more than 1 value per channel.*\(1, 3, 1, 1\)"),
        ({"momentum": None, "num_batches_tracked": None}, ValueError, "num_batches_tracked"),
        ({"num_batches_tracked": torch.zeros(2, dtype=torch.int64)}, ValueError, "num_batches_tracked"),
        ({"num_batches_tracked": torch.tensor(0.5)}, ValueError, "num_batches_tracked"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_batch_norm_act(monkeypatch, backend, changes, error, message):
    monkeypatch.setenv("FUSEDRES_BACKEND", backend)
    given = arguments(**changes)
    before = {name: t.clone() for name, t in given.items() if isinstance(t, torch.Tensor) and t.device.type == "cpu"}
    with pytest.raises(error, match=message):
        batch_norm_act(**given)
    for name, tensor in before.items():
        assert torch.equal(given[name], tensor), name


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"act": "gelu"}, ValueError, "act must be .*'gelu'"),
        ({"input": torch.ones(2, 3, 4, 4, dtype=torch.int32)}, TypeError, r"input .* torch\.int32"),
        ({"input": torch.ones(2, 3, 4, 4, dtype=torch.complex64)}, TypeError, r"input .* torch\.complex64"),
        ({"residual": torch.randn(2, 3, 4, 5)}, ValueError, r"residual .*\(2, 3, 4, 4\).*\(2, 3, 4, 5\)"),
        ({"residual": torch.randn(1, 3, 1, 1)}, ValueError, "residual"),
        ({"residual": torch.ones(2, 3, 4, 4, dtype=torch.int64)}, TypeError, r"residual .*torch\.int64"),
        ({"residual": torch.ones(2, 3, 4, 4, dtype=torch.complex64)}, TypeError, r"residual .*torch\.complex64"),
        ({"residual": torch.empty(2, 3, 4, 4, device="meta")}, ValueError, "residual must be on cpu, got meta"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must have shape \(3,\), got \(4,\)"),
        ({"weight": torch.ones(3, dtype=torch.bfloat16)}, TypeError, r"weight .*the sum's .*float32.*bfloat16"),
        ({"running_mean": None}, ValueError, "running_mean and running_var"),
        ({"running_mean": None, "running_var": None, "training": False}, ValueError, "training is False"),
        (
            {"input": torch.randn(1, 3, 1, 1), "residual": torch.randn(1, 3, 1, 1)},
            ValueError,
            r"more than 1 value per channel.*\(1, 3, 1, 1\)",
        ),
        ({"momentum": None, "num_batches_tracked": None}, ValueError, "num_batches_tracked"),
        ({"num_batches_tracked": torch.zeros(2, dtype=torch.int64)}, ValueError, "num_batches_tracked"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_add_batch_norm_act(monkeypatch, backend, changes, error, message):
    """A bfloat16 input with a float32 residual: what is normalised is float32, and so are its parameters."""
    monkeypatch.setenv("FUSEDRES_BACKEND", backend)
    sixteen = {"input": torch.randn(2, 3, 4, 4).to(torch.bfloat16), "residual": torch.randn(2, 3, 4, 4)}
    given = arguments(**(sixteen | changes))
    before = {name: t.clone() for name, t in given.items() if isinstance(t, torch.Tensor) and t.device.type == "cpu"}
    with pytest.raises(error, match=message):
        add_batch_norm_act(**given)
    for name, tensor in before.items():
        assert torch.equal(given[name], tensor), name


def test_module():
    with pytest.raises(ValueError, match="act must be"):
        BatchNormAct2d(3, act="gelu")
    module = BatchNormAct2d(3)
    with pytest.raises(ValueError, match="expected 4D input"):
        module(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match="residual must have shape"):
        module(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 1))
    with pytest.raises(ValueError, match="act must be"):
        module(torch.randn(2, 3, 4, 4), act="gelu")


def test_blocks():
    with pytest.raises(ValueError, match="groups=1 and base_width=64, got 2 and 64"):
        BasicBlock(4, 4, groups=2)
    with pytest.raises(NotImplementedError, match="dilation=1, got 2"):
        BasicBlock(4, 4, dilation=2)
    with pytest.raises(TypeError, match="GroupNorm"):
        BasicBlock(4, 4, norm_layer=lambda planes: torch.nn.GroupNorm(2, planes))
    with pytest.raises(TypeError, match="Identity"):
        as_batch_norm_act(torch.nn.Identity(), None)


def linear_arguments(order: str, **changes):
    given = {"input": torch.randn(2, 5, 3), "weight": torch.randn(4, 3), "bias": torch.zeros(4)}
    size = 3 if order == "layer_norm_linear_act" else 4
    return given | {"ln_weight": torch.ones(size), "ln_bias": torch.zeros(size), "act": "relu"} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"act": "gelu"}, ValueError, "act must be .*'gelu'"),
        ({"input": torch.ones(2, 3, dtype=torch.int32)}, TypeError, r"input .*torch\.int32"),
        ({"input": torch.ones(2, 3, dtype=torch.complex64)}, TypeError, r"input .*torch\.complex64"),
        ({"input": torch.randn(2, 4)}, ValueError, r"input must have shape \(\*, 3\), got \(2, 4\)"),
        ({"input": torch.randn(())}, ValueError, r"input must have shape \(\*, 3\), got \(\)"),
        ({"input": torch.randn(2, 3, dtype=torch.float64)}, TypeError, r"weight .*torch\.float64.*torch\.float32"),
        ({"weight": torch.randn(3)}, ValueError, r"weight must have 2 dimensions .*\(3,\)"),
        ({"weight": torch.ones(4, 3, dtype=torch.int64)}, TypeError, r"weight .*torch\.int64"),
        ({"weight": torch.empty(4, 3, device="meta")}, ValueError, "weight must be on cpu, got meta"),
        ({"bias": torch.ones(3)}, ValueError, r"bias must have shape \(4,\), got \(3,\)"),
        ({"bias": torch.ones(4, dtype=torch.float16)}, TypeError, r"bias .*torch\.float16"),
        ({"ln_weight": torch.ones(7)}, ValueError, r"ln_weight must have shape .*\(7,\)"),
        ({"ln_bias": torch.ones(1, 3)}, ValueError, r"ln_bias must have shape .*\(1, 3\)"),
        ({"ln_bias": torch.ones(3, dtype=torch.float64)}, (TypeError, ValueError), "ln_bias"),
        ({"ln_weight": None, "ln_bias": torch.ones(5)}, ValueError, "ln_bias must have shape"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("order", ["layer_norm_linear_act", "linear_layer_norm_act"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_linear(monkeypatch, backend, order, changes, error, message):
    monkeypatch.setenv("FUSEDRES_BACKEND", backend)
    with pytest.raises(error, match=message):
        getattr(functional, order)(**linear_arguments(order, **changes))


@pytest.mark.parametrize(
    ("residual", "error", "message"),
    [
        (torch.randn(2, 5, 3), ValueError, r"residual must have shape \(2, 5, 4\), got \(2, 5, 3\)"),
        (torch.randn(4), ValueError, r"residual .*\(4,\)"),
        (torch.ones(2, 5, 4, dtype=torch.int64), TypeError, r"residual .*torch\.int64"),
        (torch.empty(2, 5, 4, device="meta"), ValueError, "residual must be on cpu, got meta"),
    ],
    ids=["other shape", "broadcast", "integer", "other device"],
)
def test_linear_residual(residual, error, message):
    with pytest.raises(error, match=message):
        functional.linear_layer_norm_act(**linear_arguments("linear_layer_norm_act", residual=residual))
