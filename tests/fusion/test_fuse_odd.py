"""Odd models: forwards that call themselves, names of ours, containers with a forward, classes that say how to copy."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fusedres
from tests import zoo
from tests.fusion.blocks import block_of
from tests.fusion.ran import ran
from tests.zoo import assert_same_steps, counts, images, randomise


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = zoo.conv(4, 4), nn.BatchNorm2d(4)
        self.depth = 0


class Recursive(Parts):
    def forward(self, x: Tensor, times: int = 2) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        return self(x, times - 1) if times else x


class Reentrant(Parts):
    def forward(self, x: Tensor) -> Tensor:
        self.depth += 1
        x = F.relu(self.bn(self.conv(x)))
        if self.depth < 3:
            x = self(x)
        self.depth -= 1
        return x


class NamedRoot(Parts):
    def forward(self, root: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(root)))


class NamedModule(Parts):
    def forward(self, m0: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(m0)))


class NamedTorch(Parts):
    def forward(self, torch: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(torch)))


KINDS = {Recursive: "bn", Reentrant: "bn", NamedRoot: "bn_act", NamedModule: "bn_act", NamedTorch: "bn_act"}


@pytest.mark.parametrize("kind", KINDS)
def test_calls_of_itself_and_names_of_ours(kind):
    model = randomise(kind())
    reference = copy.deepcopy(model)
    assert counts(fusedres.fuse(model)) == {KINDS[kind]: 1}
    assert_same_steps(model, reference, images(2, 4, 5, 5))


FORWARDS: dict[str, tuple[Callable[[Parts, Tensor], Tensor], str]] = {
    "bn_act": (lambda self, x: F.relu(self.bn(input=self.conv(x))), "bn_act"),
    "bn_add_act": (lambda self, x: F.relu(self.bn(input=self.conv(x)) + x), "bn_add_act"),
    "add_bn_act": (lambda self, x: F.relu(self.bn(input=self.conv(x) + x)), "add_bn_act"),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_a_batch_norm_called_by_keyword(name):
    forward, expected = FORWARDS[name]
    model = block_of(forward, Parts)
    reference = copy.deepcopy(model)
    assert counts(model) == {expected: 1}
    assert counts(fusedres.fuse(model)) == {expected: 1}
    assert_same_steps(model, reference, images(2, 4, 5, 5))


class Getter(nn.ModuleDict):
    """As torchvision's IntermediateLayerGetter and timm's FeatureListNet: a container with a forward."""

    def forward(self, x: Tensor) -> Tensor:
        for part in self.values():
            x = part(x)
        return x


class Chain(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for part in self:
            x = part(x)
        return x


def layers() -> list[nn.Module]:
    return [zoo.conv(4, 4), nn.BatchNorm2d(4), nn.ReLU()]


CONTAINERS: dict[str, Callable[[], nn.Module]] = {
    "ModuleDict": lambda: Getter({f"layer{i}": layer for i, layer in enumerate(layers())}),
    "ModuleList": lambda: Chain(layers()),
    "inside": lambda: nn.Sequential(Chain(layers())),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_with_a_forward(name):
    model = randomise(CONTAINERS[name]())
    reference = copy.deepcopy(model)
    assert counts(model) == {"bn_act": 1}
    assert counts(fusedres.fuse(model)) == {"bn_act": 1}
    assert_same_steps(model, reference, images(2, 4, 5, 5))
    assert [type(m) for m in fusedres.unfuse(model).modules()] == [type(m) for m in reference.modules()]


class Reducing(zoo.ResBlock):
    def __init__(self, inputs: int = 4, width: int = 4) -> None:
        super().__init__(inputs, width)

    def __reduce__(self):
        return type(self), (), vars(self)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_classes_that_reduce_themselves(duplicate):
    block = fusedres.fuse(randomise(Reducing()))
    twin = duplicate(block)
    assert type(twin) is type(block)
    assert torch.equal(twin.eval()(x := images(2, 4, 5, 5)), block.eval()(x))


LOAD = """
import sys
import torch
import fusedres
model, x, expected = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(model(x), expected)
assert sorted(row["pattern"] for row in fusedres.explain(model).rows) == ["bn_act", "bn_add_act"]
fusedres.unfuse(model)
assert {type(module).__module__ for module in model.modules()} <= {"tests.zoo", "torch.nn.modules.conv",
    "torch.nn.modules.batchnorm"}
