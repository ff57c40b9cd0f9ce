"""What a rewritten forward must keep, or must look at in each call."""

from __future__ import annotations

import copy
import inspect
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres
from tests import zoo


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = zoo.conv(4, 4), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = zoo.conv(4, 4), nn.BatchNorm2d(4)


def pair(kind: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A fused model and its twin."""
    model = zoo.randomise(nn.Sequential(kind()))
    return fusedres.fuse(copy.deepcopy(model)), model


@pytest.mark.parametrize("replacement", [nn.Tanh, nn.ReLU, lambda: nn.Hardtanh(-0.1, 0.1)])
def test_identity_that_is_replaced(replacement):
    model = nn.Sequential(zoo.conv(4, 4), nn.BatchNorm2d(4), nn.Identity(), nn.ReLU())
    zoo.randomise(model)
    fused = fusedres.fuse(copy.deepcopy(model))
    assert zoo.counts(fused) == {"bn_act": 1}
    for either in (fused, model):
        either[2] = replacement()
    zoo.assert_same_steps(fused, model, zoo.images(2, 4, 6, 6))


def test_identity_between_linear_and_layer_norm_that_is_replaced():
    model = nn.Sequential(nn.Linear(6, 5), nn.Identity(), nn.LayerNorm(5), nn.ReLU()).double()
    fused = fusedres.fuse(copy.deepcopy(model))
    for either in (fused, model):
        either[1] = nn.Tanh()
    x = zoo.images(3, 6)
    torch.testing.assert_close(fused(x), model(x))


def test_identity_that_is_hooked():
    fused = fusedres.fuse(nn.Sequential(zoo.conv(4, 4), nn.BatchNorm2d(4), nn.Identity(), nn.ReLU()))
    seen: list[Tensor] = []
    fused[2].register_forward_hook(lambda module, args, output: seen.append(output))
    fused(torch.randn(2, 4, 6, 6))
    assert len(seen) == 1


class NamedResidual(Base):
    def forward(self, residual):
        return self.conv1(F.relu(self.bn1(residual))) + residual


class NamedArgs(Base):
    def forward(self, args, kwargs=None):
        return F.relu(self.bn1(self.conv1(args)))


class NamedLen(Base):
    def forward(self, len):
        return F.relu(self.bn1(self.conv1(len)))


@pytest.mark.parametrize("kind", [NamedResidual, NamedArgs, NamedLen])
def test_parameter_names(kind):
    zoo.assert_same_steps(*pair(kind), zoo.images(2, 4, 6, 6))


class Asserting(Base):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        torch._assert((out < -1e9).all(), "an assertion of the model")
        return F.relu(out)


def test_assertions_are_kept():
    fused, _ = pair(Asserting)
    with pytest.raises(AssertionError, match="of the model"):
        fused(zoo.images(2, 4, 6, 6))


class OperatorInPlace(Base):
    def forward(self, x):
        x = x + 1
        out = self.bn1(x)
        torch.ops.aten.mul_.Tensor(x, 2.0)
        return F.relu(out + self.conv1(x))


def test_operators_that_change_their_input():
    fused, model = pair(OperatorInPlace)
    x = zoo.images(2, 4, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(x), model.eval()(x))


class CloneOfWhatChangesLater(Base):
    def forward(self, x):
        x = self.conv1(x)
        out = F.relu(self.bn1(self.conv2(x.clone())))
        x += out
        return x


def test_clone_of_what_changes_after_its_reader():
    zoo.assert_same_steps(*pair(CloneOfWhatChangesLater), zoo.images(2, 4, 6, 6))


class Doubling(nn.Conv2d):
    def __call__(self, x):
        return super().__call__(x) * 2


class CallsDoubling(Base):
    def __init__(self) -> None:
        super().__init__()
        self.twice = Doubling(4, 4, 1)

    def forward(self, x):
        return F.relu(self.bn1(self.conv1(x))) + self.twice(x)


def test_module_with_a_call_of_its_own():
    zoo.assert_same_steps(*pair(CallsDoubling), zoo.images(2, 4, 6, 6))


def test_long_chains():
    """No recursion over the length of a model: it has more layers than the stack has frames."""
    layers = [layer for _ in range(120) for layer in (nn.Linear(2, 2), nn.LayerNorm(2), nn.ReLU())]
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + len(layers) // 2)
    try:
        model = fusedres.fuse(nn.Sequential(*layers))
        assert zoo.counts(model) == {"linear_ln_act": 120}
    finally:
        sys.setrecursionlimit(before)
