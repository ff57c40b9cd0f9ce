"""Multilayer perceptrons with LayerNorm, in both of the orders that are in use, one of them residual."""

from __future__ import annotations

import itertools
from collections import OrderedDict

from torch import Tensor, nn

SKIPS = ("identity", "linear")


class ResidualMLPBlock(nn.Module):
    """``relu(norm(linear(x))) + skip(x)``; ``skip`` is a projection, or ``None`` for the identity."""

    def __init__(self, features: int, skip: nn.Module | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features)
        self.norm = nn.LayerNorm(features)
        self.relu = nn.ReLU(inplace=True)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        """``(*, features)`` to the same."""
        return self.relu(self.norm(self.linear(x))) + (x if self.skip is None else self.skip(x))


def residual_mlp(
    *,
    image_size: int = 128,
    in_channels: int = 3,
    width: int = 512,
    depth: int = 4,
    num_classes: int = 102,
    skip: str = "identity",
) -> nn.Sequential:
    """Images ``(N, in_channels, image_size, image_size)`` to logits ``(N, num_classes)``, without a convolution.

    A Linear without bias from the pixels to ``width``, ``depth`` times :class:`ResidualMLPBlock`, and a Linear without
    bias to the classes. 26,272,768 parameters by default, 27,321,344 with ``skip="linear"``.

    Args:
        image_size, in_channels: of the images.
        width: features between the first and the last layer.
        depth: blocks.
        num_classes: outputs.
        skip: ``"identity"``, or ``"linear"`` for a Linear without bias beside each block.

    Raises:
        ValueError: an unknown ``skip``.
    """
    if skip not in SKIPS:
        raise ValueError(f"skip must be one of {SKIPS}, got {skip!r}")
    blocks = [
        ResidualMLPBlock(width, nn.Linear(width, width, bias=False) if skip == "linear" else None) for _ in range(depth)
    ]
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            stem=nn.Linear(in_channels * image_size**2, width, bias=False),
            blocks=nn.Sequential(*blocks),
            head=nn.Linear(width, num_classes, bias=False),
        )
    )


def plain_mlp(
    *, in_features: int = 512, width: int = 512, out_features: int = 512, depth: int = 4, bias: bool = True
) -> nn.Sequential:
    """``depth`` times LayerNorm without bias, Linear and ReLU: ``(*, in_features)`` to ``(*, out_features)``.

    Args:
        in_features, out_features: of the first and the last Linear.
        width: features in between.
        depth: how many; one maps ``in_features`` to ``out_features``.
        bias: whether the Linears have one.

    Raises:
        ValueError: ``depth`` below 1.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    sizes = [in_features, *[width] * (depth - 1), out_features]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.LayerNorm(inputs, bias=False), nn.Linear(inputs, outputs, bias), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
