"""Modules that are left alone for what they are, and other libraries' models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fusedres
from tests import zoo
from tests.zoo import TOLERANCE, assert_same_steps, counts, images, randomise


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_modules_with_a_forward_on_the_instance_are_left_alone():
    def changed(model: nn.Module) -> nn.Module:
        block, norm = model.get_submodule("layer1.0"), model.get_submodule("bn1")
        forward = block.forward
        block.forward = lambda x: forward(x) * 2
        norm.forward = lambda x: x + 1
        return model.eval()

    model = zoo.small()
    reference, x = changed(copy.deepcopy(model)), images()
    fusedres.fuse(changed(model))
    rows = {row["module"]: row for row in fusedres.explain(model).rows}
    assert type(model.get_submodule("bn1")) is nn.BatchNorm2d
    assert rows["bn1"]["path"] == "eager"
    assert rows["layer1.0.bn3"]["pattern"] == "bn"
    torch.testing.assert_close(model(x), reference(x), **TOLERANCE)


def test_subclasses_of_batch_norm_are_left_alone():
    class Own(nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input) * 2

    model = nn.Sequential(Own(4), nn.ReLU()).double()
    reference = copy.deepcopy(model)
    fusedres.fuse(model)
    assert type(model[0]) is Own
    assert fusedres.explain(model).rows == [
        {"module": "0", "pattern": "bn", "path": "eager", "reason": "Own is not nn.BatchNorm2d"}
    ]
    assert_same_steps(model, reference, images(2, 4, 3, 3))


def test_compiled_and_scripted_modules_are_left_alone():
    compiled, scripted, plain = zoo.ResBlock(4, 4), torch.jit.script(zoo.ResBlock(4, 4)), zoo.ResBlock(4, 4)
    compiled.compile(backend="eager")
    model = randomise(nn.Sequential(compiled, scripted, torch.compile(zoo.ResBlock(4, 4), backend="eager"), plain))
    reference = copy.deepcopy(model)
    fusedres.fuse(model)
    assert counts(model)["bn_add_act"] == 1
    assert type(compiled.batch_norm1) is nn.BatchNorm2d
    x = images(2, 4, 3, 3)
    torch.testing.assert_close(model.eval()(x), reference.eval()(x), **TOLERANCE)


class Registry(nn.Module):
    """Its subclasses must say what they are."""

    known: list[type] = []  # noqa: RUF012

    def __init_subclass__(cls, *, kind: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.known.append(cls)


class Registered(Registry, kind="block"):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.relu(self.bn(x))


def test_subclass_hooks_are_not_run():
    block = fusedres.fuse(Registered())
    assert counts(block) == {"bn_act": 1}
    assert Registry.known == [Registered]


def test_wrappers_and_generated_modules_keep_working():
    inner = randomise(zoo.ResBlock(4, 4))
    reference, x = copy.deepcopy(inner), images(2, 4, 5, 5)
    wrapped = fusedres.fuse(nn.DataParallel(inner))
    assert counts(wrapped) == {"bn_act": 1, "bn_add_act": 1}
    assert_same_steps(inner, reference, x)
    traced = fusedres.fuse(torch.fx.symbolic_trace(copy.deepcopy(reference)))
    assert counts(traced) == {"bn": 2}
    torch.testing.assert_close(traced.eval()(x), reference.eval()(x), **TOLERANCE)


def test_others_models_do_not_raise():
    zoo.torchvision_models()  # timm imports it
    timm = pytest.importorskip("timm")
    for name, shape in (("resnet18", 32), ("efficientnet_b0", 32)):
        model = timm.create_model(name, num_classes=3).double().eval()
        reference = copy.deepcopy(model)
        x = images(1, 3, shape, shape)
        torch.testing.assert_close(fusedres.fuse(model)(x), reference(x), **TOLERANCE)
        assert fusedres.explain(model).rows
