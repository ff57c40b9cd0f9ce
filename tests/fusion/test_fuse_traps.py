"""In-place operations, aliases and second readers: where folding would be wrong, and where it is right."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres
from tests.fusion.blocks import block_of, clones
from tests.zoo import TOLERANCE, conv, counts, images


def run(block: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    """Outputs, the input afterwards, buffers, and, where eager has them, gradients."""
    torch.manual_seed(1)
    leaf = x.clone().requires_grad_()
    given = leaf * 1
    outputs = block.train(training)(given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = [*outputs, given, *block.buffers()]
    loss = sum((out * torch.randn_like(out)).sum() for out in outputs)
    assert isinstance(loss, Tensor)
    block.zero_grad()
    try:
        loss.backward()
    except RuntimeError as error:
        assert "inplace" in str(error)
        return [value.detach().clone() for value in results]
    assert leaf.grad is not None
    grads = [p.grad for p in block.parameters() if p.grad is not None]
    return [value.detach().clone() for value in (*results, leaf.grad, *grads)]


def assert_same(block: nn.Module, expected: dict[str, int]) -> None:
    reference = copy.deepcopy(block)
    fusedres.fuse(block)
    assert counts(block) == expected, fusedres.explain(block)
    for training in (True, False):
        x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
        ours, its = run(block, x, training), run(reference, x, training)
        for one, other in zip(ours, its, strict=False):  # eager's backward may refuse what fused allows
            torch.testing.assert_close(one, other, **TOLERANCE)
        assert len(ours) >= len(its)


def statement_add(self, x):
    out = self.b(x)
    out.add_(x)
    out.relu_()
    return out


def statement_relu(self, x):
    out = self.b(x)
    out += x
    F.relu_(out)
    return out


def cloned_then_added_into(self, x):
    identity = x.clone()
    identity += self.b(x)
    return torch.relu(identity)


def both_norms(self, x):
    one, other = self.b(x), self.bn2(self.conv2(x))
    one += other
    return F.relu(one)


def relu_read_under_both_names(self, x):
    out = self.b(x)
    positive = F.relu(out, inplace=True)
    return positive + out


def dead_difference(self, x):
    out = self.b(x)
    difference = out - x  # noqa: F841
    return torch.relu(out + x)


def second_name(self, x):
    out = self.b(x)
    other = out
    out += x
    return torch.relu(other)


FOLDED: dict[str, tuple[Callable[..., object], dict[str, int]]] = {
    "nn.ReLU": (lambda self, x: self.relu(self.b(x)), {"bn_act": 1}),
    "nn.ReLU(inplace)": (lambda self, x: self.relu_(self.b(x)), {"bn_act": 1}),
    "torch.relu": (lambda self, x: torch.relu(self.b(x)), {"bn_act": 1}),
    "torch.relu_": (lambda self, x: torch.relu_(self.b(x)), {"bn_act": 1}),
    "F.relu": (lambda self, x: F.relu(self.b(x)), {"bn_act": 1}),
    "F.relu(inplace)": (lambda self, x: F.relu(self.b(x), inplace=True), {"bn_act": 1}),
    "F.relu(True)": (lambda self, x: F.relu(self.b(x), True), {"bn_act": 1}),
    "F.relu(input=)": (lambda self, x: F.relu(input=self.b(x)), {"bn_act": 1}),
    "F.relu_": (lambda self, x: F.relu_(self.b(x)), {"bn_act": 1}),
    "x.relu": (lambda self, x: self.b(x).relu(), {"bn_act": 1}),
    "x.relu_": (lambda self, x: self.b(x).relu_(), {"bn_act": 1}),
    "through nn.Identity": (lambda self, x: self.relu(self.alias(self.alias(self.b(x)))), {"bn_act": 1}),
    "+": (lambda self, x: self.relu(self.b(x) + x), {"bn_add_act": 1}),
    "+ reversed": (lambda self, x: self.relu(x + self.b(x)), {"bn_add_act": 1}),
    "torch.add": (lambda self, x: self.relu(torch.add(self.b(x), x)), {"bn_add_act": 1}),
    "torch.add(other=)": (lambda self, x: self.relu(torch.add(self.b(x), other=x)), {"bn_add_act": 1}),
    "torch.add(alpha=1)": (lambda self, x: self.relu(torch.add(x, self.b(x), alpha=1)), {"bn_add_act": 1}),
    "x.add": (lambda self, x: self.relu(x.add(self.b(x))), {"bn_add_act": 1}),
    "x.add_": (lambda self, x: self.relu_(self.b(x).add_(x)), {"bn_add_act": 1}),
    "no relu": (lambda self, x: self.b(x) + x, {"bn_add": 1}),
    "two additions": (lambda self, x: torch.relu(self.b(x) + x + x * 2), {"bn_add": 1}),
    "add, multiply": (lambda self, x: torch.relu((self.b(x) + x) * 2), {"bn_add": 1}),
    "projection": (lambda self, x: torch.relu(self.b(x) + self.skip(x)), {"bn_add_bn_act": 1}),
    "statement add_": (statement_add, {"bn_add_act": 1}),
    "statement relu_": (statement_relu, {"bn_add_act": 1}),
    "into a clone": (cloned_then_added_into, {"bn_add_act": 1}),
    "two norms": (both_norms, {"bn_add_bn_act": 1}),
    "one norm twice": (lambda self, x: self.relu(self.b(x) + self.bn(self.conv2(x))), {"bn": 1, "bn_add_act": 1}),
    "in-place relu, both names": (relu_read_under_both_names, {"bn_act": 1}),
    "dead difference": (dead_difference, {"bn_add_act": 1}),
    "second name": (second_name, {"bn_add_act": 1}),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folded(name):
    forward, expected = FOLDED[name]
    assert_same(block_of(forward), expected)


def into_the_input(self, x):
    out = self.b(x)
    identity = x
    identity += out
    return torch.relu(identity)


def into_the_input_by_method(self, x):
    return torch.relu(x.add_(self.b(x)))


def into_an_alias(self, x):
    out = self.b(x)
    identity = self.alias(x)
    identity += out
    return torch.relu(identity)


def into_a_clone_that_is_printed(self, x):
    identity = x.clone()
    identity.add_(self.b(x))
    print(identity.mean())
    return torch.relu(identity)


def into_a_norm_that_is_read(self, x):
    one = self.b(x)
    view = one.view(-1)
    one += self.bn2(self.conv2(x))
    return torch.relu(one), view * 2


def input_changes_before_the_addition(self, x):
    inner = self.conv(x)
    out = self.bn(inner)
    inner.mul_(2)
    return torch.relu(out + inner)


def input_changes_in_a_module(self, x):
    inner = self.conv(x)
    out = self.bn(inner)
    return torch.relu(out + self.relu_(self.alias(inner)))


def one_norm_in_between(self, x):
    out = self.b(x)
    return torch.relu(out + torch.relu(self.bn(self.conv2(x))))


def output_and_relu(self, x):
    out = self.b(x)
    return torch.relu(out), out


LEFT: dict[str, tuple[Callable[..., object], dict[str, int]]] = {
    "into the input": (into_the_input, {"bn": 1}),
    "into the input by a method": (into_the_input_by_method, {"bn": 1}),
    "into an alias of the input": (into_an_alias, {"bn": 1}),
    "into a clone that is printed": (into_a_clone_that_is_printed, {"bn": 1}),
    "into a norm that is read": (into_a_norm_that_is_read, {"bn": 2}),
    "input changes": (input_changes_before_the_addition, {"bn": 1}),
    "input changes in a module": (input_changes_in_a_module, {"bn": 1}),
    "one norm in between": (one_norm_in_between, {"bn": 1, "bn_act": 1}),
    "output and relu": (output_and_relu, {"bn": 1}),
    "read twice": (lambda self, x: (lambda out: torch.relu(out) + out)(self.b(x)), {"bn": 1}),
    "added to itself": (lambda self, x: (lambda out: torch.relu(out + out))(self.b(x)), {"bn": 1}),
    "alpha": (lambda self, x: torch.relu(torch.add(self.b(x), x, alpha=2)), {"bn": 1}),
    "method alpha": (lambda self, x: torch.relu(self.b(x).add(x, alpha=2)), {"bn": 1}),
    "scalar": (lambda self, x: torch.relu(self.b(x) + 1.0), {"bn": 1}),
    "dropout": (lambda self, x: torch.relu(self.drop(self.b(x))), {"bn": 1}),
    "dropout, add": (lambda self, x: torch.relu(self.drop(self.b(x)) + x), {"bn": 1}),
    "gelu": (lambda self, x: F.gelu(self.b(x)), {"bn": 1}),
    "relu6": (lambda self, x: F.relu6(self.b(x)), {"bn": 1}),
    "relu only": (lambda self, x: torch.relu(self.conv(x)), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    forward, expected = LEFT[name]
    assert_same(block_of(forward), expected)


def test_one_norm_inside_a_child_in_between():
    def forward(self, x):
        out = self.b(x)
        return torch.relu(out + self.wrapped(x))

    block = block_of(forward)
    block.wrapped = nn.Sequential(conv(4, 4).double(), block.bn)
    assert_same(block, {"bn": 1, "bn_add_act": 1})  # the second, which takes the addition where it runs anyway


def clone_before_relu_(self, x):
    identity = x.clone()
    return torch.relu(self.b(self.relu_(x)) + identity)


def clone_before_mul_(self, x):
    identity = x.clone()
    x.mul_(2)
    return torch.relu(self.b(x) + identity)


def clone_before_a_view_changes(self, x):
    identity = x.clone()
    x.view(-1).mul_(2)
    return torch.relu(self.b(x) + identity)


def clone_before_an_alias_changes(self, x):
    identity = x.clone()
    self.drop(x).add_(1)
    return torch.relu(self.b(x) + identity)


def clone_returned(self, x):
    identity = x.clone()
    return torch.relu(self.b(x) + identity), identity


@pytest.mark.parametrize(
    "forward",
    [clone_before_relu_, clone_before_mul_, clone_before_a_view_changes, clone_before_an_alias_changes, clone_returned],
)
def test_clones_that_matter_stay(forward):
    block = block_of(forward)
    assert_same(block, {"bn_add_act": 1})
    assert clones(block, images(2, 4, 5, 5)) == 1


def needless_clone(self, x):
    identity = x.clone()
    out = self.relu_(self.b(x))
    out = self.bn2(self.conv2(out))
    out += identity
    return self.relu_(out)


def needless_clone_into_a_projection(self, x):
    identity = x.clone()
    out = self.b(x)
    identity = self.skip(identity)
    out += identity
    return self.relu(out)


@pytest.mark.parametrize("forward", [needless_clone, needless_clone_into_a_projection])
def test_needless_clones_go(forward):
    block = block_of(forward)
    assert_same(block, {"bn_act": 1, "bn_add_act": 1} if forward is needless_clone else {"bn_add_bn_act": 1})
    assert clones(block, images(2, 4, 5, 5)) == 0
