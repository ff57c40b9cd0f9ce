"""Fused networks in float32 through the interpreted kernels: the oracle rule, and the launches they make."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import fusedres
from fusedres import models
from tests import zoo
from tests.fusion.trained import check_network, recorded_layers
from tests.oracle import assert_as_good_as_eager

pytestmark = [pytest.mark.floor, pytest.mark.usefixtures("triton_backend")]


@dataclass(frozen=True)
class Network:
    """What it takes, and its layers by what they fuse; ``seed``: no value lies at the edge of a ReLU."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    layers: dict[str, int]
    seed: int = 0


# Every pattern; deeper networks repeat it, and their gradients are chance: a rounding more, and a ReLU is open.
BASIC = {"bn_act_maxpool": 1, "bn_act": 3, "bn_add_act": 1, "bn_add_bn_act": 1, "bn_add_act_avgpool": 1}
BOTTLENECK = {"bn_act_maxpool": 1, "bn_act": 8, "bn_add_act": 1, "bn_add_bn_act": 2, "bn_add_act_avgpool": 1}
IMAGES = (3, 3, 32, 32)
NETWORKS = {
    "basic": Network(lambda: zoo.resnet(layers=(1, 2), width=8, small_input=False), IMAGES, BASIC),
    "bottleneck": Network(
        lambda: zoo.resnet(models.Bottleneck, (2, 2), width=8, small_input=False), IMAGES, BOTTLENECK, seed=1
    ),
    "hand-written basic": Network(lambda: zoo.HandResNet(zoo.ResBlock, [1, 2]), IMAGES, BASIC),
    "hand-written bottleneck": Network(lambda: zoo.HandResNet(zoo.HandBottleneck, [2, 2]), IMAGES, BOTTLENECK),
    "projection block": Network(
        lambda: zoo.ProjectionBlock(8, 16), (4, 8, 14, 14), {"bn_act": 1, "bn_add_act": 1, "bn": 1}
    ),
}


def built(network: Network) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(network.seed)
    return zoo.randomise(network.build()).float(), torch.randn(network.shape)


# Each in the format that is quick on a GPU; in the other, those with a stem and those whose sum is an output.
@pytest.mark.parametrize(("name", "form"), [
    *((name, torch.channels_last) for name in NETWORKS),
    ("basic", torch.contiguous_format), ("projection block", torch.contiguous_format),
])  # fmt: skip
def test_oracle(name, form):
    network = NETWORKS[name]
    seen = check_network(*built(network), form)
    assert seen.pop("backward") == sum(network.layers.values())
    assert seen == network.layers


RESNET34 = {"bn_act_maxpool": 1, "bn_act": 16, "bn_add_act": 12, "bn_add_bn_act": 3, "bn_add_act_avgpool": 1}
RESNET50 = {"bn_act_maxpool": 1, "bn_act": 32, "bn_add_act": 11, "bn_add_bn_act": 4, "bn_add_act_avgpool": 1}
DEEP = {
    "resnet50": Network(lambda: models.resnet50(num_classes=5, width=8), (3, 3, 64, 64), RESNET50),
    "hand-written resnet34": Network(zoo.hand_resnet34, (3, 3, 64, 64), RESNET34),
}


@pytest.mark.parametrize(
    "name", ["bottleneck", "projection block", *(pytest.param(name, marks=pytest.mark.slow) for name in DEEP)]
)
def test_inference(name):
    network = (NETWORKS | DEEP)[name]
    model, x = built(network)
    model.eval()
    with torch.no_grad():
        exact = {"out": copy.deepcopy(model).double()(x.double())}
        eager = {"out": model(x)}
        with recorded_layers() as seen:
            actual = {"out": fusedres.fuse(model)(x)}
    assert +seen == network.layers
    assert_as_good_as_eager(actual, [eager], exact)
