"""Residual blocks with torchvision's constructor signatures (He et al., 2015), and pre-activation ones (2016)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from fusedres.nn.batch_norm import BatchNormAct2d, as_batch_norm_act


def _conv(in_planes: int, out_planes: int, size: int, stride: int = 1, groups: int = 1, dilation: int = 1):
    padding = dilation * (size // 2)
    return nn.Conv2d(in_planes, out_planes, size, stride, padding, dilation, groups, bias=False)


def _norm(layer: Callable[..., nn.Module] | None, planes: int, act: str | None) -> BatchNormAct2d:
    """A norm with ``act``; torchvision's ResNet passes ``nn.BatchNorm2d`` itself as the layer."""
    return as_batch_norm_act((layer or BatchNormAct2d)(planes), act)


def _check_basic(block: nn.Module, groups: int, base_width: int, dilation: int) -> None:
    name = type(block).__name__
    if groups != 1 or base_width != 64:
        raise ValueError(f"{name} needs groups=1 and base_width=64, got {groups} and {base_width}")
    if dilation > 1:
        raise NotImplementedError(f"{name} needs dilation=1, got {dilation}")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip, ``relu(bn2(conv2(relu(bn1(conv1(x))))) + skip(x))``.

    Args:
        inplanes, planes: channels in and out.
        stride: of the first convolution.
        downsample: the skip's projection; ``None`` is the identity.
        groups, base_width, dilation: as torchvision; only 1, 64 and 1 are supported.
        norm_layer: ``planes -> nn.BatchNorm2d`` or ``BatchNormAct2d``; ``None`` is the latter.

    Raises:
        ValueError: ``groups`` or ``base_width`` of another value.
        NotImplementedError: ``dilation`` above 1.
        TypeError: ``norm_layer`` builds something else.
    """

    expansion: int = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        _check_basic(self, groups, base_width, dilation)
        self.conv1 = _conv(inplanes, planes, 3, stride)
        self.bn1 = _norm(norm_layer, planes, "relu")
        self.conv2 = _conv(planes, planes, 3)
        self.bn2 = _norm(norm_layer, planes, "relu")
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """``(N, inplanes, H, W)`` to ``(N, planes, H / stride, W / stride)``."""
        identity = x if self.downsample is None else self.downsample(x)
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), identity)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a skip; the stride is in the 3x3, as in torchvision.

    Args:
        inplanes, planes: channels in and in the middle; the output has ``4 * planes``.
        stride: of the 3x3 convolution.
        downsample: the skip's projection; ``None`` is the identity.
        groups, base_width, dilation: of the 3x3 convolution, as in torchvision (ResNeXt, wide ResNet).
        norm_layer: ``planes -> nn.BatchNorm2d`` or ``BatchNormAct2d``; ``None`` is the latter.

    Raises:
        TypeError: ``norm_layer`` builds something else.
    """

    expansion: int = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = _conv(inplanes, width, 1)
        self.bn1 = _norm(norm_layer, width, "relu")
        self.conv2 = _conv(width, width, 3, stride, groups, dilation)
        self.bn2 = _norm(norm_layer, width, "relu")
        self.conv3 = _conv(width, planes * self.expansion, 1)
        self.bn3 = _norm(norm_layer, planes * self.expansion, "relu")
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """``(N, inplanes, H, W)`` to ``(N, 4 * planes, H / stride, W / stride)``."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn1(self.conv1(x))
        out = self.bn2(self.conv2(out))
        return self.bn3(self.conv3(out), identity)


class _PreActBlock(nn.Module):
    """What the pre-activation blocks share: everything but the convolutions."""

    bn1: BatchNormAct2d
    downsample: nn.Module | None

    def operands(self, input: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The two tensors whose sum is the block's output, so that the next block can add them as it normalises.

        With ``residual`` the block's input is ``input + residual``: the sum, ``bn1`` and its ReLU are then one
        operation. A chain of blocks that ends in a BatchNorm adds nothing separately::

            input, residual = stem(x), None
            for block in blocks:
                input, residual = block.operands(input, residual)
            _, out = norm.add(input, residual)

        Hooks on the block see calls of the block, not of this method.

        Args:
            input: ``(N, inplanes, H, W)``.
            residual: ``None`` or of ``input``'s shape.

        Returns:
            The branch's output and the identity (or the shortcut), both of the output's shape. The identity is
            ``input`` itself where there is neither a ``residual`` nor a ``downsample``.
        """
        if residual is None:
            identity, out = input, self.bn1(input)
        else:
            identity, out = self.bn1.add(input, residual)
        if self.downsample is not None:
            identity = self.downsample(out)
        return self._branch(out), identity

    def forward(self, x: Tensor) -> Tensor:
        """``(N, inplanes, H, W)`` to ``(N, expansion * planes, H / stride, W / stride)``."""
        branch, identity = self.operands(x)
        return branch + identity

    def _branch(self, out: Tensor) -> Tensor:
        """From the pre-activated input, the output of ``bn1``, to the addition."""
        raise NotImplementedError


