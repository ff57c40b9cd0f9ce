"""Modules that are left alone for what they are, and other libraries' models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fusedres
from fusedres import models
from tests import zoo
from tests.zoo import TOLERANCE, assert_same_steps, counts, images, randomise


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
    [row] = fusedres.explain(model).rows
    assert (row["pattern"], row["path"], row["reason"]) == ("bn", "eager", "Own is not nn.BatchNorm2d")
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


def compiled_in_place() -> nn.Module:
    block = zoo.ResBlock(4, 4)
    block.compile(backend="eager")
    return block


SEALED: dict[str, tuple[Any, str, str]] = {
    "torch.compile": (lambda: torch.compile(zoo.ResBlock(4, 4), backend="eager"), "_orig_mod.", "compiled already"),
    "compile()": (compiled_in_place, "", "compiled already"),
    "script": (lambda: torch.jit.script(zoo.ResBlock(4, 4)), "", "ScriptModule"),
    "trace": (lambda: torch.jit.trace(zoo.ResBlock(4, 4), torch.ones(2, 4, 3, 3)), "", "ScriptModule"),
}


@pytest.mark.parametrize("name", SEALED)
def test_what_is_compiled_already_is_named_and_left_alone(name):
    build, prefix, reason = SEALED[name]
    alone = build().eval()
    x = torch.randn(2, 4, 3, 3)
    for model, path in ((alone, ""), (nn.Sequential(alone, nn.BatchNorm2d(4), nn.ReLU()).eval(), "0.")):
        expected = model(x)
        kinds = [type(module) for module in alone.modules()]
        assert fusedres.fuse(model) is model
        assert [type(module) for module in alone.modules()] == kinds
        rows = [row for row in fusedres.explain(model, input=(2, 4, 3, 3)).rows if row["module"] != "1"]
        assert [row["module"] for row in rows] == [f"{path}{prefix}batch_norm{i}" for i in (1, 2)]
        assert all((row["pattern"], row["path"], row["bytes_saved"]) == ("bn", "eager", 0) for row in rows)
        assert all(reason in row["reason"] for row in rows)
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("name", ["torch.compile", "compile()"])
def test_what_was_fused_before_it_was_compiled_is_reported_as_fused(name):
    block = fusedres.fuse(zoo.ResBlock(4, 4))
    expected = fusedres.explain(block, input=(2, 4, 3, 3)).rows
    prefix = SEALED[name][1]
    model = block
    if prefix:
        model = torch.compile(block, backend="eager")
    else:
        block.compile(backend="eager")
    for _ in range(2):
        rows = fusedres.explain(model, input=(2, 4, 3, 3)).rows
        assert rows == [{**row, "module": prefix + row["module"]} for row in expected]
        assert (block._compiled_call_impl is None) == bool(prefix)
        fusedres.fuse(model)


def test_generated_code_is_named():
    exported = torch.export.export(zoo.ResBlock(4, 4).eval(), (torch.randn(2, 4, 3, 3),)).module()
    rows = fusedres.explain(fusedres.fuse(exported)).rows
    assert [(row["pattern"], row["path"], row["reason"]) for row in rows] == [
        ("bn", "eager", "its forward is generated")
    ] * 2


def test_linear_layers_of_scripted_models_are_named():
    model = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    assert [(row["module"], row["pattern"], row["path"]) for row in fusedres.explain(model).rows] == [
        ("1", "ln", "eager")
    ]


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (zoo.small, zoo.SMALL_INPUT),
        (zoo.mlp, (4, 12)),
        (lambda: models.preact_resnet_cifar(8, width=4), zoo.SMALL_INPUT),
    ],
)
def test_models_on_the_meta_device(build, shape):
    real = build().float()
    expected = counts(real)
    model = copy.deepcopy(real).to("meta")
    assert counts(fusedres.fuse(model)) == expected
    assert all(row["path"] != "triton" for row in fusedres.explain(model).rows)
    model.to_empty(device="cpu").load_state_dict(real.state_dict())
    assert_same_steps(model.double(), real.double(), images(*shape))


class SharedAcross(nn.Module):
    """One BatchNorm in two places of the tree and at three call sites."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(4)
        self.one, self.two = nn.Sequential(zoo.conv(4, 4), norm, nn.ReLU()), nn.Sequential(norm, nn.Dropout(0.0))
        self.norm = norm

    def forward(self, x):
        return torch.relu(self.norm(self.two(self.one(x))) + x)


def test_a_batch_norm_with_several_call_sites():
    model = randomise(SharedAcross())
    reference = copy.deepcopy(model)
    fusedres.fuse(model)
    assert counts(model) == {"bn_act": 1, "bn": 1, "bn_add_act": 1}
    assert model.norm is model.get_submodule("one.1") is model.get_submodule("two.0")
    assert_same_steps(model, reference, images(2, 4, 3, 3))


class Untraceable(nn.Module):
    """A forward that depends on values, around a block that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.block = nn.BatchNorm2d(4), zoo.ResBlock(4, 4)

    def forward(self, x):
        return self.block(torch.relu(self.bn(x))) if x.mean() < 10 else x


def test_a_block_that_cannot_be_traced_around_one_that_can():
    model = randomise(Untraceable())
    reference = copy.deepcopy(model)
    fusedres.fuse(model)
    rows = {row["module"]: (row["pattern"], row["reason"]) for row in fusedres.explain(model).rows}
    assert [pattern for pattern, _ in rows.values()] == ["bn_act", "bn_add_act", "bn"]
    assert "the model: forward cannot be traced" in rows["bn"][1]
    assert_same_steps(model, reference, images(2, 4, 3, 3))
