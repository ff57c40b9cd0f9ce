"""Blocks made of a forward alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.zoo import conv, randomise


class Parts(nn.Module):
    """Children for a forward; those that it does not name are left out, so that they have no row in explain."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv2 = conv(4, 4), conv(4, 4)
        self.bn, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)
        self.pool, self.average = nn.MaxPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1)
        self.alias, self.drop, self.user = nn.Identity(), nn.Dropout(0.0), Passing()
        self.skip = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4))
        named = type(self).forward.__code__.co_names
        for name in self._modules.keys() - {*named, *(("conv", "bn") if "b" in named else ())}:
            delattr(self, name)

    def b(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Passing(nn.Module):
    """User code that is handed a value, and that cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.numel() else x


class _Clones(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.clone.default
        return func(*args, **(kwargs or {}))


def clones(block: nn.Module, x: Tensor) -> int:
    """How many copies of a tensor a forward makes."""
    with torch.no_grad(), _Clones() as mode:
        block(x)
    return mode.count


def block_of(forward: Callable[..., object], parts: type[nn.Module] = Parts) -> Any:
    """A block of ``parts``, in float64."""
    return randomise(type("Block", (parts,), {"forward": forward})())