class PreActBasicBlock(_PreActBlock):
    """Two 3x3 convolutions, BatchNorm and ReLU before each, and a skip with nothing after its addition.

    Args:
        inplanes, planes: channels in and out.
        stride: of the first convolution.
        downsample: the skip where the shape changes, applied to the pre-activated input; ``None`` is the identity.
        groups, base_width, dilation: as torchvision; only 1, 64 and 1 are supported.
        norm_layer: ``planes -> nn.BatchNorm2d`` or ``BatchNormAct2d``; ``None`` is the latter.

    The names are those of :class:`fusedres.models.PreActBasicBlock`, so that checkpoints load both ways.

    Raises:
        ValueError: ``groups`` or ``base_width`` of another value.
        NotImplementedError: ``dilation`` above 1.
        TypeError: ``norm_layer`` builds something else.
    """

    expansion: ClassVar[int] = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        _check_basic(self, groups, base_width, dilation)
        self.bn1 = _norm(norm_layer, inplanes, "relu")
        self.conv1 = _conv(inplanes, planes, 3, stride)
        self.bn2 = _norm(norm_layer, planes, "relu")
        self.conv2 = _conv(planes, planes, 3)
        self.downsample = downsample
        self.stride = stride

    def _branch(self, out: Tensor) -> Tensor:
        return self.conv2(self.bn2(self.conv1(out)))


class PreActBottleneck(_PreActBlock):
    """1x1, 3x3 and 1x1 convolutions, BatchNorm and ReLU before each, and a skip with nothing after its addition.

    Args:
        inplanes, planes: channels in and in the middle; the output has ``4 * planes``.
        stride: of the 3x3 convolution.
        downsample: the skip where the shape changes, applied to the pre-activated input; ``None`` is the identity.
        groups, base_width, dilation: of the 3x3 convolution, as in torchvision.
        norm_layer: ``planes -> nn.BatchNorm2d`` or ``BatchNormAct2d``; ``None`` is the latter.

    The names are those of :class:`fusedres.models.PreActBottleneck`, so that checkpoints load both ways.

    Raises:
        TypeError: ``norm_layer`` builds something else.
    """

    expansion: ClassVar[int] = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        width = int(planes * (base_width / 64.0)) * groups
        self.bn1 = _norm(norm_layer, inplanes, "relu")
        self.conv1 = _conv(inplanes, width, 1)
        self.bn2 = _norm(norm_layer, width, "relu")
        self.conv2 = _conv(width, width, 3, stride, groups, dilation)
        self.bn3 = _norm(norm_layer, width, "relu")
        self.conv3 = _conv(width, planes * self.expansion, 1)
        self.downsample = downsample
        self.stride = stride

    def _branch(self, out: Tensor) -> Tensor:
        return self.conv3(self.bn3(self.conv2(self.bn2(self.conv1(out)))))
