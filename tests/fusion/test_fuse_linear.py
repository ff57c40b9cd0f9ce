"""LayerNorm and Linear: what is found and folded, what is left alone and why, and what conversion promises."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres
from fusedres import models
from tests import zoo
from tests.fusion.blocks import clones
from tests.fusion.linear_parts import LINEAR_LN, LN_LINEAR, assert_found, assert_same_runs, block_of, randomised, rows
from tests.zoo import assert_same_steps, counts


def mlp(width: int = 8, depth: int = 3) -> nn.Sequential:
    layers = [nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU()) for _ in range(depth)]
    return nn.Sequential(*(layer for triple in layers for layer in triple), nn.Linear(width, 2))


class Looped(nn.Module):
    """Both layers in ModuleLists."""

    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(depth)])
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = x + self.relu(norm(linear(x)))
        return x


class PreNorm(nn.Module):
    """A transformer's feed-forward block."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class Helper(nn.Module):
    """Functions that stand in a method and in a function of the module's file."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.weight, self.ln_weight = nn.Parameter(torch.randn(width, width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.normalise(map_linearly(x, self.weight)))

    def normalise(self, h: Tensor) -> Tensor:
        return F.layer_norm(h, h.shape[-1:], self.ln_weight)


def map_linearly(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "flat Sequential": (mlp, (3, 8), {LINEAR_LN: 3}),
    "flat Sequential, LayerNorm first": (
        lambda: nn.Sequential(*[m for _ in range(3) for m in (nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU())]),
        (2, 3, 8),
        {LN_LINEAR: 3},
    ),
    "residual_mlp": (lambda: models.residual_mlp(image_size=4, width=8), (3, 3, 4, 4), {LINEAR_LN: 4}),
    "residual_mlp, linear skips": (
        lambda: models.residual_mlp(image_size=4, width=8, skip="linear"),
        (3, 3, 4, 4),
        {LINEAR_LN: 4},
    ),
    "plain_mlp": (lambda: models.plain_mlp(in_features=6, width=8, out_features=5), (2, 3, 6), {LN_LINEAR: 4}),
    "plain_mlp without bias": (
        lambda: models.plain_mlp(in_features=6, width=8, out_features=5, bias=False),
        (3, 6),
        {LN_LINEAR: 4},
    ),
    "hand-written": (zoo.HandMLP, (3, 12), {LINEAR_LN: 3}),
    "hand-written, skip first": (
        lambda: zoo.HandMLP(lambda *sizes: zoo.MLPBlock(*sizes, skip_first=True)),
        (3, 12),
        {LINEAR_LN: 3},
    ),
    "hand-written, functional": (lambda: zoo.HandMLP(zoo.FunctionalMLPBlock), (3, 3, 4), {LINEAR_LN: 3}),
    "last Linear bare": (zoo.mlp, (3, 12), {LN_LINEAR: 3}),
    "ModuleLists": (Looped, (3, 8), {LINEAR_LN: 3}),
    "pre-norm": (PreNorm, (2, 3, 8), {LN_LINEAR: 1}),
    "in its own helper": (Helper, (3, 8), {LINEAR_LN: 1}),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    build, shape, expected = MODELS[name]
    model = randomised(build())
    reference = copy.deepcopy(model)
    before = fusedres.explain(model).rows
    assert counts(model) == expected
    assert fusedres.fuse(model) is model
    assert fusedres.explain(model).rows == before
    assert_same_steps(model, reference, rows(*shape))


# fmt: off
FOLDED: dict[str, tuple[Callable[..., object], dict[str, int]]] = {
    "ln, linear, relu": (lambda self, x: self.relu(self.fc(self.ln(x))), {LN_LINEAR: 1}),
    "ln, linear": (lambda self, x: self.fc(self.ln(x)), {LN_LINEAR: 1}),
    "ln, linear, gelu": (lambda self, x: self.gelu(self.fc(self.ln(x))), {LN_LINEAR: 1}),
    "ln, linear, add": (lambda self, x: self.fc(self.ln(x)) + x, {LN_LINEAR: 1}),
    "ln, wide linear, relu_": (lambda self, x: self.relu_(self.wide(self.ln(x))), {LN_LINEAR: 1}),
    "ln without bias, linear without bias": (lambda self, x: torch.relu(self.fc2(self.ln2(x))), {LN_LINEAR: 1}),
    "bare ln, linear": (lambda self, x: F.relu(self.fc(self.bare(x)), inplace=True), {LN_LINEAR: 1}),
    "linear, ln, relu": (lambda self, x: self.ln(self.fc(x)).relu(), {LINEAR_LN: 1}),
    "linear, ln, relu_": (lambda self, x: self.ln(self.fc(x)).relu_(), {LINEAR_LN: 1}),
    "linear, ln": (lambda self, x: self.ln(self.fc(x)), {LINEAR_LN: 1}),
    "linear, ln, gelu": (lambda self, x: F.gelu(self.ln(self.fc(x))), {LINEAR_LN: 1}),
    "linear, bare ln, torch.relu_": (lambda self, x: torch.relu_(self.bare(self.fc2(x))), {LINEAR_LN: 1}),
    "linear, ln, relu, add": (lambda self, x: self.relu(self.ln(self.fc(x))) + x, {LINEAR_LN: 1}),
    "add, reversed": (lambda self, x: x + self.relu(self.ln(self.fc(x))), {LINEAR_LN: 1}),
    "torch.add": (lambda self, x: torch.add(x, self.relu(self.ln(self.fc(x)))), {LINEAR_LN: 1}),
    "linear, ln, add": (lambda self, x: self.ln(self.fc(x)) + x, {LINEAR_LN: 1}),
    "linear, ln, add, relu": (lambda self, x: self.relu(self.ln(self.fc(x)) + x), {LINEAR_LN: 1}),
    "add of a linear": (lambda self, x: self.relu(self.ln(self.fc(x))) + self.fc2(x), {LINEAR_LN: 1}),
    "add of an identity": (lambda self, x: self.alias(x) + self.relu(self.ln(self.fc(x))), {LINEAR_LN: 1}),
    "add of a clone": (lambda self, x: x.clone() + self.relu(self.ln(self.fc(x))), {LINEAR_LN: 1}),
    "through nn.Identity": (
        lambda self, x: self.alias(self.relu(self.alias(self.ln(self.alias(self.fc(x)))))) + x, {LINEAR_LN: 1}),
    "keywords": (lambda self, x: F.relu(input=self.ln(input=self.fc(input=x))), {LINEAR_LN: 1}),
    "F.linear": (lambda self, x: F.relu(self.ln(F.linear(x, self.w, self.b))), {LINEAR_LN: 1}),
    "F.linear(weight=)": (lambda self, x: self.ln(F.linear(weight=self.w, input=x)), {LINEAR_LN: 1}),
    "F.layer_norm": (
        lambda self, x: F.relu(self.fc(F.layer_norm(x, (8,), self.ln_w, self.ln_b, 1e-3))), {LN_LINEAR: 1}),
    "both functional": (
        lambda self, x: F.linear(F.layer_norm(x, [8], self.ln_w, eps=1e-3), self.w).relu(), {LN_LINEAR: 1}),
    "F.layer_norm without weights": (lambda self, x: self.fc(F.layer_norm(x, (x.shape[-1],))), {LN_LINEAR: 1}),
    "F.layer_norm of attributes": (
        lambda self, x: F.layer_norm(self.fc(x), self.size, self.ln_w, self.ln_b, self.eps), {LINEAR_LN: 1}),
    "F.layer_norm of its weight's shape": (
        lambda self, x: x + F.layer_norm(self.fc(x), self.ln_w.shape, self.ln_w, self.ln_b), {LINEAR_LN: 1}),
    "F.layer_norm of its input's shape": (
        lambda self, x: (lambda h: torch.relu(F.layer_norm(h, (h.size(-1),))) + x)(self.fc(x)), {LINEAR_LN: 1}),
    "weights of a child": (
        lambda self, x: F.relu(self.ln(F.linear(x, self.fc.weight, self.fc.bias))), {LINEAR_LN: 1}),
    "one pair twice": (lambda self, x: self.relu(self.ln(self.fc(self.relu(self.ln(self.fc(x)))))), {LINEAR_LN: 2}),
    "two branches": (
        lambda self, x: self.relu(self.ln(self.fc(x))) + self.relu(self.ln2(self.fc2(x))), {LINEAR_LN: 2}),
    # Which pair: see the rule in linear_patterns.
    "ln, linear, ln, relu": (lambda self, x: self.relu(self.ln2(self.fc(self.ln(x)))), {"ln": 1, LINEAR_LN: 1}),
    "ln, linear, ln, add": (lambda self, x: self.ln2(self.fc(self.ln(x))) + x, {"ln": 1, LINEAR_LN: 1}),
    "ln, linear, ln": (lambda self, x: self.ln2(self.fc(self.ln(x))), {LN_LINEAR: 1, "ln": 1}),
    "linear, ln, linear, relu": (lambda self, x: self.relu(self.fc2(self.ln(self.fc(x)))), {LN_LINEAR: 1}),
    "linear, ln, linear": (lambda self, x: self.fc2(self.ln(self.fc(x))), {LN_LINEAR: 1}),
    "linear, ln, linear, ln, relu": (
        lambda self, x: self.relu(self.ln2(self.fc2(self.ln(self.fc(x))))), {LINEAR_LN: 2}),
    "linear, ln, linear, ln": (
        lambda self, x: self.ln2(self.fc2(self.ln(self.fc(x)))), {LN_LINEAR: 1, "ln": 1}),
    "ln, linear, ln, linear, ln, relu": (
        lambda self, x: self.relu(self.ln3(self.fc2(self.ln2(self.fc(self.ln(x)))))),
        {LN_LINEAR: 1, "ln": 1, LINEAR_LN: 1}),
}
# fmt: on


@pytest.mark.parametrize("name", FOLDED)
def test_folded(name):
    forward, expected = FOLDED[name]
    block = block_of(forward)
    assert_found(block, expected)
    assert clones(block, rows()) == 0


def test_which_of_a_chain():
    block = block_of(lambda self, x: self.relu(self.ln2(self.fc2(self.ln(self.fc(self.ln3(x)))))))
    assert [(row["module"], row["pattern"]) for row in fusedres.explain(block).rows] == [
        ("ln3", LN_LINEAR), ("ln", "ln"), ("ln2", LINEAR_LN)
    ]  # fmt: skip


def statement_relu(self, x):
    out = self.ln(self.fc(x))
    out.relu_()
    out += x
    return out


def statement_add(self, x):
    out = self.ln(self.fc(x))
    out.add_(x)
    return torch.relu(out)


def added_into_a_clone(self, x):
    identity = x.clone()
    identity += self.relu(self.ln(self.fc(x)))
    return identity


def relu_in_place_behind_linear(self, x):
    out = self.fc(self.ln(x))
    self.relu_(out)
    return out * 2


def dead_difference(self, x):
    out = self.ln(self.fc(x))
    difference = out - x  # noqa: F841
    return torch.relu(out) + x


@pytest.mark.parametrize(
    "forward", [statement_relu, statement_add, added_into_a_clone, relu_in_place_behind_linear, dead_difference]
)
def test_folded_statements(forward):
    block = block_of(forward)
    assert_found(block, {LN_LINEAR if forward is relu_in_place_behind_linear else LINEAR_LN: 1})
    row = fusedres.explain(block).rows[0]
    assert ("with the addition" in row["reason"]) == (forward is not relu_in_place_behind_linear)


def into_the_input(self, x):
    out = self.relu(self.ln(self.fc(x)))
    x += out
    return x


def input_changes_before_the_addition(self, x):
    out = self.relu(self.ln(self.fc(x)))
    x.mul_(2)
    return out + x


# The pair is folded, the addition is not.
WITHOUT_THE_ADDITION = {
    "into the input": into_the_input,
    "input changes": input_changes_before_the_addition,
    "dropout": lambda self, x: self.drop(self.relu(self.ln(self.fc(x)))) + x,
    "alpha": lambda self, x: torch.add(x, self.relu(self.ln(self.fc(x))), alpha=2),
    "a number": lambda self, x: self.relu(self.ln(self.fc(x))) + 1.0,
    "itself": lambda self, x: (lambda out: out + out)(self.relu(self.ln(self.fc(x)))),
    "read twice": lambda self, x: (lambda out: (out + x, out * 2))(self.relu(self.ln(self.fc(x)))),
    "multiplied": lambda self, x: self.relu(self.ln(self.fc(x))) * x,
}


@pytest.mark.parametrize("name", WITHOUT_THE_ADDITION)
def test_without_the_addition(name):
    block = block_of(WITHOUT_THE_ADDITION[name])
    assert_found(block, {LINEAR_LN: 1})
    reason = fusedres.explain(block).rows[0]["reason"]
    assert "with the addition" not in reason
    assert ("without the addition" in reason) == name.startswith("in")


def changed_in_between(self, x):
    out = self.fc(x)
    x.mul_(2)
    return self.ln(out) + x


def weight_changed_in_between(self, x):
    out = self.fc(x)
    self.fc.weight.data.mul_(0.5)
    return self.ln(out)


def view_of_the_normalised(self, x):
    out = self.ln(x)
    view = out.view(-1)
    return self.fc(out).sum() + view


def computed_weight(self, x):
    return self.ln(F.linear(x, self.w * 2))


def norm_as_a_weight(self, x):
    return F.linear(x, self.ln(self.w))


# fmt: off
LEFT: dict[str, tuple[Callable[..., object], str | None]] = {
    "more than the last dimension": (lambda self, x: self.fc(self.outer(x)), "more than the last dimension"),
    "functional, two dimensions": (
        lambda self, x: self.fc(F.layer_norm(x, (3, 8))), "more than the last dimension"),
    "gelu": (lambda self, x: self.ln(F.gelu(self.fc(x))), "gelu is between it and the Linear in front of it"),
    "gelu behind": (
        lambda self, x: self.fc(self.gelu(self.ln(x))), "gelu (GELU) is between it and the Linear behind it"),
    "relu": (lambda self, x: self.ln(self.relu(self.fc(x))), "relu (ReLU) is between"),
    "dropout": (lambda self, x: self.relu(self.ln(self.drop(self.fc(x)))), "drop (Dropout) is between"),
    "dropout behind": (lambda self, x: self.fc(self.drop(self.ln(x))), "drop (Dropout) is between"),
    "normalised, used twice": (lambda self, x: self.fc(self.ln(x)) + self.fc2(self.ln(x)) * 0 + 1, None),
    "one value, used twice": (
        lambda self, x: (lambda n: self.fc(n) * self.fc2(n))(self.ln(x)), "its output is used more than once"),
    "linear, used twice": (
        lambda self, x: (lambda h: self.relu(self.ln(h)) + h)(self.fc(x)), "the output of the Linear fc is used more"),
    "view": (view_of_the_normalised, "its output is used more than once"),
    "computed weight": (computed_weight, "its weights are not plain tensors of the block"),
    "changed in between": (changed_in_between, "what fc reads may change before ln runs"),
    "weight changed in between": (weight_changed_in_between, "what fc reads may change before ln runs"),
    "norm as a weight": (norm_as_a_weight, None),
    "no linear near": (lambda self, x: torch.tanh(self.ln(x)) + x, None),
    "two operations away": (lambda self, x: self.ln(self.drop(self.gelu(self.fc(x)))), None),
}
# fmt: on


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    forward, reason = LEFT[name]
    block = block_of(forward)
    if name == "normalised, used twice":  # two calls: both are folded
        return assert_found(block, {LN_LINEAR: 2})
    before = type(block)
    assert_found(block, {"ln": 1} if reason else {})
    assert type(block) is before
    for row in fusedres.explain(block).rows:
        assert reason is not None
        assert reason in row["reason"]
        assert row["path"] == "eager"
    return None


def test_shapes_of_what_is_not_computed_are_known(capsys):
    def forward(self, x):
        hidden = self.wide(x)
        print(hidden.shape, hidden.size(-1), hidden.dim(), f"{hidden.ndim} {hidden.numel()}", hidden.device)
        normalised = F.layer_norm(hidden, hidden.shape[-1:])
        print("normalised", normalised.shape)
        out = torch.relu(normalised)
        print("positive", out.shape, x.shape)
        return out + x[..., :1]

    block, x = block_of(forward), rows(2, 3, 8)
    reference = copy.deepcopy(block)
    reference(x)
    before = capsys.readouterr().out
    fusedres.fuse(block)
    assert counts(block) == {LINEAR_LN: 1}
    block(x)
    assert capsys.readouterr().out == before
    assert_same_runs(block, reference, x)


def test_a_value_that_is_printed_is_computed(capsys):
    def forward(self, x):
        hidden = self.fc(x)
        print("hidden", hidden.mean())
        out = torch.relu(self.ln(hidden))
        print("positive", out.sum() > 0)
        return self.fc2(self.ln2(out))

    block = block_of(forward)
    reference, x = copy.deepcopy(block), rows()
    assert counts(fusedres.fuse(block)) == {"ln": 1, LN_LINEAR: 1}
    printed = []
    for candidate in (block, reference):
        candidate(x)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert_same_runs(block, reference, x)
