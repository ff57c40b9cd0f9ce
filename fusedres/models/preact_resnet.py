"""Pre-activation ResNet (He et al., 2016, "Identity mappings in deep residual networks"), also called v2.

BatchNorm and ReLU come before each convolution, and nothing comes after a block's addition: from the stem to the last
normalisation the identity path is a sum, which is what lets networks of a thousand layers train. The stem has no
BatchNorm of its own, the first block's follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHORTCUTS = ("projection", "pad")


class Block(Protocol):
    """A class of pre-activation blocks: one of those below, its namesake in :mod:`fusedres.nn`, or another."""

    @property
    def expansion(self) -> int: ...

    def __call__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> nn.Module: ...


class PreActBasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip; ``downsample`` is the skip of the pre-activated input."""

    expansion: ClassVar[int] = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)  # of what a BatchNorm has just written, never of the identity
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """``(N, inplanes, H, W)`` to ``(N, planes, H / stride, W / stride)``."""
        out = self.relu(self.bn1(x))
        identity = x if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(self.relu(self.bn2(out)))
        return out + identity


class PreActBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a skip; ``downsample`` is the skip of the pre-activated input.

    The stride is in the 3x3 convolution.
    """

    expansion: ClassVar[int] = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)  # of what a BatchNorm has just written, never of the identity
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """``(N, inplanes, H, W)`` to ``(N, 4 * planes, H / stride, W / stride)``."""
        out = self.relu(self.bn1(x))
        identity = x if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(self.relu(self.bn2(out)))
        out = self.conv3(self.relu(self.bn3(out)))
        return out + identity


class ZeroPadShortcut(nn.Module):
    """Every ``stride``-th pixel, then channels of zeros: option A of He et al. (2015), without parameters.

    Raises:
        ValueError: fewer channels out than in.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(f"zero padding cannot make {out_channels} channels out of {in_channels}")
        self.padding = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``, sizes rounded up."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.padding))

    def extra_repr(self) -> str:
        return f"padding={self.padding}, stride={self.stride}"


class PreActResNet(nn.Module):
    """Stem, stages of pre-activation blocks, BatchNorm and ReLU, global average pooling and a classifier.

    Where a block changes the shape, the first of a stage, its skip starts from the pre-activated input, as in the
    authors' code; every other skip is the block's input itself.

    Args:
        block: :class:`PreActBasicBlock` or :class:`PreActBottleneck`, or their namesakes in :mod:`fusedres.nn`.
        layers: blocks in each stage; stages after the first halve the image.
        num_classes: outputs of the classifier.
        shortcut: the skip where a block changes the shape, ``"projection"`` (a 1x1 convolution) or ``"pad"``
            (:class:`ZeroPadShortcut`).
        in_channels: channels of the images.
        width: channels of the stem; stage i has ``width * 2**i`` (times the block's expansion).
        small_input: a 3x3 stem without stride or pooling, for images of 8 to 32 pixels.

    Raises:
        ValueError: an unknown ``shortcut``.
    """

    def __init__(
        self,
        block: Block,
        layers: Sequence[int],
        num_classes: int = 1000,
        *,
        shortcut: str = "projection",
        in_channels: int = 3,
        width: int = 64,
        small_input: bool = False,
    ) -> None:
        super().__init__()
        if shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut must be one of {SHORTCUTS}, got {shortcut!r}")
        self.inplanes = width
        size, stride, padding = (3, 1, 1) if small_input else (7, 2, 3)
        self.conv1 = nn.Conv2d(in_channels, width, size, stride, padding, bias=False)
        self.maxpool = nn.Identity() if small_input else nn.MaxPool2d(3, 2, padding=1)
        self.stages = [f"layer{i + 1}" for i in range(len(layers))]
        for i, (name, blocks) in enumerate(zip(self.stages, layers, strict=True)):
            self.add_module(name, self._stage(block, width * 2**i, blocks, 2 if i else 1, shortcut))
        self.bn = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.inplanes, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al. (2015)
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(self, block: Block, planes: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
        outplanes = planes * block.expansion
        downsample = None
        if stride != 1 or self.inplanes != outplanes:
            if shortcut == "pad":
                downsample = ZeroPadShortcut(self.inplanes, outplanes, stride)
            else:
                downsample = nn.Conv2d(self.inplanes, outplanes, 1, stride, bias=False)
        stage = [block(self.inplanes, planes, stride, downsample)]
        self.inplanes = outplanes
        stage += [block(outplanes, planes) for _ in range(1, blocks)]
        return nn.Sequential(*stage)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``."""
        x = self.maxpool(self.conv1(x))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        x = self.relu(self.bn(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def preact_resnet_cifar(
    depth: int, *, block: Block | None = None, num_classes: int = 10, width: int = 16, **kwargs: Any
) -> PreActResNet:
    """The CIFAR family: a 3x3 stem and three stages of n blocks each, for images of about 32 pixels.

    Args:
        depth: 6n + 2 with basic blocks (20, 56, 110, ...), 9n + 2 with bottlenecks (164, 1001, ...).
        block: by default the one that the depth fits. Where it fits both, which is at 18n + 2, that is the basic
            block below 164 and the bottleneck from there on, as He et al. (2016) have 110 and 164.
        num_classes, width, others: as :class:`PreActResNet`.

    With 10 classes and projections: 1,730,522 parameters at depth 110, 1,703,258 at 164, 10,327,706 at 1001.

    Raises:
        ValueError: a depth that fits no number of blocks, or an unknown ``shortcut``.
    """
    if block is None:
        basic = (depth - 2) % 6 == 0 and (depth < 164 or (depth - 2) % 9 != 0)
        block = PreActBasicBlock if basic else PreActBottleneck
    convolutions = 2 if block.expansion == 1 else 3
    blocks, rest = divmod(depth - 2, 3 * convolutions)
    if rest or blocks < 1:
        raise ValueError(f"depth must be 6n + 2 with basic blocks or 9n + 2 with bottlenecks, n > 0, got {depth}")
    return PreActResNet(block, [blocks] * 3, num_classes, width=width, small_input=True, **kwargs)


def preact_resnet18(**kwargs: Any) -> PreActResNet:
    """11,687,720 parameters with 1000 classes; keyword arguments as :class:`PreActResNet`."""
    return PreActResNet(PreActBasicBlock, [2, 2, 2, 2], **kwargs)


def preact_resnet34(**kwargs: Any) -> PreActResNet:
    """21,795,880 parameters with 1000 classes; keyword arguments as :class:`PreActResNet`."""
    return PreActResNet(PreActBasicBlock, [3, 4, 6, 3], **kwargs)


def preact_resnet50(**kwargs: Any) -> PreActResNet:
    """25,549,352 parameters with 1000 classes; keyword arguments as :class:`PreActResNet`."""
    return PreActResNet(PreActBottleneck, [3, 4, 6, 3], **kwargs)


def preact_resnet101(**kwargs: Any) -> PreActResNet:
    """44,541,480 parameters with 1000 classes; keyword arguments as :class:`PreActResNet`."""
    return PreActResNet(PreActBottleneck, [3, 4, 23, 3], **kwargs)


def preact_resnet152(**kwargs: Any) -> PreActResNet:
    """60,185,128 parameters with 1000 classes; keyword arguments as :class:`PreActResNet`."""
    return PreActResNet(PreActBottleneck, [3, 8, 36, 3], **kwargs)


def preact_resnet200(**kwargs: Any) -> PreActResNet:
    """64,666,152 parameters with 1000 classes; keyword arguments as :class:`PreActResNet`."""
    return PreActResNet(PreActBottleneck, [3, 24, 36, 3], **kwargs)
