"""State that a trace bakes in: guarded in each call, read when fuse is called, or a reason to leave a module alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fusedres
from tests.fusion.blocks import block_of
from tests.zoo import assert_same_steps, conv, counts, images, randomise

LOG: list[Any] = []
STORE: dict[str, Any] = {}
CALLS = 0


@pytest.fixture(autouse=True)
def _empty() -> None:
    LOG.clear()
    STORE.clear()


class Parts(nn.Module):
    """Optional parts, registered and not, and configuration of several kinds."""

    gain: Tensor | None
    offset: Tensor | None
    bias: nn.Parameter
    shift: Tensor
    drop: nn.Dropout
    total = 0

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = conv(4, 4), nn.BatchNorm2d(4), nn.Dropout(0.0)
        self.register_module("down", None)
        self.register_parameter("gain", None)
        self.register_buffer("offset", None)
        self.register_parameter("bias", nn.Parameter(torch.ones(1)))
        self.register_buffer("shift", torch.ones(1))
        self.cfg, self.out_names, self.objects = SimpleNamespace(scale=2.0, n=0), {"a": 1.0}, [SimpleNamespace()]

    def a(self, x):
        return torch.relu(self.bn(self.conv(x)))


class Adding(Parts):
    def forward(self, x):
        out = self.bn(self.conv(x))
        if self.down is not None:
            x = self.down(x)
        if getattr(self, "skip", True):
            out = out + x
        out = torch.relu(out)
        for part in (self.gain, self.offset, self.bias, self.shift):
            out = out if part is None else part * out
        return out * self.out_names["a"]


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a child": lambda block: setattr(block, "down", nn.Conv2d(4, 4, 1).double()),
    "a child by add_module": lambda block: block.register_module("down", nn.Conv2d(4, 4, 1).double()),
    "a parameter": lambda block: setattr(block, "gain", nn.Parameter(torch.full((1,), 2.0).double())),
    "a registered parameter": lambda block: block.register_parameter("gain", nn.Parameter(torch.zeros(1).double())),
    "a buffer": lambda block: setattr(block, "offset", torch.full((1,), 2.0).double()),
    "a registered buffer": lambda block: block.register_buffer("offset", torch.full((1,), 2.0).double()),
    "no parameter": lambda block: setattr(block, "bias", None),
    "no buffer": lambda block: setattr(block, "shift", None),
}
READ_AT_FUSE: dict[str, Callable[[nn.Module], object]] = {
    "an attribute": lambda block: setattr(block, "skip", False),
    "an item": lambda block: vars(block)["out_names"].update(a=3.0),
    "a container": lambda block: setattr(block, "out_names", {"a": 4.0}),
}


@pytest.mark.parametrize("change", [*CHANGES, *READ_AT_FUSE])
def test_a_change_after_fuse_is_honoured(change):
    block, x = randomise(Adding()), images(2, 4, 5, 5)
    reference = copy.deepcopy(block)
    fusedres.fuse(block)
    assert counts(block) == {"bn_add_act": 1}
    for candidate in (block, reference):
        torch.manual_seed(3)
        (CHANGES | READ_AT_FUSE)[change](candidate)
    if change in CHANGES:
        assert_same_steps(copy.deepcopy(block), copy.deepcopy(reference), x)
    assert_same_steps(fusedres.fuse(block), reference, x)


def test_deleting_an_attribute_is_honoured_by_the_next():
    block, x = randomise(Adding()), images(2, 4, 5, 5)
    vars(block)["skip"] = False
    reference = copy.deepcopy(block)
    fusedres.fuse(block)
    assert counts(block) == {"bn_act": 1}
    for candidate in (block, reference):
        del candidate.skip
    fusedres.fuse(block)
    assert_same_steps(block, reference, x)


def test_other_attributes_do_not_matter():
    block = fusedres.fuse(randomise(Adding()))
    for note in ("new", "changed"):
        setattr(block, "note", note)  # noqa: B010
    assert counts(block) == {"bn_add_act": 1}


def asks_for_gradients(self, x):
    return self.a(x) if torch.is_grad_enabled() else x


def asks_for_autocast(self, x):
    return x if torch.is_autocast_enabled("cpu") else self.a(x)


def draws_with_numpy(self, x):
    return x if np.random.rand() < 0 else self.a(x)


def asks_for_an_attribute(self, x):
    return self.a(x) if not hasattr(x, "tensors") else x


def appends_to_a_global(self, x):
    LOG.append(1)
    return self.a(x)


def fills_a_global(self, x):
    STORE["y"] = y = self.a(x)
    return y


def counts_in_an_object(self, x):
    self.cfg.n += 1
    return self.a(x)


def fills_an_object_of_a_list(self, x):
    self.objects[0].feat = y = self.a(x)
    return y


def sets_a_global(self, x):
    global CALLS
    CALLS += 1
    return self.a(x)


def counts_in_its_class(self, x):
    type(self).total += 1
    return self.a(x)


def fills_a_default(self, x, cache={}):  # noqa: B006
    cache["y"] = y = self.a(x)
    return y


def keep(values, value):
    values().append(value)


def keeps_through_a_function(self, x):
    y = self.a(x)
    keep(lambda: LOG, y)
    return y


def closure() -> Callable[..., object]:
    seen = []

    def fills_a_closure(self, x):
        seen.append(self.a(x))
        return seen[-1]

    return fills_a_closure


LEFT_ALONE = [
    asks_for_gradients, asks_for_autocast, draws_with_numpy, asks_for_an_attribute, appends_to_a_global,
    fills_a_global, counts_in_an_object, fills_an_object_of_a_list, sets_a_global, counts_in_its_class,
    fills_a_default, keeps_through_a_function, closure(),
]  # fmt: skip


@pytest.mark.parametrize("forward", LEFT_ALONE)
def test_left_alone_with_its_reason_and_without_effects(forward):
    block = block_of(forward, Parts)
    before = type(block)
    numpy_state = str(np.random.get_state())
    fusedres.fuse(block)
    assert str(np.random.get_state()) == numpy_state
    assert type(block) is before
    assert counts(block) == {"bn": 1}
    assert "forward" in fusedres.explain(block).rows[0]["reason"]
    assert not LOG
    assert not STORE
    assert CALLS == 0
    assert type(block).total == block.cfg.n == 0
    assert not vars(block.objects[0])


def returns_several(self, x):
    features = {}
    outs = []
    for name in ("a", "b"):
        features[name] = self.a(x)
        outs.append(features[name])
    return features["a"] + outs[1]


def test_containers_of_the_forwards_own_are_no_obstacle():
    block, x = block_of(returns_several, Parts), images(2, 4, 5, 5)
    reference = copy.deepcopy(block)
    assert counts(fusedres.fuse(block)) == {"bn_act": 2}
    assert_same_steps(block, reference, x)


def reads_a_child(self, x):
    return self.a(x) * self.drop.p


def reads_a_childs_mode(self, x):
    return self.a(x) if self.bn.training else x


def reads_an_object(self, x):
    return self.a(x) * self.cfg.scale


@pytest.mark.parametrize("forward", [reads_a_child, reads_a_childs_mode, reads_an_object])
def test_what_is_read_of_others(forward):
    """Modes in each call, all else when the model is fused."""
    block, x = block_of(forward, Parts), images(2, 4, 5, 5)
    reference = copy.deepcopy(block)
    assert counts(fusedres.fuse(block))["bn_act"] == 1
    for candidate in (block, reference):
        candidate.bn.eval()
    assert_same_steps(block, reference, x)
    for candidate in (block, reference):
        candidate.drop.p, candidate.cfg.scale = 0.5, 3.0
    assert_same_steps(fusedres.fuse(block), reference, x)


def test_statistics_read_before_the_addition_are_those_after_the_norm():
    def before(self, x):
        mean = self.bn.running_mean
        out = self.bn(self.conv(x))
        return torch.relu(out + x * mean.view(1, -1, 1, 1))

    def between(self, x):
        out = self.bn(self.conv(x))
        return torch.relu(out + x * self.bn.num_batches_tracked)

    for forward in (before, between):
        block, x = block_of(forward, Parts), images(2, 4, 5, 5)
        reference = copy.deepcopy(block)
        fusedres.fuse(block)
        assert_same_steps(block, reference, x)
        assert counts(block) == {"bn": 1}


@pytest.mark.parametrize("name", ["relu", "bn3"])
def test_a_forward_replaced_on_a_folded_module_is_run(name):
    block = randomise(fusedres.models.Bottleneck(16, 4))
    reference, x = copy.deepcopy(block), images(2, 16, 4, 4)
    fusedres.fuse(block)
    for candidate in (block, reference):
        module = candidate.get_submodule(name)
        module.forward = lambda x, forward=module.forward: forward(x) * 2
    with torch.no_grad():
        torch.testing.assert_close(block.eval()(x), reference.eval()(x))
    assert "bn_add_act" not in counts(block)
