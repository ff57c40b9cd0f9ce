"""Sums that user code can reach or change: where a BatchNorm must not make them, and where it may."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres
from tests import zoo
from tests.fusion.blocks import block_of
from tests.fusion.test_fuse_preact import Listed, Projection, counted_adds, hand, native
from tests.zoo import TOLERANCE, assert_same_steps, conv, counts, images, randomise


def in_place(self, x):
    s = self.conv(x)
    s += x
    return torch.relu(self.bn(s)) + s


def read_before_the_norm(self, x):
    s = self.conv(x) + x
    shortcut = self.skip(s)
    return self.conv2(F.relu(self.bn(s))) + shortcut


def through_an_alias(self, x):
    s = self.conv(x) + x
    identity = self.alias(s)
    return torch.relu(self.bn(s)) * identity.mean()


def two_norms(self, x):
    s = torch.add(self.conv(x), x)
    return F.relu(self.bn(s)) + F.relu(self.bn2(s))


def printed(self, x):
    s = x + self.conv(x)
    print(s.mean().item(), s.shape)
    return F.relu(self.bn(s))


JOINED: dict[str, tuple[Callable[..., object], dict[str, int]]] = {
    "alone": (lambda self, x: F.relu(self.bn(self.conv(x) + x)), {"add_bn_act": 1}),
    "without ReLU": (lambda self, x: self.bn(self.conv(x) + x), {"add_bn": 1}),
    "of the conv only": (lambda self, x: self.conv2(self.bn(self.conv(x) + self.conv2(x))), {"add_bn": 1}),
    "in place": (in_place, {"add_bn_act": 1}),
    "read before the norm": (read_before_the_norm, {"add_bn_act": 1, "bn_add": 1}),
    "through an alias": (through_an_alias, {"add_bn_act": 1}),
    "two norms": (two_norms, {"add_bn_act": 1, "bn_act": 1}),
    "printed": (printed, {"add_bn_act": 1}),
}


def in_place_into_the_input(self, x):
    y = self.alias(x)
    y += self.user(x)
    return F.relu(self.bn(y))


def returned(self, x):
    s = self.conv(x) + x
    return F.relu(self.bn(s)) + 0 * s.mean(), s


def alias_returned(self, x):
    s = self.conv(x) + x
    return F.relu(self.bn(s)), self.alias(s)


def handed_to_user_code(self, x):
    s = self.conv(x) + x
    return self.conv2(F.relu(self.bn(s))) + self.user(s)


def hooked(self, x):
    s = self.conv(x) + x
    s.register_hook(lambda grad: grad * 2)
    return F.relu(self.bn(s)) + s


def changed_later(self, x):
    s = self.conv(x) + x
    out = F.relu(self.bn(s))
    return out + self.relu_(self.alias(s * 1)) + s.clone().mul_(2)


def changed_before(self, x):
    s = self.conv(x) + x
    s.mul_(2)
    return F.relu(self.bn(s))


def statistics_before(self, x):
    s = self.conv(x) + x
    mean = self.bn.running_mean * 1
    return F.relu(self.bn(s)) + mean.view(1, -1, 1, 1)


LEFT: dict[str, tuple[Callable[..., object], dict[str, int]]] = {
    "into the input": (in_place_into_the_input, {"bn_act": 1}),
    "returned": (returned, {"bn_act": 1}),
    "alias returned": (alias_returned, {"bn_act": 1}),
    "handed to user code": (handed_to_user_code, {"bn_act": 1}),
    "hooked": (hooked, {"bn": 1}),
    "changed before": (changed_before, {"bn_act": 1}),
    "statistics before": (statistics_before, {"bn_act": 1}),
    "scaled": (lambda self, x: F.relu(self.bn(torch.add(self.conv(x), x, alpha=2))), {"bn_act": 1}),
    "number": (lambda self, x: F.relu(self.bn(self.conv(x) + 1.0)), {"bn_act": 1}),
    # The BatchNorm in front of the addition has it.
    "behind a norm": (lambda self, x: F.relu(self.bn(self.bn2(self.conv(x)) + x)), {"bn_act": 1, "bn_add": 1}),
}  # fmt: skip


class First(nn.Module):
    """The first of several outputs, all of which get a gradient."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x):
        outputs = self.block(x * 1)
        return sum(outputs) if isinstance(outputs, tuple) else outputs


