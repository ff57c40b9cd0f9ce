"""torch.compile and torch.export of fused models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fusedres
from tests import zoo
from tests.zoo import TOLERANCE, assert_same_steps, images, randomise, small

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def assert_two_graphs(model: nn.Module, x: torch.Tensor, same: bool = True) -> None:
    """One for training and one for evaluation, through AOTAutograd; then, if ``same``, the steps of a copy."""
    reference, counter = copy.deepcopy(fusedres.fuse(model)), CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert counter.frame_count == 1
    with torch.no_grad():
        for _ in range(2):
            model.eval()(x)
    assert counter.frame_count == 2
    if same:
        model.load_state_dict(reference.state_dict())
        assert_same_steps(model, reference, x)


# A join behind a stem, with ReLUs in place; a clone and one ReLU for all; BatchNorms without a block around them.
MODELS = {
    "basic": lambda: zoo.resnet(layers=(1, 1), small_input=False),
    "hand": lambda: randomise(zoo.HandResNet(zoo.HandBottleneck, [1], width=4)),
    "sequential": lambda: randomise(zoo.SequentialNet()),
}


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_and_no_recompilation(name):
    # The dropout of "sequential" draws from another generator's state when it is compiled.
    assert_two_graphs(MODELS[name](), images(2, 3, 16, 16), same=name != "sequential")


def test_blocks_compile_one_by_one_without_recompiling_for_each():
    model = fusedres.fuse(zoo.resnet(layers=(3, 1)))
    reference = copy.deepcopy(model)
    counter = CompileCounterWithBackend("eager")
    for block in model.get_submodule("layer1").children():
        block.compile(backend=counter, fullgraph=True)
    x = images()
    for _ in range(2):
        torch.testing.assert_close(model(x), reference(x), **TOLERANCE)
    assert counter.frame_count == 1


def test_a_module_replaced_after_compilation():
    block = nn.Sequential(zoo.conv(3, 4), nn.BatchNorm2d(4), nn.ReLU()).double().eval()
    reference, x = copy.deepcopy(block), images(2, 3, 5, 5)
    compiled = torch.compile(fusedres.fuse(block), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), reference(x), **TOLERANCE)
    block[2], reference[2] = nn.Tanh(), nn.Tanh()
    torch.testing.assert_close(compiled(x), reference(x), **TOLERANCE)


def test_strict_export():
    model = fusedres.fuse(zoo.resnet(layers=(1, 1))).eval()
    x = images()
    exported = torch.export.export(model, (x,), strict=True)
    torch.testing.assert_close(exported.module()(x), model(x), **TOLERANCE)


def test_export_with_a_dynamic_batch():
    model = fusedres.fuse(zoo.resnet(layers=(1, 1))).eval()
    exported = torch.export.export(model, (images(),), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2)}})
    x = images(5, 3, 8, 8)
    torch.testing.assert_close(exported.module()(x), model(x), **TOLERANCE)


def test_symbolic_trace_of_a_fused_model():
    model, x = fusedres.fuse(small()).eval(), images()
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x), **TOLERANCE)
