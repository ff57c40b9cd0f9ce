"""What is fused in every network of the zoo: at least the patterns that were found before.

``python -m tests.fusion.test_snapshot`` prints what is found now, in the form of the expectation.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

import fusedres
from fusedres import models
from tests import zoo
from tests.zoo_public import FAMILIES

EXPECTED: dict[str, dict[str, int]] = json.loads((Path(__file__).parent / "snapshot.json").read_text())

OWN: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: models.resnet18(num_classes=3, width=8),
    "resnet34": lambda: models.resnet34(num_classes=3, width=8),
    "resnet50": lambda: models.resnet50(num_classes=3, width=8),
    "preact_resnet18": lambda: models.preact_resnet18(num_classes=3, width=8),
    "preact_resnet50": lambda: models.preact_resnet50(num_classes=3, width=8),
    "preact_resnet_cifar": lambda: models.preact_resnet_cifar(20),
    "residual_mlp": lambda: models.residual_mlp(image_size=4, width=32, depth=3, num_classes=5),
    "residual_mlp linear": lambda: models.residual_mlp(
        image_size=4, width=32, depth=2, num_classes=5, skip="linear"
    ),
    "plain_mlp": lambda: models.plain_mlp(in_features=20, width=32, out_features=5, depth=3),
    "hand resnet34": zoo.hand_resnet34,
    "hand resnet50": lambda: zoo.HandResNet(zoo.HandBottleneck, [3, 4, 6, 3]),
    "hand preact": lambda: zoo.HandPreActResNet(zoo.KuangliuBlock, [2, 2]),
    "hand preact bottleneck": lambda: zoo.HandPreActResNet(zoo.KuangliuBottleneck, [2, 2]),
    "hand projection": lambda: zoo.ProjectionBlock(8, 16),
    "hand sequential": zoo.SequentialNet,
    "hand mlp": zoo.HandMLP,
    "hand mlp functional": lambda: zoo.HandMLP(zoo.FunctionalMLPBlock),
    "mlp": zoo.mlp,
    "fusedres.nn bottlenecks": lambda: zoo.torchvision_models().ResNet(
        fusedres.nn.Bottleneck, [1, 1, 1, 1], num_classes=5, width_per_group=16
    ),
}  # fmt: skip
BUILDERS = OWN | {name: entry.build for name, entry in FAMILIES.items()}


def found(model: nn.Module) -> dict[str, int]:
    return dict(sorted(Counter(row["pattern"] for row in fusedres.explain(model).rows).items()))


@pytest.fixture(scope="module")
def everything() -> dict[str, dict[str, int]]:
    return {name: found(build()) for name, build in BUILDERS.items()}


def test_additions_of_the_public_families(everything):
    """BatchNorms that an addition is fused with; the engine that went block by block had 68."""
    found = [item for name in FAMILIES for item in everything[name].items() if "add" in item[0]]
    assert sum(count * (2 if "bn_add_bn" in pattern else 1) for pattern, count in found) >= 122


def test_every_pair_of_a_densenet(everything):
    norms = [module for module in FAMILIES["densenet"].build().modules() if isinstance(module, nn.BatchNorm2d)]
    assert sum(count for pattern, count in everything["densenet"].items() if "bn_act" in pattern) == len(norms)


def test_rows_of_a_resnet50(everything):
    assert everything["resnet50"] == {
        "bn_act": 32, "bn_act_maxpool": 1, "bn_add_act": 11, "bn_add_act_avgpool": 1, "bn_add_bn_act": 4,
    }  # fmt: skip


@pytest.mark.parametrize("name", BUILDERS)
def test_nothing_less_is_fused(name, everything):
    before, now = EXPECTED[name], everything[name]
    for more, less in zip(fused_layers(now), fused_layers(before), strict=True):
        assert more >= less
    for pattern in ("bn_act_maxpool", "add_bn_act", "bn_add_bn_act", "ln_linear_act", "linear_ln_act"):
        assert now.get(pattern, 0) >= before.get(pattern, 0), pattern


def fused_layers(patterns: dict[str, int]) -> tuple[int, int, int]:
    """BatchNorms that are more than that, additions and activations that are part of something."""
    counted = {name: count for name, count in patterns.items() if name not in ("bn", "ln")}
    return (
        sum(counted.values()),
        sum(count for name, count in counted.items() if "add" in name),
        sum(count for name, count in counted.items() if "_act" in name),
    )


if __name__ == "__main__":
    print(json.dumps({name: found(build()) for name, build in BUILDERS.items()}, indent=1))
