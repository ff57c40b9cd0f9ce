from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres import models
from tests import zoo
from tests.fusion.test_networks import BASIC, NETWORKS
from tests.zoo import TOLERANCE, assert_same_steps, counts, images, randomise, small, step


def torchvision_resnet() -> nn.Module:
    models = zoo.torchvision_models()
    return models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 2], num_classes=5)


def user_built() -> nn.Module:
    net = zoo.torchvision_models().ResNet
    return net(fusedres.nn.BasicBlock, [1, 1, 1, 1], num_classes=5)


FOUR_STAGES = {"bn_act_maxpool": 1, "bn_act": 10, "bn_add_bn_act": 4, "bn_add_act_avgpool": 1}
# Networks as people write them, and what is found in each.
ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    name: (network.build, network.shape, network.layers) for name, network in NETWORKS.items()
} | {
    "torchvision": (torchvision_resnet, (2, 3, 40, 40), FOUR_STAGES),
    "hand-written, one norm twice": (lambda: zoo.HandResNet(zoo.HandBlock, [1, 2]), (2, 3, 32, 32), BASIC),
    "sequential": (zoo.SequentialNet, (2, 3, 6, 6), {"bn_act": 1, "bn": 3}),
    "user-built": (user_built, (2, 3, 40, 40), {"bn_act_maxpool": 1, "bn_act": 4, "bn_add_act": 1, "bn_add_bn_act": 3}),
}  # fmt: skip


def plain_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module) is nn.BatchNorm2d]


@pytest.mark.parametrize("name", ZOO)
def test_patterns_are_found_and_results_are_eagers(name):
    build, shape, expected = ZOO[name]
    model = randomise(build())
    reference = copy.deepcopy(model)
    assert counts(model) == expected
    assert fusedres.fuse(model) is model
    assert counts(model) == expected
    assert not plain_norms(model)
    assert_same_steps(model, reference, images(*shape))


def test_input_of_the_specified_block_size():
    block = zoo.ProjectionBlock().double()
    reference = copy.deepcopy(block)
    assert_same_steps(fusedres.fuse(block), reference, images(4, 64, 14, 14))