@pytest.mark.parametrize("name", [*JOINED, *LEFT, "changed later"])
def test_inside_a_block(name, capsys):
    forward, expected = (JOINED | LEFT | {"changed later": (changed_later, {"add_bn_act": 1})})[name]
    block = block_of(forward)
    reference, x = copy.deepcopy(block), images(2, 4, 5, 5)
    fusedres.fuse(block)
    assert counts(block) == expected
    assert_same_steps(First(block), First(reference), x)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
@pytest.mark.parametrize("in_place", [True, False])
def test_mixed_dtypes_and_broadcasting_are_eagers(in_place, dtypes):
    def forward(self, x, y):
        s = x * 1
        if in_place:
            s += y
        else:
            s = s + y
        return F.relu(self.bn(s)) + s

    block = block_of(forward)
    x, y = (torch.randn(2, 4, 5, 5, dtype=dtype) for dtype in dtypes)
    reference = copy.deepcopy(block)
    fusedres.fuse(block)
    assert counts(block)["add_bn_act"] == 1
    for other in (y, y[:1], 2.0, torch.ones(4, 1, 1, dtype=torch.int64)):
        if in_place and isinstance(other, Tensor) and x.dtype == torch.float32:
            continue  # BatchNorm of float32 with weights of float64
        if x.dtype == torch.float32 and not (isinstance(other, Tensor) and other.dtype == torch.float64):
            continue
        ours, its = block(x, other), reference(x, other)
        assert ours.dtype == its.dtype
        torch.testing.assert_close(ours, its)


HOOKED = [
    "layers.0",
    "layers.0.1",
    "layers.0.1.bn1",
    "layers.1.0.bn1",
    "layers.1.0.shortcut.0",
    "layers.1.1.conv2",
    "bn",
]


# Hooks that are there when it is fused are looked for in one place, whatever the block.
@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize(
    ("kind", "before"), [(Projection, False), (zoo.KuangliuBlock, False), (zoo.KuangliuBlock, True)]
)
def test_hooks_see_what_they_saw(kind, name, before):
    def watch(model: nn.Module, log: list[Tensor]) -> None:
        def see(module, args, out):
            for value in (args[0], out):
                log.append(value.detach().clone())
                value.register_hook(lambda grad: log.append(grad.clone()))

        model.get_submodule(name).register_forward_hook(see)

    model, logs = randomise(hand(kind)), ([], [])
    reference = copy.deepcopy(model)
    watch(reference, logs[1])
    if before:
        watch(model, logs[0])
    fusedres.fuse(model)
    if not before:
        watch(model, logs[0])
    for training in (True, False):
        for candidate in (model, reference):
            candidate.train(training)(images(2, 3, 8, 8) * 0 + 1).square().sum().backward()
    assert len(logs[0]) == len(logs[1]) > 0
    for ours, its in zip(*logs, strict=True):
        torch.testing.assert_close(ours, its, **TOLERANCE)


@pytest.mark.parametrize("kind", [Projection, fusedres.nn.PreActBasicBlock])
def test_hooked_blocks_are_reported(kind):
    model = native(kind) if kind is not Projection else hand(kind)
    before = counts(fusedres.fuse(model))["add_bn_act"]
    path = "layers.0.1" if kind is Projection else "layer1.1"
    handle = model.get_submodule(path).register_full_backward_hook(lambda *_: None)
    with counted_adds() as seen:
        model.float()(torch.randn(2, 3, 8, 8))
    # It makes no sum for its hook; what takes a value from it does not either.
    assert counts(model)["add_bn_act"] == seen["relu"] < before
    handle.remove()
    assert counts(fusedres.fuse(model))["add_bn_act"] == before
    model.get_submodule(f"{path}.bn1").register_forward_hook(lambda *_: None)
    with counted_adds() as seen:
        model(torch.randn(2, 3, 8, 8))
    assert counts(model)["add_bn_act"] == seen["relu"] == before - 1


class Collecting(Listed):
    """Hands out the output of every block."""

    def forward(self, x):
        x, outs = self.stem(x), []
        for block in self.blocks:
            x = block(x)
            outs.append(x)
        return outs, F.relu(self.norm(x))


