"""torch.compile and CUDA graphs on hardware: the backend, captures of fused models, graph trees."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import fusedres
from fusedres import models
from fusedres.fusion.dynamo import compile_fused
from tests import zoo

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("triton_backend")]
TOLERANCE: dict[str, Any] = {"rtol": 2e-3, "atol": 2e-3}
IMAGES = (8, 3, 32, 32)


def resnet() -> nn.Module:
    return models.ResNet(models.Bottleneck, [1, 1, 1, 1], 5, width=16, small_input=True)


def preact() -> nn.Module:
    return zoo.HandPreActResNet(zoo.KuangliuBlock, [2, 2], width=16)


def mlp() -> nn.Module:
    return models.residual_mlp(image_size=32, width=64, depth=2, num_classes=5)


MODELS: list[Callable[[], nn.Module]] = [resnet, preact, mlp]


@pytest.fixture(autouse=True)
def _full_precision():
    """float32 products in full, so that what is compared differs by the order of summation alone."""
    torch._dynamo.reset()
    switches: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv")]  # noqa: B009
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    yield
    for switch, precision in zip(switches, before, strict=True):
        switch.fp32_precision = precision
    torch._dynamo.reset()


def batch() -> Tensor:
    return torch.randn(IMAGES, device="cuda").contiguous(memory_format=torch.channels_last)


def pair_of(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A model and a copy of it."""
    model = build().cuda().to(memory_format=torch.channels_last)
    return model, copy.deepcopy(model)


def check_step(run: Callable[[Tensor], Tensor], model: nn.Module, reference: nn.Module) -> None:
    """Output, gradients and buffers of a training step on new data; ``reference`` is run as it is."""
    x = batch()
    for module in (model, reference):
        module.zero_grad()  # to None: a gradient may lie in memory that a graph writes again
    out, wanted = run(x), reference(x)
    grad = torch.randn_like(wanted)
    out.backward(grad)
    wanted.backward(grad)
    torch.testing.assert_close(out, wanted, **TOLERANCE)
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert parameter.grad is not None and other.grad is not None, name
        # In the 2-norm: one element next to zero may fall on either side of a ReLU.
        assert (parameter.grad - other.grad).norm() <= 0.02 * other.grad.norm(), name
    check_buffers(model, reference)


def check_buffers(model: nn.Module, reference: nn.Module) -> None:
    for buffer, other in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, **TOLERANCE)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("build", MODELS)
def test_backend_trains_as_eager(build, mode):
    model, reference = pair_of(build)
    compiled = torch.compile(model, backend=compile_fused, mode=mode, fullgraph=True)
    for _ in range(5):  # graph trees warm up, record and replay
        torch.compiler.cudagraph_mark_step_begin()
        check_step(compiled, model, reference)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("build", MODELS)
def test_fused_model_trains_compiled_as_eager(build, mode):
    model, reference = pair_of(build)
    compiled = torch.compile(fusedres.fuse(model), mode=mode, fullgraph=True)
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        check_step(compiled, model, reference)


@pytest.mark.parametrize("by_backend", [False, True])
@pytest.mark.parametrize("build", MODELS)
def test_inference_with_graph_trees(build, by_backend):
    model, reference = pair_of(build)
    model, reference = model.eval(), reference.eval()
    if by_backend:
        compiled = torch.compile(model, backend=compile_fused, mode="reduce-overhead", fullgraph=True)
    else:
        compiled = torch.compile(fusedres.fuse(model), mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(5):
            x = batch()
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(x), reference(x), **TOLERANCE)


@pytest.mark.parametrize("build", MODELS)
def test_graphed_callable_trains_as_eager(build):
    """Its warm-up and its captures run the forward: statistics are set to what they were, and counted from there."""
    model, reference = pair_of(build)
    fused = fusedres.fuse(model)
    before = {name: buffer.clone() for name, buffer in fused.named_buffers()}
    graphed = torch.cuda.make_graphed_callables(fused, (batch(),))
    for name, buffer in fused.named_buffers():
        buffer.copy_(before[name])
    for _ in range(4):
        check_step(graphed, fused, reference)


@pytest.mark.parametrize("build", MODELS)
def test_graphed_callable_in_inference(build):
    model, reference = pair_of(build)
    fused = fusedres.fuse(model).eval()
    for parameter in fused.parameters():
        parameter.requires_grad_(False)
    graphed = torch.cuda.make_graphed_callables(fused, (batch(),))
    with torch.no_grad():
        for _ in range(3):
            x = batch()
            torch.testing.assert_close(graphed(x), reference.eval()(x), **TOLERANCE)


@pytest.mark.parametrize("build", MODELS)
def test_captured_optimizer_step(build):
    """A whole step, the optimizer's update in it, captured once and replayed on new data."""
    model, reference = pair_of(build)
    fused = fusedres.fuse(model)
    x, target = batch(), torch.zeros(IMAGES[0], dtype=torch.int64, device="cuda")

    def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(module(x), target)
        loss.backward()
        optimizer.step()
        return loss

    optimizers = [torch.optim.SGD(module.parameters(), lr=1e-3) for module in (fused, reference)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(fused, optimizers[0])
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        step(reference, optimizers[1])
    graph = torch.cuda.CUDAGraph()
    optimizers[0].zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = step(fused, optimizers[0])  # recorded, not run
    for _ in range(4):
        x.copy_(batch())
        graph.replay()
        torch.testing.assert_close(loss, step(reference, optimizers[1]), **TOLERANCE)
    check_buffers(fused, reference)
