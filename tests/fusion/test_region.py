"""Conversion on one flat graph, against eager PyTorch in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from fusedres import models
from fusedres.fusion.convert import fuse, unfuse
from fusedres.fusion.install import Region
from tests import zoo, zoo_public
from tests.zoo_public import SMALL, Entry

pytestmark = pytest.mark.usefixtures("reference_backend")


@pytest.fixture
def reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRES_BACKEND", "reference")


def network() -> nn.Module:
    return zoo.randomise(models.resnet18(num_classes=3, width=8))


def pair() -> tuple[Any, Any]:
    """Fused, and eager."""
    model = network()
    return fuse(copy.deepcopy(model)), model


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)


def region(model: nn.Module) -> Region:
    return vars(model)["_fusedres_region"]


def additions(model: nn.Module) -> int:
    regions = [region(module) for module in model.modules() if "_fusedres_region" in vars(module)]
    return sum("add" in call.pattern for r in regions for call in r.codes[0].calls)


@pytest.mark.parametrize("entry", SMALL.values(), ids=SMALL.keys())
def test_networks_of_others(entry: Entry):
    model = entry.build().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    x = torch.randn(2, 3, entry.size, entry.size, dtype=torch.float64)
    expected = zoo_public.step(model, x)
    actual = zoo_public.step(fuse(model), x)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name] - value).abs().max() if value.numel() else 0
        assert error <= 1e-8 * value.abs().max(), name


def test_additions_across_blocks():
    assert sum(additions(fuse(entry.build())) for entry in SMALL.values()) >= 36


def test_every_pair_of_densenet():
    model = fuse(SMALL["densenet"].build())
    patterns = [call.pattern for call in region(model).codes[0].calls]
    assert set(patterns) == {"bn_act_maxpool", "bn_act", "bn_act_avgpool"}
    assert len(patterns) == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_hooks_put_on_afterwards_see_eagers_values():
    seen: list[list[Tensor]] = []
    x = images()
    for model in pair():
        values: list[Tensor] = []
        seen.append(values)
        keep: Callable[[Tensor], None] = lambda value, values=values: values.append(value.detach().clone())  # noqa: E731
        model.layer1[0].register_forward_hook(lambda module, args, out, keep=keep: keep(out))
        model.layer2[0].register_full_backward_hook(lambda module, given, got, keep=keep: keep(got[0]))
        model.layer3[0].bn1.register_forward_hook(lambda module, args, out, keep=keep: keep(out))
        model(x).square().sum().backward()
    assert len(seen[0]) == len(seen[1]) == 3
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-8, atol=1e-10)


def test_copies_are_fused():
    model, eager = pair()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other, models.ResNet) and region(other).bounds
        zoo.assert_same_steps(copy.deepcopy(eager), other, images())


@pytest.mark.parametrize("change", ["mode", "module", "class"])
def test_a_change_after_fuse(change, monkeypatch):
    model, eager = pair()
    for one in (model, eager):
        if change == "mode":
            one.layer3.eval()
        elif change == "module":
            one.layer2[1] = nn.Identity()
    if change == "class":
        kind = type(eager.layer1[0])
        forward = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x) * 2)
    zoo_public_step = zoo.step(eager, x := images()), zoo.step(model, x)
    torch.testing.assert_close(*zoo_public_step, rtol=1e-8, atol=1e-8)


def test_unfuse_restores():
    model = network()
    kinds = [type(module) for module in model.modules()]
    assert type(fuse(fuse(model))) is not kinds[0]
    assert [type(module) for module in unfuse(model).modules()] == kinds
    assert "_fusedres_region" not in vars(model)


def test_prints_are_kept(capsys):
    eager = zoo.randomise(zoo.ProjectionBlock(8, 16))
    fused = fuse(copy.deepcopy(eager))
    assert capsys.readouterr().out == ""
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    fused(x)
    printed = capsys.readouterr().out
    eager(x)
    assert printed == capsys.readouterr().out != ""


class Asking(nn.Module):
    """Does what ``tail`` says with its arguments."""

    def __init__(self, tail: Callable[..., Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.tail = nn.Conv2d(3, 3, 3, 1, 1), nn.BatchNorm2d(3), tail

    def forward(self, x, other):
        return self.tail(torch.relu(self.bn(self.conv(x)) + x), x, other)


@pytest.mark.parametrize(
    ("tail", "other"),
    [
        (lambda y, x, flag: y * 2 if flag is True else y, True),
        (lambda y, x, name: y * 2 if name in {"a", "b"} else y, "a"),
        (lambda y, x, other: y if other is x else y + other, "x"),
        (lambda y, x, other: y * len(other) if type(other) is list else y, [1, 2]),
        (lambda y, x, other: y * {torch.float64: 2}.get(x.dtype, 1), None),
        (lambda y, x, other: y if other is None else y + other, None),
    ],
)
def test_what_a_forward_asks_of_its_arguments(tail, other):
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    eager = Asking(tail).double().eval()
    other = x if other == "x" else other
    torch.testing.assert_close(fuse(copy.deepcopy(eager))(x, other), eager(x, other))


@pytest.mark.parametrize("training", [True, False])
def test_one_compiled_graph(training):
    torch._dynamo.reset()
    model = fuse(network()).train(training)
    expected = copy.deepcopy(model)(x := images())
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x)
    assert counter.frame_count == 1
