"""What happens after fuse: hooks, replaced modules, attributes that are set, optional arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fusedres
from fusedres import models
from tests import zoo
from tests.zoo import TOLERANCE, assert_same_steps, counts, images, randomise, small


@pytest.mark.parametrize("name", ["layer1.0.relu", "layer1.0.bn3", "layer1.0.bn1", "layer1.0.conv1", "layer1.0"])
@pytest.mark.parametrize("before", [True, False])
def test_hooks_see_what_they_saw(name, before):
    def watch(model: nn.Module, log: list[torch.Tensor]) -> None:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _, args, out: log.extend((args[0].detach().clone(), out.detach().clone())))
        module.register_full_backward_hook(lambda _, grad_in, grad_out: log.append(grad_out[0].clone()))

    model, logs = small(), ([], [])
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # eager allows no in-place ReLU after a backward hook
    reference = copy.deepcopy(model)
    watch(reference, logs[1])
    if before:
        watch(model, logs[0])
    fusedres.fuse(model)
    if not before:
        watch(model, logs[0])
    assert_same_steps(model, reference, images())
    assert len(logs[0]) == len(logs[1]) > 0
    for ours, its in zip(*logs, strict=True):
        torch.testing.assert_close(ours, its, **TOLERANCE)


def test_hooked_modules_are_reported():
    model = small()
    handle = model.get_submodule("layer1.0.bn3").register_forward_hook(lambda *_: None)
    rows = {row["module"]: row for row in fusedres.explain(fusedres.fuse(model)).rows}
    assert rows["layer1.0.bn3"]["pattern"] == "bn"
    assert "hooks" in rows["layer1.0.bn3"]["reason"]
    handle.remove()
    assert counts(fusedres.fuse(model))["bn_add_bn_act"] == 2
    handle = model.get_submodule("layer1.0.bn1").register_forward_pre_hook(lambda *_: None)
    assert counts(model)["bn_add_bn_act"] == 2
    assert {row["module"]: row["pattern"] for row in fusedres.explain(model).rows}["layer1.0.bn1"] == "bn"
    handle.remove()
    assert counts(model)["bn_add_bn_act"] == 2


@pytest.mark.parametrize("build", [small, lambda: randomise(zoo.HandPreActResNet(zoo.KuangliuBlock, [1, 1]))])
def test_global_hooks_see_every_module(build):
    model = build().eval()
    calls: list[list[str]] = []
    for _ in range(2):
        seen: list[str] = []
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, out, seen=seen: seen.append(type(module).__name__.replace("Act", ""))
        )
        model(images())
        handle.remove()
        calls.append(seen)
        fusedres.fuse(model)
    assert calls[0] == calls[1]


def test_convert_sync_batchnorm_keeps_every_relu():
    model, x = small(), images()
    reference = copy.deepcopy(model).eval()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(fusedres.fuse(model)).eval()
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == 12
    torch.testing.assert_close(converted(x), reference(x), **TOLERANCE)
    assert set(counts(converted)) == {"bn"}
    assert {row["path"] for row in fusedres.explain(converted).rows} == {"eager"}


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "relu by setattr": lambda block: setattr(block, "relu", nn.GELU()),
    "relu by add_module": lambda block: block.add_module("relu", nn.Tanh()),
    "relu in _modules": lambda block: block._modules.update(relu=nn.GELU()),
    "norm": lambda block: setattr(block, "bn3", nn.Identity()),
    "norm of its kind": lambda block: setattr(block, "bn3", nn.BatchNorm2d(16).double()),
    "no projection": lambda block: setattr(block, "downsample", None),
    "projection": lambda block: setattr(block, "downsample", nn.Conv2d(16, 16, 1).double()),
    "convolution": lambda block: setattr(block, "conv2", nn.Conv2d(4, 4, 3, padding=1).double()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_block_changed_after_fuse_does_what_it_then_says(change):
    # Both have as many channels out as in, so that the block works without its projection too.
    projection = nn.Conv2d(16, 16, 1) if change == "no projection" else None
    block = randomise(models.Bottleneck(16, 4, downsample=projection))
    reference = copy.deepcopy(block)
    fusedres.fuse(block)
    assert counts(block) == {"bn_act": 2, "bn_add_act": 1}
    for candidate in (block, reference):
        torch.manual_seed(3)
        CHANGES[change](candidate)
    assert_same_steps(block, reference, images(2, 16, 4, 4))
    assert ("bn_add_act" in counts(block)) == (change in ("convolution", "projection", "no projection"))


def test_fusing_again_after_a_change():
    block = fusedres.fuse(randomise(nn.Sequential(zoo.conv(3, 4), nn.BatchNorm2d(4), nn.ReLU())))
    block.register_module("2", nn.Tanh())
    fusedres.fuse(block)
    assert type(block) is nn.Sequential
    block.register_module("2", nn.ReLU())
    assert counts(fusedres.fuse(block)) == {"bn_act": 1}
    assert type(block) is not nn.Sequential


class Nested(nn.Module):
    """Norms and activations in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.acts = nn.ModuleDict({"relu": nn.ReLU()})

    def forward(self, x):
        for norm in self.norms:
            x = self.acts["relu"](norm(x))
        return x


