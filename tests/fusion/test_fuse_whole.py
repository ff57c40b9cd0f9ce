"""Fusions that span layers and blocks: stem, projection joins, forks of gradients, head, recomputation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres
from tests import zoo
from tests.fusion.blocks import block_of
from tests.zoo import assert_same_steps, counts, images, step

SHAPE = (2, 4, 9, 7)


def check(block: nn.Module, shape: tuple[int, ...] = SHAPE, **options: Any) -> dict[str, int]:
    """Fuse it, compare with what it was, and say what was found."""
    reference = copy.deepcopy(block)
    fusedres.fuse(block, **options)
    assert_same_steps(block, reference, images(*shape))
    return counts(block)


STEMS: dict[str, tuple[Callable[..., object], str]] = {
    "module": (lambda self, x: self.pool(self.relu(self.b(x))), "bn_act_maxpool"),
    "in place, and an identity": (lambda self, x: self.pool(self.alias(self.relu_(self.b(x)))), "bn_act_maxpool"),
    "function": (lambda self, x: F.max_pool2d(F.relu(self.b(x)), 3, 2, 1), "bn_act_maxpool"),
    "keywords": (lambda self, x: F.max_pool2d(self.b(x).relu(), kernel_size=(3, 2), padding=1), "bn_act_maxpool"),
    "of torch": (lambda self, x: torch.max_pool2d(torch.relu(self.b(x)), 2), "bn_act_maxpool"),
    "dilated": (lambda self, x: F.max_pool2d(F.relu(self.b(x)), 2, 2, 0, 2, True), "bn_act_maxpool"),
    "with indices": (lambda self, x: F.max_pool2d(F.relu(self.b(x)), 2, return_indices=True)[0], "bn_act"),
    "without ReLU": (lambda self, x: self.pool(self.b(x)), "bn"),
}


@pytest.mark.parametrize("name", STEMS)
def test_stem(name):
    forward, pattern = STEMS[name]
    assert check(block_of(forward)) == {pattern: 1}


def stem(self, x):
    return self.pool(self.relu(self.b(x)))


def test_stem_whose_activation_is_read_again():
    def forward(self, x):
        x = self.relu(self.b(x))
        return self.pool(x).sum() + x

    assert check(block_of(forward)) == {"bn_act": 1}


@pytest.mark.parametrize("name", ["kernel_size", "return_indices", "ceil_mode", "replaced"])
def test_stem_whose_pooling_changes_later(name):
    block = fusedres.fuse(block_of(stem))
    reference = fusedres.unfuse(copy.deepcopy(block))
    for candidate in (block, reference):
        if name == "replaced":
            candidate.pool = nn.AvgPool2d(2)
        else:
            setattr(candidate.pool, name, {"kernel_size": 5, "return_indices": True, "ceil_mode": True}[name])
            candidate.pool.padding = 1
    ours, its = block(images(*SHAPE)), reference(images(*SHAPE))
    assert type(ours) is type(its)


JOINS: dict[str, tuple[Callable[..., object], dict[str, int]]] = {
    "sequence": (lambda self, x: F.relu(self.b(x) + self.skip(x)), {"bn_add_bn_act": 1}),
    "in place": (lambda self, x: self.relu_(self.b(x).add_(self.skip(x))), {"bn_add_bn_act": 1}),
    "other first": (lambda self, x: F.relu(torch.add(self.skip(x), self.b(x))), {"bn_add_bn_act": 1}),
    "both direct": (lambda self, x: F.relu(self.bn2(self.conv2(x)) + self.b(x)), {"bn_add_bn_act": 1}),
    "without ReLU": (lambda self, x: self.b(x) + self.skip(x), {"bn_add_bn": 1}),
    "one with ReLU": (lambda self, x: F.relu(self.relu(self.bn2(x)) + self.b(x)), {"bn_act": 1, "bn_add_act": 1}),
    "one twice": (lambda self, x: F.relu(self.bn(self.conv(x)) + self.bn(x)), {"bn": 1, "bn_add_act": 1}),
    "scaled": (lambda self, x: F.relu(torch.add(self.b(x), self.skip(x), alpha=2)), {"bn": 2}),
    "of another shape": (
        lambda self, x: F.relu(self.b(x) + self.bn2(x.mean((2, 3), keepdim=True))), {"bn_add_bn_act": 1}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", JOINS)
def test_join(name):
    forward, expected = JOINS[name]
    assert check(block_of(forward)) == expected


def projection(self, x):
    return F.relu(self.b(x) + self.skip(x))


def test_join_of_a_result_that_is_read_again():
    def forward(self, x):
        skip = self.skip(x)
        return F.relu(self.b(x) + skip) * skip

    assert check(block_of(forward)) == {"bn_add_act": 1, "bn": 1}


CHANGES: dict[str, Callable[[Any], object]] = {
    "hook on the sequence": lambda block: block.skip.register_forward_hook(lambda module, args, out: 2 * out),
    "hook on its BatchNorm": lambda block: block.skip[1].register_forward_pre_hook(lambda module, args: (-args[0],)),
    "hook on its convolution": lambda block: block.skip[0].register_forward_hook(lambda module, args, out: 2 * out),
    "appended": lambda block: block.skip.append(nn.Softplus()),
    "BatchNorm replaced": lambda block: block.skip.__setitem__(1, nn.Softplus()),
    "convolution replaced": lambda block: block.skip.__setitem__(0, nn.Softplus()),
    "sequence replaced": lambda block: setattr(block, "skip", nn.Softplus()),
    "forward replaced": lambda block: setattr(block.skip, "forward", torch.sigmoid),
}


@pytest.mark.parametrize("name", CHANGES)
def test_join_that_changes_later(name):
    block, x = fusedres.fuse(block_of(projection)), images(*SHAPE)
    unchanged = block(x)
    reference = fusedres.unfuse(copy.deepcopy(block))
    for candidate in (block, reference):
        torch.manual_seed(0)
        CHANGES[name](candidate)
    assert_same_steps(block, reference, x)
    assert not torch.equal(block.train()(x), unchanged)


HEADS: dict[str, Callable[..., object]] = {
    "module": lambda self, x: self.average(F.relu(self.b(x) + x)).flatten(1),
    "function": lambda self, x: F.adaptive_avg_pool2d(F.relu(self.b(x) + x), (1, 1)),
    "method": lambda self, x: F.relu(self.b(x) + x).mean((2, 3)),
    "method from the end": lambda self, x: F.relu(self.b(x) + x).mean([-1, -2], keepdim=True),
    "mean": lambda self, x: torch.mean(F.relu(self.b(x) + x), dim=(2, 3), keepdim=True),
}


@pytest.mark.parametrize("name", HEADS)
def test_head(name):
    assert check(block_of(HEADS[name])) == {"bn_add_act_avgpool": 1}


OTHER_HEADS: dict[str, tuple[Callable[..., object], str]] = {
    "without addition": (lambda self, x: self.average(F.relu(self.b(x))), "bn_act_avgpool"),
    "without ReLU": (lambda self, x: self.average(self.b(x) + x), "bn_add_avgpool"),
    "BatchNorm alone": (lambda self, x: self.b(x).mean((2, 3)), "bn_avgpool"),
    "over one axis": (lambda self, x: F.relu(self.b(x)).mean(2), "bn_act"),
    "over all": (lambda self, x: F.relu(self.b(x)).mean(), "bn_act"),
    "two by two": (lambda self, x: F.adaptive_avg_pool2d(F.relu(self.b(x)), 2), "bn_act"),
    "in another dtype": (lambda self, x: F.relu(self.b(x)).mean((2, 3), dtype=torch.float32), "bn_act"),
}


@pytest.mark.parametrize("name", OTHER_HEADS)
def test_other_heads(name):
    forward, pattern = OTHER_HEADS[name]
    assert check(block_of(forward)) == {pattern: 1}


def test_head_whose_activation_is_read_again():
    def forward(self, x):
        x = F.relu(self.b(x) + x)
        return self.average(x), x.shape, x

    block = fusedres.fuse(block_of(forward))
    assert counts(block) == {"bn_add_act": 1}


def test_head_whose_average_changes_later():
    block = fusedres.fuse(block_of(HEADS["module"]))
    reference = fusedres.unfuse(copy.deepcopy(block))
    for change in (
        lambda candidate: setattr(candidate, "average", nn.AdaptiveAvgPool2d((2, 1))),
        lambda candidate: candidate.average.register_forward_hook(lambda module, args, out: 2 * out),
    ):
        for candidate in (block, reference):
            change(candidate)
        fusedres.fuse(block)  # which reads the size of the output
        assert_same_steps(block, reference, images(*SHAPE))


def resnet() -> nn.Module:
    return zoo.resnet(small_input=False)


def gradients(model: nn.Module, watch: Callable[[nn.Module, list[Tensor]], object]) -> list[Tensor]:
    """Of the tensors that ``watch`` puts into its list during a step."""
    seen: list[Tensor] = []
    watch(model, seen)
    torch.manual_seed(0)
    step(model, images(2, 3, 32, 32))
    return [tensor.grad for tensor in seen if tensor.grad is not None]


def keep(seen: list[Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, *output: Any) -> None:
        for value in (args[0], *output):
            value.retain_grad()
            seen.append(value)

    return hook


def test_a_global_hook_sees_the_whole_gradient():
    def watch(model: nn.Module, seen: list[Tensor]) -> None:
        handles.append(nn.modules.module.register_module_forward_pre_hook(keep(seen)))

    model, handles = resnet(), []
    reference = copy.deepcopy(model)
    fusedres.fuse(model)
    results = []
    for candidate in (reference, model):
        results.append(gradients(candidate, watch))
        handles.pop().remove()
    expected, found = results
    assert len(expected) == len(found) > 12
    for ours, its in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-8, atol=1e-8)


def test_blocks_that_are_called_alone():
    model = resnet()
    reference = copy.deepcopy(model)
    fusedres.fuse(model)
    for name, shape in (("layer1", (2, 4, 8, 8)), ("layer1.0", (2, 4, 8, 8)), ("layer2", (2, 4, 8, 8))):
        assert_same_steps(model.get_submodule(name), reference.get_submodule(name), images(*shape))
    trunk, plain = (nn.Sequential(*list(each.children())[:-1]) for each in (model, reference))
    assert_same_steps(trunk, plain, images(2, 3, 32, 32))


def test_fork_of_a_value_with_three_readers():
    def forward(self, x):
        x = F.relu(self.b(x))
        return self.conv(x) + self.conv2(x) * x

    block = block_of(forward)
    assert check(block) == {"bn_act": 1}
    [row] = fusedres.explain(block).rows
    assert "gradients of its readers are added" in row["reason"]


def test_no_fork_of_what_user_code_can_reach():
    def forward(self, x):
        x = F.relu(self.b(x))
        return self.conv(x) + self.conv2(x), x

    block = fusedres.fuse(block_of(forward))
    reference = fusedres.unfuse(copy.deepcopy(block))
    grads = []
    for candidate in (block, reference):
        out, inner = candidate(torch.arange(504.0, dtype=torch.float64).reshape(SHAPE).sin())
        inner.retain_grad()
        out.square().sum().backward()
        grads.append(inner.grad)
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-8)


LEFT_OUT: dict[str, dict[str, int]] = {
    "stem": {"bn_act": 4, "bn_act_maxpool": 0},
    "join": {"bn_add_bn_act": 0, "bn": 1, "bn_add_act": 2, "bn_add_act_avgpool": 1},  # the last block is none any more
    "fork": {},
    "head": {},
    "stem, join, fork, head": {"bn_act_maxpool": 0, "bn_act": 4, "bn_add_bn_act": 0, "bn": 1, "bn_add_act": 3},
}


@pytest.mark.parametrize("fusions", LEFT_OUT)
def test_each_fusion_can_be_left_out(fusions):
    model = resnet()
    whole = {"bn_act_maxpool": 1, "bn_act": 3, "bn_add_act": 2, "bn_add_bn_act": 1}
    rest = check(model, (2, 3, 32, 32), disable=set(fusions.split(", ")))
    assert rest == {name: n for name, n in (whole | LEFT_OUT[fusions]).items() if n}
    forked = [row for row in fusedres.explain(model).rows if "gradients of its readers are added" in row["reason"]]
    assert bool(forked) == ("fork" not in fusions)
    assert counts(fusedres.fuse(model)) == whole


def test_options_are_checked():
    model = resnet()
    for wrong in ({"disable": {"stem", "stern"}}, {"disable": "stem"}, {"save": "everything"}):
        with pytest.raises(ValueError, match="must be"):
            fusedres.fuse(model, **wrong)
    assert all(type(module).__module__ != "fusedres.nn.batch_norm" for module in model.modules())


def test_recomputation():
    model = resnet()
    assert check(model, (2, 3, 32, 32), save="recompute") == counts(resnet())
    again = [row["module"] for row in fusedres.explain(model).rows if "again in the backward" in row["reason"]]
    assert again == [f"layer{i}.{j}.bn1" for i, j in ((1, 0), (1, 1), (2, 0))]
    fusedres.fuse(model)
    assert not any("again in the backward" in row["reason"] for row in fusedres.explain(model).rows)


RECOMPUTED: dict[str, tuple[Callable[..., object], bool]] = {
    "plain": (lambda self, x: self.conv2(F.relu(self.b(x))), True),
    "read again": (lambda self, x: (y := F.relu(self.b(x))) + self.conv2(y), False),
    "without ReLU": (lambda self, x: self.conv2(self.b(x)), False),
    "function": (lambda self, x: F.conv2d(F.relu(self.b(x)), self.conv2.weight), False),
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_what_is_recomputed(name):
    forward, expected = RECOMPUTED[name]
    block = block_of(forward)
    check(block, save="recompute")
    assert ("again in the backward" in fusedres.explain(block).rows[0]["reason"]) == expected


CONVOLUTION_CHANGES: dict[str, Callable[[Any], object]] = {
    "hook": lambda block: block.conv2.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "replaced": lambda block: setattr(block, "conv2", nn.Softplus()),
    "padded": lambda block: setattr(block, "conv2", nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect").double()),
    "same": lambda block: setattr(block, "conv2", nn.Conv2d(4, 4, 3, padding="same").double()),
    "weight": lambda block: setattr(block.conv2, "weight", nn.Parameter(2 * block.conv2.weight.detach())),
    "weight normalised": lambda block: nn.utils.parametrizations.weight_norm(block.conv2),
}


@pytest.mark.parametrize("name", CONVOLUTION_CHANGES)
def test_a_recomputed_input_of_a_convolution_that_changes_later(name):
    block = fusedres.fuse(block_of(RECOMPUTED["plain"][0]), save="recompute")
    reference = fusedres.unfuse(copy.deepcopy(block))
    for candidate in (block, reference):
        torch.manual_seed(0)
        CONVOLUTION_CHANGES[name](candidate)
    assert_same_steps(block, reference, images(*SHAPE))