def test_collected_outputs_have_the_whole_gradient():
    model, x = randomise(Collecting()), images()
    reference, grads = copy.deepcopy(model), []
    fusedres.fuse(model)
    assert counts(model) == {"bn_act": 7}
    for candidate in (model, reference):
        outs, last = candidate(x)
        for out in outs:
            out.retain_grad()
        (last.square().sum() + sum((out**3).sum() for out in outs)).backward()
        grads.append([value for out in outs for value in (out.detach(), out.grad)])
    for ours, its in zip(*grads, strict=True):
        torch.testing.assert_close(ours, its, **TOLERANCE)


def replaced(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent).register_module(name, module.double())


class Later(zoo.KuangliuBlock):
    """A class that is derived from a block's own, or put in its place."""

    def forward(self, x):
        return super().forward(x) * 2


def patched(model: nn.Module) -> None:
    block = model.get_submodule("layers.0.1")
    block.forward = lambda x, forward=block.forward: forward(x) * 2


def derived(model: nn.Module) -> None:
    block = model.get_submodule("layers.0.1")
    kind = type(block)
    block.__class__ = type("Derived", (kind,), {"forward": lambda self, x: kind.forward(self, x) * 2})


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a block": lambda model: replaced(model, "layers.0.1", Later(8, 8)),
    "a block of its kind": lambda model: replaced(model, "layers.0.1", zoo.KuangliuBlock(8, 8)),
    "another module": lambda model: replaced(model, "layers.0.1", nn.AvgPool2d(1)),
    "a stage": lambda model: replaced(model, "layers.0", nn.Sequential(conv(8, 8))),
    "a norm": lambda model: replaced(model, "layers.0.1.bn1", nn.GroupNorm(2, 8)),
    "the last norm": lambda model: replaced(model, "bn", nn.GroupNorm(2, 16)),
    "the shortcut": lambda model: replaced(model, "layers.1.0.shortcut", Passing2(8, 16)),
    "appended": lambda model: model.get_submodule("layers.0").append(nn.Tanh()),
    "a forward": patched,
    "a class": derived,
    "frozen": lambda model: model.get_submodule("layers.0.1").eval(),
}


class Passing2(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = conv(inputs, outputs, 1, 2)

    def forward(self, x):
        return self.conv(x) * 2


# In Projection the norm of the shortcut reads the sum too, which these take away or bring back.
@pytest.mark.parametrize(("change", "kind"), [
    *((change, zoo.KuangliuBlock) for change in CHANGES),
    *((change, Projection) for change in ("a block of its kind", "another module", "a norm", "the shortcut")),
])  # fmt: skip
def test_a_change_after_fuse_is_honoured(change, kind):
    model = randomise(hand(kind))
    reference, x = copy.deepcopy(model), images()
    fusedres.fuse(model)
    for candidate in (model, reference):
        torch.manual_seed(3)
        CHANGES[change](candidate)
    for training in (True, True, False) if change != "frozen" else (True,):
        for candidate in (model, reference):
            candidate.zero_grad()
            if change != "frozen":
                candidate.train(training)
            candidate(x).square().sum().backward()
        for ours, its in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, its.grad, **TOLERANCE)
        for ours, its in zip(model.buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(ours, its, **TOLERANCE)


def test_the_input_of_a_block_stays_as_it_is():
    model = fusedres.fuse(randomise(hand(zoo.KuangliuBlock)))
    x = images(2, 8, 6, 6)
    before = x.clone()
    model.get_submodule("layers")(x)
    model.get_submodule("layers.0.1")(x)
    assert torch.equal(x, before)


class Changing(Listed):
    """Changes a block's input between that block and the next."""

    def forward(self, x):
        x = self.stem(x)
        y = self.blocks[0](x)
        x.mul_(2)
        return F.relu(self.norm(self.blocks[1](y))) + x


def test_a_summand_that_changes_before_the_next_block():
    model = randomise(Changing())
    reference, x = copy.deepcopy(model), images()
    fusedres.fuse(model)
    assert counts(model) == {"add_bn_act": 1, "bn_act": 6}
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x), **TOLERANCE)