def test_twice_is_once_and_unfuse_restores():
    model = small()
    classes = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    once = [type(module) for module in fusedres.fuse(model).modules()]
    assert once != classes
    assert [type(module) for module in fusedres.fuse(model).modules()] == once
    assert fusedres.unfuse(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert [type(module) for module in fusedres.unfuse(model).modules()] == classes


def test_unfuse_keeps_what_the_user_built():
    model = user_built()
    fusedres.unfuse(fusedres.fuse(model))
    block = model.get_submodule("layer1.0")
    assert type(block.bn1) is fusedres.nn.BatchNormAct2d
    assert block.bn1.act == "relu"
    assert type(model.bn1) is nn.BatchNorm2d


def test_blocks_keep_their_class_and_share_one():
    model = fusedres.fuse(zoo.resnet(models.Bottleneck, (2, 2)))
    blocks = [module for module in model.modules() if isinstance(module, models.Bottleneck)]
    assert len(blocks) == 4
    assert {type(block) for block in blocks} == {models.Bottleneck}  # in the graph of the whole
    alone = [fusedres.fuse(zoo.ResBlock(4, 4)) for _ in range(2)]
    assert type(alone[0]) is type(alone[1]) is not zoo.ResBlock
    assert type(alone[0]).__name__ == "ResBlock"


def test_state_dict_and_parameters_are_the_same():
    model = small()
    state = copy.deepcopy(model.state_dict())
    parameters, expected = list(model.parameters()), counts(model)
    fusedres.fuse(model)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == list(state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    small().load_state_dict(model.state_dict())
    model.load_state_dict(small().state_dict())
    model.load_state_dict(small().state_dict(), assign=True)
    assert counts(model) == expected


def test_an_optimizer_made_before_still_trains():
    model, x = small(), images()
    reference = copy.deepcopy(model)
    losses = []
    for candidate, convert in ((model, True), (reference, False)):
        optimizer = torch.optim.SGD(candidate.parameters(), lr=0.05, momentum=0.9)
        if convert:
            fusedres.fuse(candidate)
        history = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(candidate(x), torch.tensor([1, 3]))
            loss.backward()
            optimizer.step()
            history.append(loss.detach())
        losses.append(torch.stack(history))
    torch.testing.assert_close(*losses, **TOLERANCE)


def _save_and_load(model: nn.Module, tmp_path) -> nn.Module:
    torch.save(model, tmp_path / "model.pt")
    return torch.load(tmp_path / "model.pt", weights_only=False)


COPIES = {
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "pickle-2": lambda model, _: pickle.loads(pickle.dumps(model, protocol=2)),
    "torch.save": _save_and_load,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_fused_and_independent(how, tmp_path):
    model, x = fusedres.fuse(small()), images()
    duplicate = COPIES[how](model, tmp_path)
    assert [type(module) for module in duplicate.modules()] == [type(module) for module in model.modules()]
    assert counts(duplicate) == counts(model)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in duplicate.parameters()}
    assert_same_steps(duplicate, model, x)
    assert not any(isinstance(m, fusedres.nn.BatchNormAct2d) for m in fusedres.unfuse(duplicate).modules())


def test_shallow_copy_of_a_block():
    block = fusedres.fuse(small()).get_submodule("layer1.0")
    assert type(copy.copy(block)) is type(block)


def test_filter_fn():
    model = small()
    seen = []

    def keep(module: nn.Module, name: str) -> bool:
        seen.append((module, name))
        return not name.startswith("layer2") and name != "layer1.0.bn1"

    reference = copy.deepcopy(model)
    fusedres.fuse(model, keep)
    assert {name for _, name in seen} == {name for name, _ in model.named_modules()}
    assert all(model.get_submodule(name) is module for module, name in seen)
    assert {name for name, m in model.named_modules() if type(m) is nn.BatchNorm2d} == {
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.BatchNorm2d) and (name.startswith("layer2") or name == "layer1.0.bn1")
    }
    rows = {row["module"]: row for row in fusedres.explain(model).rows}
    assert rows["layer2.0.bn3"]["pattern"] == "bn"
    assert rows["layer2.0.bn3"]["path"] == rows["layer1.0.bn1"]["path"] == "eager"
    assert rows["layer1.0.bn2"]["pattern"] == "bn_act"
    assert_same_steps(model, reference, images())


def test_a_filtered_block_still_gets_its_batch_norms():
    model = fusedres.fuse(small(), lambda module, name: not isinstance(module, models.Bottleneck))
    assert not plain_norms(model)
    assert counts(model) == {"bn_act": 1, "bn": 11}


def test_a_child_fused_before_its_parent():
    model, reference = small(), None
    reference = copy.deepcopy(model)
    fusedres.fuse(model.get_submodule("layer1"))
    fusedres.fuse(model)
    assert counts(model) == counts(reference)
    assert_same_steps(model, reference, images())


def test_frozen_statistics_and_frozen_weights():
    model, x = small(), images()
    model.get_submodule("layer1").eval()
    model.get_submodule("layer2").requires_grad_(False)
    modes = [module.training for module in model.modules()]
    reference = copy.deepcopy(model)
    fusedres.fuse(model)
    assert [module.training for module in model.modules()] == modes
    ours, its = step(model, x), step(reference, x)
    assert ours.keys() == its.keys()
    for key in its:
        torch.testing.assert_close(ours[key], its[key], **TOLERANCE)
    assert not model.get_submodule("layer2.0.bn1").weight.requires_grad


def test_a_block_used_twice_in_the_tree():
    block = zoo.ResBlock(4, 4)
    model = randomise(nn.Sequential(block, nn.Identity(), block))
    reference = copy.deepcopy(model)
    assert_same_steps(fusedres.fuse(model), reference, images(2, 4, 5, 5))
    assert counts(model) == {"bn_act": 2, "bn_add_act": 2}


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.conv, self.bn = zoo.conv(3, 4), nn.BatchNorm2d(4)
        self.block = zoo.ResBlock(4, 4)
        self.reentrant = reentrant

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = randomise(Checkpointed(reentrant))
    reference = copy.deepcopy(model)
    fusedres.fuse(model)
    assert counts(model) == {"bn": 1, "bn_act": 1, "bn_add_act": 1}
    calls = []
    model.get_submodule("block.conv1").register_forward_hook(lambda *_: calls.append(1))
    assert_same_steps(model, reference, images(2, 3, 5, 5))
    assert len(calls) == 6  # each of three forwards, once more in its backward


def test_functional_call_and_grad_transforms():
    model, x = small().eval(), images()
    reference = copy.deepcopy(model)
    fusedres.fuse(model)
    parameters = {name: p.detach() * 1.1 for name, p in model.named_parameters()}

    def loss(candidate, values):
        return torch.func.functional_call(candidate, values, (x,)).square().sum()

    ours = torch.func.grad(lambda values: loss(model, values))(parameters)
    its = torch.func.grad(lambda values: loss(reference, values))(parameters)
    for name in its:
        torch.testing.assert_close(ours[name], its[name], **TOLERANCE)


def test_broadcasting_and_promoting_additions_are_eagers():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x, y):
            return torch.relu(self.bn(x) + y)

    block = randomise(Block())
    reference, x = copy.deepcopy(block), images(2, 4, 5, 5)
    fusedres.fuse(block)
    assert counts(block) == {"bn_add_act": 1}
    assert isinstance(block, Block)
    integers = torch.ones(2, 4, 5, 5, dtype=torch.int64)
    for y in (images(2, 4, 5, 5), images(4, 1, 1), images(3, 1, 1, 5, 5), integers, 1.5):
        torch.testing.assert_close(block(x, y), reference(x, y), **TOLERANCE)
    mixed = block(x, images(2, 4, 5, 5).float())
    assert mixed.dtype == torch.float64


def test_in_place_addition_keeps_its_operands_dtype():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x, y):
            out = self.bn(x)
            out += y
            return torch.relu(out)

    block = Block().eval()
    reference = copy.deepcopy(block)
    x, y = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    out = fusedres.fuse(block)(x, y)
    assert out.dtype == reference(x, y).dtype == torch.float32
    torch.testing.assert_close(out, reference(x, y))
    with pytest.raises(RuntimeError):
        block(x, torch.randn(3, 2, 4, 3, 3))


def test_a_lone_batch_norm_and_models_without_one():
    norm = nn.BatchNorm2d(3)
    assert fusedres.fuse(norm) is norm
    assert isinstance(norm, fusedres.nn.BatchNormAct2d)
    assert counts(norm) == {"bn": 1}
    linear = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    fusedres.fuse(linear)
    assert type(linear) is nn.Sequential
    assert fusedres.explain(linear).rows == []


def test_random_state_and_modules_are_untouched_by_fuse():
    model = small()
    state, buffers = torch.get_rng_state(), {k: v.clone() for k, v in model.named_buffers()}
    fusedres.explain(model)
    fusedres.fuse(model)
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in model.named_buffers():
        assert torch.equal(value, buffers[key])
