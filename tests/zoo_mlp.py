"""The zoo's multilayer perceptrons, as people write them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(sizes: tuple[int, ...] = (12, 16, 16, 5)) -> nn.Sequential:
    """LayerNorm, Linear and ReLU in turn, the last Linear bare."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.LayerNorm(inputs), nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class MLPBlock(nn.Module):
    """Linear, LayerNorm and ReLU, then the skip: an identity or a Linear, on the left or on the right."""

    def __init__(self, inputs: int, outputs: int, skip_first: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, outputs)
        self.ln = nn.LayerNorm(outputs)
        self.relu = nn.ReLU()
        self.skip = nn.Identity() if inputs == outputs else nn.Linear(inputs, outputs, bias=False)
        self.skip_first = skip_first

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.ln(self.fc(x)))
        return self.skip(x) + out if self.skip_first else out + self.skip(x)


class FunctionalMLPBlock(nn.Module):
    """The same arithmetic on parameters of its own, through ``torch.nn.functional``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * inputs**-0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.ln_weight = nn.Parameter(torch.ones(outputs))
        self.ln_bias = nn.Parameter(torch.zeros(outputs))
        self.skip = nn.Parameter(torch.randn(outputs, inputs) * inputs**-0.5) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        out = F.layer_norm(out, (out.shape[-1],), self.ln_weight, self.ln_bias)
        return F.relu(out) + (x if self.skip is None else F.linear(x, self.skip))


class HandMLP(nn.Module):
    """Blocks in a ModuleList, called in a loop; the first and the last change the number of features."""

    def __init__(self, block: Callable[[int, int], nn.Module] = MLPBlock, inputs: int = 12, width: int = 16) -> None:
        super().__init__()
        sizes = [inputs, width, width, width // 2]
        self.blocks = nn.ModuleList([block(*pair) for pair in itertools.pairwise(sizes)])
        self.head = nn.Linear(width // 2, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)
