"""Nothing in explain is untrue of what runs: its rows are compared with the calls that a forward makes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

import fusedres
from tests import zoo, zoo_public
from tests.fusion.ran import assert_true, said
from tests.zoo import images, randomise

NAMES = ["densenet", "resnet", "timm resnet", "timm resnetv2", "timm densenet", "timm cspresnet"]


pytestmark = pytest.mark.usefixtures("reference_backend")


def dla() -> nn.Module:
    """timm's, whose blocks are called with their identity."""
    return zoo.timm_models().create_model("dla34", num_classes=5, levels=(1, 1, 1, 1, 1, 1), channels=(8,) * 6)


def images_net() -> dict[str, Callable[[], nn.Module]]:
    return {name: zoo_public.SMALL[name].build for name in NAMES} | {
        "timm dla": dla,
        "preact": lambda: fusedres.models.preact_resnet_cifar(8, width=8),
        "hand preact": lambda: zoo.HandPreActResNet(zoo.KuangliuBlock, [1, 2]),
        "shared norm": lambda: zoo.HandResNet(zoo.HandBlock, [1, 1]),
    }


NETS = images_net()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "timm dla" else ()) for name in NETS]
)
def test_rows_are_what_runs(name):
    model = randomise(NETS[name]())
    before = said(model)
    fusedres.fuse(model)
    assert said(model) == before
    never = frozenset(n for n in dict(model.named_modules()) if n.endswith("batch_norm1") and name == "shared norm")
    assert_true(model, images(2, 3, 32, 32), uncalled=never - {"batch_norm1"})


@pytest.mark.parametrize("name", ["resnet", "timm resnetv2"])
def test_rows_are_what_runs_with_a_filter(name):
    model = fusedres.fuse(randomise(NETS[name]()), lambda module, path: not path.endswith(("bn2", "norm2")))
    assert len({path for _, _, path in said(model)}) == 2
    assert_true(model, images(2, 3, 32, 32))


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "hooked activation": lambda model: model.get_submodule("norm.act").register_forward_hook(lambda *_: None),
    "other activation": lambda model: model.get_submodule("norm").register_module("act", nn.Tanh()),
    "a dropout": lambda model: model.get_submodule("stages.0.blocks.1.norm2").register_module("drop", nn.Dropout(0.1)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_rows_of_timms_norms_are_what_runs_after_a_change(name):
    model = fusedres.fuse(randomise(zoo.timm_resnetv2("resnetv2_18", (2,))))
    before = said(model)
    CHANGES[name](model)
    assert said(model) != before
    assert_true(model, images(2, 3, 16, 16))