torch.testing.assert_close(model(x), expected)
"""


def test_a_saved_model_loads_in_another_process(tmp_path):
    """Where no class has been made yet, and fusedres is imported by the load alone."""
    model, x = fusedres.fuse(randomise(zoo.ResBlock(4, 4))).eval(), images(2, 4, 5, 5)
    torch.save((model, x, model(x)), tmp_path / "model.pt")
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path / "model.pt")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


def test_a_parametrized_norm_is_ours_and_said_to_be():
    model = randomise(nn.Sequential(*layers()))
    reference = copy.deepcopy(model)
    fusedres.fuse(model)
    for candidate in (model, reference):
        parametrize.register_parametrization(candidate.get_submodule("1"), "weight", Positive())
    [row] = fusedres.explain(model).rows
    assert (row["pattern"], row["path"]) == ("bn", "reference")
    assert_same_steps(model, reference, images(2, 4, 5, 5))
    [row] = fusedres.explain(reference).rows
    assert (row["pattern"], row["path"]) == ("bn", "eager")


SCRIPTED: dict[str, Callable[[], nn.Module]] = {
    "a norm": lambda: fusedres.nn.BatchNormAct2d(4),
    "a fused block": lambda: fusedres.fuse(zoo.ResBlock(4, 4)),
    "a fused block inside": lambda: nn.Sequential(nn.Sequential(fusedres.fuse(zoo.ResBlock(4, 4)))),
    "a linear layer": lambda: fusedres.nn.LayerNormLinear(4, 4),
    "a fused MLP": lambda: fusedres.fuse(zoo.mlp()),
}


@pytest.mark.parametrize("name", SCRIPTED)
def test_scripting_is_refused_clearly(name):
    model = SCRIPTED[name]()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.script cannot compile .* which is fused"):
        torch.jit.script(model)
    assert [type(module) for module in model.modules()] == kinds


def test_scripting_after_unfuse():
    model = fusedres.fuse(zoo.ResBlock(4, 4)).eval()
    x = torch.randn(2, 4, 5, 5)
    expected = model(x)
    torch.testing.assert_close(torch.jit.script(fusedres.unfuse(model))(x), expected)


class Shortcut(Parts):
    """As timm's DLA has them: the identity is an argument."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None, children: list[Tensor] | None = None) -> Tensor:
        out = self.bn(self.conv(x))
        out += x if shortcut is None else shortcut
        return F.relu(out)


class Maybe(Parts):
    """An addition only where the argument is given, and then another attribute."""

    def forward(self, x: Tensor, other: Tensor | None = None, *, double: bool = False) -> Tensor:
        out = self.bn(self.conv(x))
        if other is not None:
            out = out + other * getattr(self, "scale", 1.0)
        out = F.relu(out)
        return out * 2 if double else out


class Caller(nn.Module):
    def __init__(self, block: nn.Module, **arguments: object) -> None:
        super().__init__()
        self.block, self.arguments = block, arguments

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, **{name: x * 2 if value == "x" else value for name, value in self.arguments.items()})


GIVEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "shortcut": (lambda: Caller(Shortcut(), shortcut="x"), "bn_add_act"),
    "shortcut=None": (lambda: Caller(Shortcut(), shortcut=None), "bn_add_act"),
    "children": (lambda: Caller(Shortcut(), shortcut="x", children=[]), "bn_add_act"),
    "none": (lambda: Caller(Maybe()), "bn_act"),
    "other": (lambda: Caller(Maybe(), other="x"), "bn_add_act"),
    "other=None": (lambda: Caller(Maybe(), other=None), "bn_act"),
    "double": (lambda: Caller(Maybe(), other="x", double=True), "bn_add_act"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_optional_arguments(name, monkeypatch):
    monkeypatch.setenv("FUSEDRES_BACKEND", "reference")
    build, expected = GIVEN[name]
    model = randomise(build())
    reference, x = copy.deepcopy(model), images(2, 4, 5, 5)
    fusedres.fuse(model)
    for candidate in (pickle.loads(pickle.dumps(model)), model):
        assert_same_steps(candidate, copy.deepcopy(reference), x)
        with ran(candidate) as calls:
            candidate(x)
        assert list(calls) == [("block.bn", expected, "reference")]
