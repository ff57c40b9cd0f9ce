from __future__ import annotations

import ast
import inspect
import sys

import pytest
import torch
from torch import nn

import fusedres
from fusedres import models
from tests import zoo

PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_and_names_are_torchvisions(name):
    theirs = getattr(zoo.torchvision_models(), name)
    with torch.device("meta"):
        model, reference = getattr(models, name)(), theirs()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in reference.state_dict().items()}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_loads_torchvisions_weights_and_agrees(name):
    reference = getattr(zoo.torchvision_models(), name)(num_classes=7).double()
    model = getattr(models, name)(num_classes=7).double()
    model.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.eval()(x), reference.eval()(x), rtol=1e-10, atol=1e-10)


def test_initialisation_is_torchvisions():
    theirs = zoo.torchvision_models().resnet18
    torch.manual_seed(0)
    reference = theirs(zero_init_residual=True)
    torch.manual_seed(0)
    model = models.resnet18(zero_init_residual=True)
    # The orders of the random draws differ; the distributions are compared.
    for (name, ours), (_, its) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert ours.std(unbiased=False).item() == pytest.approx(its.std(unbiased=False).item(), rel=0.1), name
    assert all(block.bn2.weight.eq(0).all() for block in model.modules() if isinstance(block, models.BasicBlock))


@pytest.mark.parametrize("block", [models.BasicBlock, models.Bottleneck])
def test_small_images(block):
    model = models.ResNet(block, [1, 1, 1, 1], 10, in_channels=1, width=4, small_input=True)
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 10)
    assert model.layer1(model.conv1(torch.randn(3, 1, 8, 8))).shape[-2:] == (8, 8)


def test_models_are_plain_pytorch():
    assert not any(isinstance(module, fusedres.nn.BatchNormAct2d) for module in models.resnet18().modules())
    source = inspect.getsource(sys.modules[models.ResNet.__module__])
    tree = ast.parse(source)
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(name and name.startswith("fusedres") for name in imported)
    assert isinstance(models.resnet50().layer1[0].downsample, nn.Sequential)
