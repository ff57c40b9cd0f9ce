"""``torch.compile(model, backend="fusedres")``."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.backends import registry
from torch._dynamo.testing import CompileCounterWithBackend

import fusedres
from fusedres import models
from fusedres.fusion.backend import compile_fused
from tests import zoo
from tests.captured import Recorder
from tests.zoo import TOLERANCE, assert_same_steps, counts, images, randomise

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def resnet50() -> nn.Module:
    return models.ResNet(models.Bottleneck, [3, 4, 6, 3], 5, width=4, small_input=True)


def preact() -> nn.Module:
    return zoo.HandPreActResNet(zoo.KuangliuBlock, [2, 2], width=4)


def mlp() -> nn.Module:
    return models.residual_mlp(image_size=4, width=16, depth=2, num_classes=5)


# Each with what is found in it, in training and in evaluation.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "resnet": (
        lambda: models.ResNet(models.BasicBlock, [1, 2], 5, width=4, small_input=True),
        {"bn_act": 4, "bn_add_act": 3, "bn": 1},
    ),
    "hand": (
        lambda: zoo.HandResNet(zoo.HandBottleneck, [1, 1, 1, 1], width=4),
        {"bn_act": 9, "bn_add_act": 4, "bn": 4},
    ),
    "functional": (lambda: zoo.HandResNet(zoo.ResBlock, [1, 1, 1, 1], width=4), {}),
    "shared norm": (quiet_hand_block := lambda: nn.Sequential(quiet(zoo.HandBlock(3, 3)), zoo.ResBlock(3, 3)), {}),
}
