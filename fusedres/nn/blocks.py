"""Residual blocks with torchvision's constructor signatures and parameter names (He et al., 2015)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fusedres.nn.batch_norm import BatchNormAct2d, as_batch_norm_act


def _conv(in_planes: int, out_planes: int, size: int, stride: int = 1, groups: int = 1, dilation: int = 1):
    padding = dilation * (size // 2)
    return nn.Conv2d(in_planes, out_planes, size, stride, padding, dilation, groups, bias=False)


def _norm(layer: Callable[..., nn.Module] | None, planes: int, act: str | None) -> BatchNormAct2d:
    """A norm with ``act``; torchvision's ResNet passes ``nn.BatchNorm2d`` itself as the layer."""
    return as_batch_norm_act((layer or BatchNormAct2d)(planes), act)


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
        if groups != 1 or base_width != 64:
            raise ValueError(f"BasicBlock needs groups=1 and base_width=64, got {groups} and {base_width}")
        if dilation > 1:
            raise NotImplementedError(f"BasicBlock needs dilation=1, got {dilation}")
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
