"""Pre-activation networks: sums that the next BatchNorm makes, inside a block and from block to block."""

from __future__ import annotations

import collections
import contextlib
import copy
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fusedres
from fusedres import functional, models
from tests import zoo
from tests.fusion.test_fuse import COPIES
from tests.fusion.trained import check_network
from tests.zoo import TOLERANCE, assert_same_steps, conv, counts, images, randomise, step


@contextlib.contextmanager
def counted_adds() -> Iterator[collections.Counter[str | None]]:
    """Counts the calls of :func:`fusedres.functional.add_batch_norm_act`, by activation."""
    seen: collections.Counter[str | None] = collections.Counter()

    def count(input, residual, norm, act=None, group=None):
        seen[act] += 1
        return functional.add_normalise(input, residual, norm, act, group)

    with contextlib.ExitStack() as stack:
        for module in ("fusedres.nn.batch_norm", "fusedres.fusion.runtime"):
            stack.enter_context(mock.patch(f"{module}.add_normalise", count))
        yield seen


class Projection(nn.Module):
    """The shortcut's projection, with a BatchNorm of its own, reads the sum itself."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, width, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(conv(inputs, width, 1, stride), nn.BatchNorm2d(width))

    def forward(self, x):
        identity = self.shortcut(x)
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.add(out, identity)


class Listed(nn.Module):
    """Blocks in a ModuleList, no ReLU after the last BatchNorm, and sizes that are read on the way."""

    def __init__(self, block: type[nn.Module] = zoo.KuangliuBlock, depth: int = 3, width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = conv(3, width), nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(block(width, width) for _ in range(depth))
        self.fc = nn.Linear(width, 5)

    def forward(self, x):
        x = self.stem(x)
        images = 0
        for block in self.blocks:
            x = block(x)
            images = x.size(0)
        return self.fc(self.norm(x).square().mean((2, 3)).view(images, -1))


def hand(block: type[nn.Module], layers: tuple[int, ...] = (2, 2)) -> nn.Module:
    return zoo.HandPreActResNet(block, list(layers))


def native(block: type[nn.Module], layers: tuple[int, ...] = (2, 2), small_input: bool = True) -> nn.Module:
    return models.PreActResNet(block, layers, 5, width=8, small_input=small_input)


BASIC, BOTTLENECK = {"add_bn_act": 4, "bn_act": 5}, {"add_bn_act": 4, "bn_act": 9}
SMALL = (2, 3, 8, 8)
ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "cifar": (lambda: models.preact_resnet_cifar(8, width=8), SMALL, {"add_bn_act": 3, "bn_act": 4}),
    "cifar-pad": (
        lambda: models.preact_resnet_cifar(11, width=4, shortcut="pad"), SMALL, {"add_bn_act": 3, "bn_act": 7}
    ),
    "stem": (lambda: native(fusedres.nn.PreActBasicBlock, small_input=False), (2, 3, 32, 32), BASIC),
    "nn-basic": (lambda: native(fusedres.nn.PreActBasicBlock), SMALL, BASIC),
    "nn-bottleneck": (lambda: native(fusedres.nn.PreActBottleneck), SMALL, BOTTLENECK),
    "hand-basic": (lambda: hand(zoo.KuangliuBlock), SMALL, BASIC),
    "hand-bottleneck": (lambda: hand(zoo.KuangliuBottleneck), SMALL, BOTTLENECK),
    "hand-pad": (lambda: hand(zoo.ZeroPadBlock), SMALL, BASIC),
    "projection": (lambda: hand(Projection), SMALL, {"add_bn_act": 3, "bn_act": 6, "bn_add": 1}),
    "list": (Listed, SMALL, {"add_bn_act": 2, "bn_act": 4, "add_bn": 1}),
    "timm-basic": (lambda: zoo.timm_resnetv2("resnetv2_18", (2, 2)), (2, 3, 32, 32), BASIC),
    "timm-bottleneck": (lambda: zoo.timm_resnetv2("resnetv2_50", (2, 2)), (2, 3, 32, 32), BOTTLENECK),
    "timm-d": (lambda: zoo.timm_resnetv2("resnetv2_50d", (2, 2)), (2, 3, 32, 32), {"add_bn_act": 4, "bn_act": 11}),
}  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_patterns_are_found_and_results_are_eagers(name):
    build, shape, expected = ZOO[name]
    model = randomise(build())
    reference, classes = copy.deepcopy(model), [type(module) for module in model.modules()]
    assert counts(model) == expected
    rows = fusedres.explain(model).rows
    assert fusedres.fuse(model) is model
    assert fusedres.explain(model).rows == rows
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), classes, strict=True))
    x = images(*shape)
    for training in (True, False):
        with counted_adds() as seen:
            model.train(training)(x)
        assert seen == {act: n for act, n in ((None, expected.get("add_bn")), ("relu", expected["add_bn_act"])) if n}
        reference.train(training)(x)
    assert_same_steps(model, reference, x)


# Where the sum comes from: two stages, a bottleneck, user code, a projection with a norm, no ReLU behind it, timm.
SEEDS = {"cifar": 0, "nn-bottleneck": 0, "hand-basic": 1, "projection": 0, "list": 0, "timm-bottleneck": 0}


@pytest.mark.floor
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("name", SEEDS)
def test_oracle(name):
    """In float32 through the kernels, as good as eager."""
    build, shape, expected = ZOO[name]
    torch.manual_seed(SEEDS[name])
    model = randomise(build()).float()
    with counted_adds() as seen:
        check_network(model, torch.randn(shape), torch.channels_last)
    assert seen["relu"] == expected["add_bn_act"]


def test_rows_name_the_norm_that_adds():
    rows = {row["module"]: row["pattern"] for row in fusedres.explain(models.preact_resnet18(width=4)).rows}
    assert {name for name, pattern in rows.items() if pattern == "bn_act"} == {
        "layer1.0.bn1", *(f"layer{i}.{j}.bn2" for i in (1, 2, 3, 4) for j in (0, 1))
    }  # fmt: skip
    assert rows["layer1.1.bn1"] == rows["layer2.0.bn1"] == rows["bn"] == "add_bn_act"


def test_timm_keeps_its_norms():
    model = zoo.timm_resnetv2("resnetv2_50")
    kinds, state = [type(module) for module in model.modules()], list(model.state_dict())
    fusedres.fuse(model)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {type(norm).__module__ for norm in norms} == {"timm.layers.norm_act"}
    assert {row["path"] for row in fusedres.explain(model).rows} <= {"reference", "triton"}
    assert list(model.state_dict()) == state
    assert [type(module) for module in fusedres.unfuse(model).modules()] == kinds


@pytest.mark.parametrize("change", ["act", "drop", "hook", "replace"])
def test_a_norm_of_timms_that_changes_is_called(change):
    model = randomise(zoo.timm_resnetv2("resnetv2_18", (1, 2)))
    reference, x = copy.deepcopy(model), images(2, 3, 32, 32)
    fusedres.fuse(model)
    for candidate in (model, reference):
        norm = candidate.get_submodule("stages.1.blocks.0.norm1")
        if change == "hook":
            norm.get_submodule("act").register_forward_hook(lambda *args: args[2] * 2)
        elif change == "replace":
            candidate.get_submodule("stages.1.blocks.0").norm1 = nn.BatchNorm2d(16).double()
        else:
            norm.register_module(change, nn.Hardtanh())
    assert_same_steps(model, reference, x)
    rows = {row["module"]: row for row in fusedres.explain(model).rows}
    changed = rows["stages.1.blocks.0.norm1"]
    assert (changed["pattern"], changed["path"]) == ("bn", "eager" if change == "replace" else "reference")
    assert rows["stages.1.blocks.1.norm1"]["pattern"] == "add_bn_act"
    assert rows["norm"]["pattern"] == "add_bn_act"


def test_twice_is_once_and_unfuse_restores():
    model = randomise(hand(zoo.KuangliuBlock))
    classes, state = [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())
    once = [type(module) for module in fusedres.fuse(model).modules()]
    assert [type(module) for module in fusedres.fuse(model).modules()] == once != classes
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [type(module) for module in fusedres.unfuse(model).modules()] == classes


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_fused_and_independent(how, tmp_path):
    model, x = fusedres.fuse(randomise(hand(Projection))), images()
    duplicate = COPIES[how](model, tmp_path)
    assert [type(module) for module in duplicate.modules()] == [type(module) for module in model.modules()]
    assert counts(duplicate) == counts(model) == ZOO["projection"][2]
    assert_same_steps(duplicate, model, x)


def test_blocks_keep_their_class():
    model = fusedres.fuse(models.preact_resnet_cifar(29, width=1))
    blocks = [module for module in model.modules() if isinstance(module, models.PreActBottleneck)]
    assert len(blocks) == 9
    assert {type(block) for block in blocks} == {models.PreActBottleneck}  # in the graph of the whole


def test_a_thousand_layers():
    """As many calls as a network of that depth makes, of one block, which is quicker to trace."""
    block = models.PreActBottleneck(4, 1)
    for norm in (block.bn1, block.bn2, block.bn3):
        nn.init.constant_(norm.weight, 0.1)
    model = randomise(nn.Sequential(*[block] * 333, nn.BatchNorm2d(4), nn.ReLU()))
    reference, x = copy.deepcopy(model), images(2, 4, 4, 4)
    fusedres.fuse(model)
    with counted_adds() as seen:
        out = model(x)
    assert seen == {"relu": 333}
    torch.testing.assert_close(out, reference(x), **TOLERANCE)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_filter_fn():
    model = randomise(hand(zoo.KuangliuBlock))
    reference = copy.deepcopy(model)
    fusedres.fuse(model, lambda module, name: name not in ("layers.0.1", "layers.1.1.bn1"))
    assert counts(model) == {"add_bn_act": 1, "bn_act": 5, "bn": 3}
    assert_same_steps(model, reference, images())


@pytest.mark.parametrize("kind", [zoo.KuangliuBlock, fusedres.nn.PreActBasicBlock])
def test_one_block_called_twice(kind):
    block = kind(4, 4)
    model = randomise(nn.Sequential(block, block, nn.Sequential(block), nn.BatchNorm2d(4), nn.ReLU()))
    reference, x = copy.deepcopy(model), images(2, 4, 5, 5)
    fusedres.fuse(model)
    with counted_adds() as seen:
        model(x)
    assert seen == {"relu": 3}
    reference(x)
    assert_same_steps(model, reference, x)


def test_partly_frozen_networks():
    model = randomise(hand(zoo.KuangliuBlock))
    model.get_submodule("layers.0").eval().requires_grad_(False)
    model.get_submodule("layers.1.0").eval()
    reference, x = copy.deepcopy(model), images()
    fusedres.fuse(model)
    ours, its = step(model, x), step(reference, x)
    assert ours.keys() == its.keys()
    for key in its:
        torch.testing.assert_close(ours[key], its[key], **TOLERANCE)


class Checkpointed(Listed):
    """Each block, some, or stretches of several are computed again in the backward."""

    def __init__(self, how: str) -> None:
        super().__init__(depth=4)
        self.how = how
        self.stages = nn.Sequential(*self.blocks)

    def forward(self, x):
        x = self.stem(x)
        if self.how == "sequential":
            x = checkpoint_sequential(self.stages, 2, x, use_reentrant=False)
        elif self.how == "stage":
            x = checkpoint(self.stages, x, use_reentrant=False)
        else:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=self.how == "reentrant")
        assert isinstance(x, Tensor)
        return self.fc(F.relu(self.norm(x)).mean((2, 3)))


@pytest.mark.parametrize("how", ["reentrant", "blocks", "sequential", "stage"])
def test_gradient_checkpointing(how):
    model = randomise(Checkpointed(how))
    reference = copy.deepcopy(model)
    fusedres.fuse(model)
    with counted_adds() as seen:
        assert_same_steps(model, reference, images())
    assert seen["relu"] == (3 * 6 if how == "stage" else 0)  # three joins in three forwards, again in their backwards


def test_checkpointing_that_timm_switches_on_later():
    model = randomise(zoo.timm_resnetv2("resnetv2_18", (2, 2)))
    reference, x = copy.deepcopy(model), images(2, 3, 32, 32)
    fusedres.fuse(model)
    for candidate in (model, reference):
        candidate.set_grad_checkpointing()  # pyright: ignore[reportCallIssue]
    fusedres.fuse(model)
    assert_same_steps(model, reference, x)