def test_modules_replaced_in_containers():
    block = randomise(Nested())
    reference, x = copy.deepcopy(block), images(2, 4, 5, 5)
    fusedres.fuse(block)
    assert counts(block) == {"bn_act": 2}
    assert_same_steps(block, reference, x)
    for candidate in (block, reference):
        candidate.get_submodule("acts").register_module("relu", nn.Tanh())
    assert_same_steps(block, reference, x)
    fusedres.fuse(block)
    for candidate in (block, reference):
        candidate.get_submodule("acts").register_module("relu", nn.ReLU())
    fusedres.fuse(block)
    for candidate in (block, reference):
        delattr(candidate.get_submodule("norms"), "1")
    assert_same_steps(block, reference, x)


def test_replacing_the_classifier_keeps_the_stem_fused():
    model = fusedres.fuse(small())
    model.fc = nn.Linear(32, 3).double()
    assert counts(model)["bn_act"] == 7
    assert model(images()).shape == (2, 3)


SEQUENCE_CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "insert": lambda s: s.insert(2, nn.Tanh()),
    "append": lambda s: s.append(nn.Tanh()),
    "delete": lambda s: s.__delitem__(2),
    "set": lambda s: s.__setitem__(2, nn.Tanh()),
    "extend": lambda s: s.extend([nn.Tanh(), nn.Tanh()]),
}


@pytest.mark.parametrize("change", SEQUENCE_CHANGES)
def test_a_sequential_changed_after_fuse(change):
    block = nn.Sequential(zoo.conv(3, 4), nn.BatchNorm2d(4), nn.ReLU()).double()
    reference = copy.deepcopy(block)
    fusedres.fuse(block)
    assert counts(block) == {"bn_act": 1}
    for candidate in (block, reference):
        SEQUENCE_CHANGES[change](candidate)
    assert_same_steps(block, reference, images(2, 3, 5, 5))


def test_slices_of_a_fused_sequential():
    block = fusedres.fuse(nn.Sequential(zoo.conv(3, 4), nn.BatchNorm2d(4), nn.ReLU()).double())
    x = images(2, 3, 5, 5)
    torch.testing.assert_close(block[:2](x), nn.Sequential(block[0], block[1])(x))
    assert (block[:2](x) < 0).any()


class Flagged(nn.Module):
    """Configuration that a trace bakes in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = zoo.conv(4, 4), nn.BatchNorm2d(4)
        self.skip, self.scale, self._shift = True, 1.0, 0.0

    def forward(self, x, extra=None, *, gain=1.0):
        out = self.bn(self.conv(x))
        if self.skip:
            out = out + x
        out = torch.relu(out) * self.scale * gain + self._shift
        return out if extra is None else out + extra


@pytest.mark.parametrize("change", [{"skip": False}, {"scale": 2.0}, {"_shift": 1.0}])
def test_an_attribute_set_after_fuse_is_honoured_by_the_next(change):
    block = Flagged().double()
    reference, x = copy.deepcopy(block), images(2, 4, 5, 5)
    fusedres.fuse(block)
    assert counts(block) == {"bn_add_act": 1}
    for name, value in change.items():
        setattr(block, name, value)
        setattr(reference, name, value)
    fusedres.fuse(block)
    assert counts(block) == ({"bn_act": 1} if change == {"skip": False} else {"bn_add_act": 1})
    assert_same_steps(block, reference, x)


def test_optional_arguments():
    block = Flagged().double().eval()
    reference, x = copy.deepcopy(block), images(2, 4, 5, 5)
    fusedres.fuse(block)
    assert counts(block) == {"bn_add_act": 1}
    for args, kwargs in (((), {}), ((x,), {}), ((None,), {}), ((), {"extra": x}), ((), {"gain": 3.0})):
        torch.testing.assert_close(block(x, *args, **kwargs), reference(x, *args, **kwargs), **TOLERANCE)
    torch.testing.assert_close(block(x=x), reference(x), **TOLERANCE)


def test_a_class_attribute_overridden_after_fuse_is_honoured_by_the_next(capsys):
    block = randomise(zoo.HandBlock(4, 4))
    fusedres.fuse(block)
    block.loud = False
    fusedres.fuse(block)
    block(images(2, 4, 5, 5))
    assert capsys.readouterr().out == ""
