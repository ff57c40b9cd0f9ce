"""Batch sizes that change, that are marked dynamic, and that are known only when the data is there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fusedres
from fusedres.fusion.dynamo import compile_fused
from tests import zoo
from tests.parameters import covering

pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    with mock.patch("torch._dynamo.config.capture_dynamic_output_shape_ops", True):
        yield
    torch._dynamo.reset()


class Picked(nn.Module):
    """Some samples of a batch: how many is in the data."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.layers(x[keep])


def preact() -> nn.Module:
    return nn.Sequential(zoo.KuangliuBlock(3, 3), nn.BatchNorm2d(3))


def mlp() -> nn.Module:
    return nn.Sequential(zoo.MLPBlock(8, 8), nn.LayerNorm(8), nn.Linear(8, 5))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (lambda: zoo.ResBlock(3, 3), (3, 2, 2)),
    "pre-activation": (preact, (3, 2, 2)),
    "mlp": (mlp, (8,)),
}


def fused_backend(graph_module, example_inputs):
    return compile_fused(graph_module, example_inputs, options={"stop": "aot_eager"})


def check_step(compiled: Callable[..., Tensor], model: nn.Module, reference: nn.Module, *inputs: Tensor) -> None:
    """Outputs, gradients and buffers of a step."""
    out = compiled(*inputs)
    with mock.patch.dict("os.environ", FUSEDRES_BACKEND="reference"):
        wanted = reference(*inputs)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(out)
    for module, result in ((model, out), (reference, wanted)):
        module.zero_grad()
        result.backward(grad)
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-4, msg=name)
    for buffer, other in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-4, atol=1e-4)


@covering(name=[*MODELS], by_backend=[False, True], told=["", "by a mark", "by torch.compile"])
def test_batch_size(name, by_backend, told):
    """Told that it is dynamic, torch.compile compiles in the first call only, else once more for the second size."""
    build, shape = MODELS[name]
    model = build()
    reference = copy.deepcopy(model)
    counter = CompileCounterWithBackend(fused_backend if by_backend else "aot_eager")
    candidate, dynamic = model if by_backend else fusedres.fuse(model), told == "by torch.compile" or None
    compiled, counts = torch.compile(candidate, backend=counter, fullgraph=True, dynamic=dynamic), []
    for batch in (5, 4, 6):  # never the number of channels, which torch.compile would take for the same
        x = torch.randn(batch, *shape)
        if told == "by a mark":
            torch._dynamo.mark_dynamic(x, 0)
        check_step(compiled, model, reference, x)
        counts.append(counter.frame_count)
    # With dynamic=True numbers are dynamic too, and PyTorch calls the backend again in the same compilation.
    assert counts == (3 * counts[:1] if told else [1, 2, 2])


@pytest.mark.parametrize("name", MODELS)
def test_batch_size_in_the_data(name):
    """Down to an empty batch, without recompiling; PyTorch's own BatchNorm is not captured at all."""
    build, shape = MODELS[name]
    model = Picked(build())
    reference = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fusedres.fuse(model), backend=counter, fullgraph=True)
    for kept in (3, 5, 0, 2):
        check_step(compiled, model, reference, torch.randn(5, *shape), torch.arange(5) < kept)
    assert counter.frame_count == 1


def test_linear_maps_of_rows_in_the_data_by_the_backend():
    model = Picked(mlp())
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend=fused_backend, fullgraph=True)
    for kept in (3, 0, 5):
        check_step(compiled, model, reference, torch.randn(5, 8), torch.arange(5) < kept)


def test_one_value_a_channel_in_the_data():
    """Refused as by eager PyTorch, though only when it is seen."""
    compiled = torch.compile(Picked(fusedres.nn.BatchNormAct2d(3)), backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 1, 1)
    compiled(x, torch.arange(4) < 2)
    with pytest.raises(RuntimeError, match=r"Ne\(u0, 1\)"):
        compiled(x, torch.arange(4) < 1)


def test_rows_in_the_data_on_the_reference_path(monkeypatch):
    monkeypatch.setenv("FUSEDRES_BACKEND", "auto")
    model = fusedres.fuse(Picked(mlp().double()))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 8, dtype=torch.float64)
    for kept in (3, 0):
        keep = torch.arange(5) < kept
        torch.testing.assert_close(compiled(x, keep), model(x, keep))


def test_export_with_a_dynamic_batch_keeps_the_operators():
    """Exported and run with another size, through the kernels."""
    model = fusedres.fuse(preact()).eval()
    x = torch.randn(3, 3, 2, 2)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    operators = [str(node.target) for node in exported.graph.nodes if "fusedres" in str(node.target)]
    assert operators == [
        "fusedres.batch_norm_act_inference.default",
        "fusedres.batch_norm_act_inference.default",
        "fusedres.add_batch_norm_act_inference.default",
    ]
    x = torch.randn(5, 3, 2, 2)
    torch.testing.assert_close(exported.module()(x), model(x))
