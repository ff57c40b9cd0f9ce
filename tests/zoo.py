"""Models as people write them, at sizes that run on a CPU."""

from __future__ import annotations

import collections
import functools
import importlib.util
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres
from fusedres import models
from tests.zoo_mlp import FunctionalMLPBlock as FunctionalMLPBlock
from tests.zoo_mlp import HandMLP as HandMLP
from tests.zoo_mlp import MLPBlock as MLPBlock
from tests.zoo_mlp import mlp as mlp

TOLERANCE: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-8}
SMALL_INPUT = (2, 3, 8, 8)
_declared: list[torch.library.Library] = []


@functools.cache
def torchvision_models() -> ModuleType:
    """torchvision.models, whose Python part needs no more than the names of its C++ operators."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        return importlib.import_module("torchvision.models")


@functools.cache
def timm_models() -> ModuleType:
    """timm; its model files import torchvision."""
    torchvision_models()
    return pytest.importorskip("timm")


def timm_resnetv2(name: str = "resnetv2_50", layers: tuple[int, ...] = (1, 2), width: int = 16) -> nn.Module:
    """timm's pre-activation ResNets with BatchNorm, small: resnetv2_18 and 34 (basic), 50, 101 and 152, each also "d".

    Its norms are timm's BatchNormAct2d, which apply ReLU themselves; the "d" variants pool in the shortcut.
    """
    channels = tuple(width * 2**i for i in range(len(layers)))  # timm rounds to multiples of 8
    return timm_models().create_model(name, layers=layers, channels=channels, stem_chs=8, num_classes=5)


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class HandBottleneck(nn.Module):
    """One shared ReLU, a cloned identity, ``i_downsample``."""

    expansion = 4

    def __init__(self, inputs: int, width: int, i_downsample: nn.Module | None = None, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1)
        self.batch_norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1)
        self.batch_norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * 4, 1)
        self.batch_norm3 = nn.BatchNorm2d(width * 4)
        self.i_downsample = i_downsample
        self.stride = stride
        self.relu = nn.ReLU()

    def forward(self, x):
        identity = x.clone()
        x = self.relu(self.batch_norm1(self.conv1(x)))
        x = self.relu(self.batch_norm2(self.conv2(x)))
        x = self.conv3(x)
        x = self.batch_norm3(x)
        if self.i_downsample is not None:
            identity = self.i_downsample(identity)
        x += identity
        return self.relu(x)


class HandBlock(nn.Module):
    """Both convolutions go through the same ``batch_norm2``; shapes are printed."""

    expansion = 1
    loud = True

    def __init__(self, inputs: int, width: int, i_downsample: nn.Module | None = None, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.batch_norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.batch_norm2 = nn.BatchNorm2d(width)
        self.i_downsample = i_downsample
        self.stride = stride
        self.relu = nn.ReLU()

    def forward(self, x):
        identity = x.clone()
        x = self.relu(self.batch_norm2(self.conv1(x)))
        x = self.batch_norm2(self.conv2(x))
        if self.i_downsample is not None:
            identity = self.i_downsample(identity)
        if self.loud:
            print(x.shape)
            print(identity.shape)
        x += identity
        return self.relu(x)


class ResBlock(nn.Module):
    """A basic block with functional ReLU and an out-of-place addition, identity first."""

    expansion = 1

    def __init__(self, inputs: int, width: int, i_downsample: nn.Module | None = None, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv(inputs, width, 3, stride)
        self.batch_norm1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width)
        self.batch_norm2 = nn.BatchNorm2d(width)
        self.i_downsample = i_downsample

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.batch_norm1(self.conv1(x)), inplace=True)
        out = self.batch_norm2(self.conv2(out))
        identity = x if self.i_downsample is None else self.i_downsample(x)
        return F.relu(identity + out)


class HandResNet(nn.Module):
    """Stages built in a loop, a stem with its own names."""

    def __init__(self, block: type[nn.Module], layers: list[int], classes: int = 10, width: int = 8) -> None:
        super().__init__()
        self.in_channels = width
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.batch_norm1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.max_pool = nn.MaxPool2d(3, 2, 1)
        self.stages = nn.ModuleList()
        for i, blocks in enumerate(layers):
            self.stages.append(self._make_layer(block, blocks, width * 2**i, stride=1 + (i > 0)))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.in_channels, classes)

    def _make_layer(self, block, blocks: int, planes: int, stride: int = 1) -> nn.Sequential:
        down = None
        outputs = planes * block.expansion
        if stride != 1 or self.in_channels != outputs:
            down = nn.Sequential(nn.Conv2d(self.in_channels, outputs, 1, stride), nn.BatchNorm2d(outputs))
        layers = [block(self.in_channels, planes, i_downsample=down, stride=stride)]
        self.in_channels = outputs
        layers += [block(outputs, planes) for _ in range(blocks - 1)]
        return nn.Sequential(*layers)

    def forward(self, x):
        x = self.relu(self.batch_norm1(self.conv1(x)))
        x = self.max_pool(x)
        for stage in self.stages:
            x = stage(x)
        x = self.avgpool(x)
        x = x.reshape(x.shape[0], -1)
        return self.fc(x)


class ProjectionBlock(nn.Module):
    """A ``skip`` projection, ``out += identity``, prints, and a difference that is only printed."""

    def __init__(self, inputs: int = 64, outputs: int = 128, stride: int = 2) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = self.skip(x)
        print(f"input {x.shape}, identity {identity.shape!s:>32}")
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        print("before the addition:", out.shape, "{braces}")
        out += identity
        out = F.relu(out)
        difference = out - identity
        print("residual part: %s" % difference.abs().mean().item())  # noqa: UP031
        return out


class SequentialNet(nn.Module):
    """Sequential triples, a BatchNorm without ReLU, a ReLU without BatchNorm, dropout and squeeze-excite between."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.plain = nn.Sequential(conv(width, width), nn.ReLU(), conv(width, width), nn.BatchNorm2d(width))
        self.drop = nn.Sequential(nn.BatchNorm2d(width), nn.Dropout(0.5), nn.ReLU())
        self.excite = SqueezeExcite(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.excite(self.drop(self.plain(self.stem(x))))


class SqueezeExcite(nn.Module):
    """``relu(x + se(bn(conv(x))))``: nothing to fold between the BatchNorm and the addition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv(width, width)
        self.bn = nn.BatchNorm2d(width)
        self.se = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return torch.relu(x + y * self.se(y))


class KuangliuBlock(nn.Module):
    """Pre-activation; the shortcut exists only where the shape changes and starts from the pre-activated input."""

    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = conv(in_planes, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes)
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(conv(in_planes, planes, 1, stride))

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class KuangliuBottleneck(nn.Module):
    """Its basic neighbour with three convolutions."""

    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = conv(in_planes, planes, 1)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3, stride)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = conv(planes, planes * 4, 1)
        if stride != 1 or in_planes != planes * 4:
            self.shortcut = nn.Sequential(conv(in_planes, planes * 4, 1, stride))

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out = self.conv3(F.relu(self.bn3(out)))
        out += shortcut
        return out


class ZeroPadBlock(nn.Module):
    """Pre-activation; the identity itself is subsampled and zero-padded, and comes first in the addition."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, width, 3, stride)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width)
        self.act = nn.ReLU(inplace=True)
        self.stride = stride
        self.extra = width - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.act(self.norm1(x)))
        y = self.conv2(self.act(self.norm2(y)))
        if self.stride != 1 or self.extra:
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2)
            )
        return x + y


class HandPreActResNet(nn.Module):
    """Pre-activation blocks of any kind; the last BatchNorm and ReLU come after the stages."""

    def __init__(self, block: type[nn.Module], layers: list[int], classes: int = 10, width: int = 8) -> None:
        super().__init__()
        self.in_planes = width
        self.conv1 = conv(3, width)
        stages = [self._make_layer(block, width * 2**i, n, stride=1 + (i > 0)) for i, n in enumerate(layers)]
        self.layers = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(self.in_planes)
        self.linear = nn.Linear(self.in_planes, classes)

    def _make_layer(self, block, planes: int, blocks: int, stride: int) -> nn.Sequential:
        layers = []
        for s in [stride] + [1] * (blocks - 1):
            layers.append(block(self.in_planes, planes, s))
            self.in_planes = planes * block.expansion
        return nn.Sequential(*layers)

    def forward(self, x):
        out = self.layers(self.conv1(x))
        out = F.relu(self.bn(out))
        out = F.adaptive_avg_pool2d(out, 1).flatten(1)
        return self.linear(out)


def hand_resnet34(block: type[nn.Module] = ResBlock, **kwargs) -> HandResNet:
    return HandResNet(block, [3, 4, 6, 3], **kwargs)


def randomise(model: nn.Module) -> nn.Module:
    """float64, with normalisations that are not the identity."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            if module.bias is not None:
                nn.init.normal_(module.bias)
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p:
            module.p = 0.3
    return model.double()


class TwoStages(models.ResNet):
    """Without the last two stages, which repeat the second: most of a test's time is per block."""

    def __init__(self, block: Any, layers: tuple[int, int], **options: Any) -> None:
        super().__init__(block, [*layers, 1, 1], **options)
        del self.layer3, self.layer4
        self.fc = nn.Linear(self.fc.in_features // 4, self.fc.out_features)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layer2(self.layer1(x))), 1))


def resnet(block: Any = models.BasicBlock, layers: tuple[int, int] = (2, 1), **options: Any) -> nn.Module:
    return randomise(TwoStages(block, layers, **{"num_classes": 5, "width": 4, "small_input": True} | options))


def small() -> nn.Module:
    return resnet(models.Bottleneck)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape or SMALL_INPUT, dtype=torch.float64)


def counts(model: nn.Module) -> dict[str, int]:
    return dict(collections.Counter(row["pattern"] for row in fusedres.explain(model).rows))


def step(model: nn.Module, x: torch.Tensor, cotangent_seed: int = 1) -> dict[str, torch.Tensor]:
    """Output, gradients and buffers of one forward and backward; gradients are None in evaluation too."""
    torch.manual_seed(cotangent_seed)
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    out.backward(torch.randn_like(out))
    assert x.grad is not None
    values = {"output": out.detach(), "input": x.grad}
    values |= {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return values | {f"buffer {name}": b.clone() for name, b in model.named_buffers()}


def assert_same_steps(one: nn.Module, other: nn.Module, x: torch.Tensor) -> None:
    """In training twice (running statistics) and in evaluation."""
    for training in (True, True, False):
        ours, its = step(one.train(training), x), step(other.train(training), x)
        assert ours.keys() == its.keys()
        for name, value in its.items():
            torch.testing.assert_close(ours[name], value, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
