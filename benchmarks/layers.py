"""The layers that are measured by themselves, as users write them."""

from __future__ import annotations

from torch import Tensor, nn

import fusedres
from fusedres.models import ResidualMLPBlock
from fusedres.nn import BatchNormAct2d


class BatchNorm(nn.Module):
    """``bn(x)``, as in a projection shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x)


class BatchNormRelu(BatchNorm):
    """``relu(bn(x))``, behind a convolution in the middle of a block."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(x))


class BatchNormAddRelu(BatchNormRelu):
    """``relu(bn(x) + residual)``, at the end of a block."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.relu(self.bn(x) + residual)


class AddBatchNormRelu(BatchNormRelu):
    """``(s, relu(bn(s)))`` of ``s = x + residual``, between two pre-activation blocks."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        s = x + residual
        return s, self.relu(self.bn(s))


class _FusedAddBatchNormRelu(nn.Module):
    def __init__(self, model: AddBatchNormRelu) -> None:
        super().__init__()
        self.bn = BatchNormAct2d(model.bn.num_features)
        self.bn.to(model.bn.weight).load_state_dict(model.bn.state_dict())

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return self.bn.add(x, residual)


def fused(model: nn.Module) -> nn.Module:
    """``fusedres.fuse(model)``; of a join, what the rewritten forward of the blocks' parent runs."""
    return _FusedAddBatchNormRelu(model) if isinstance(model, AddBatchNormRelu) else fusedres.fuse(model)


def norm_linear_relu(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, outputs), nn.ReLU())


def linear_norm_relu(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.ReLU())


def skip_linear_norm_relu(inputs: int, _: int) -> nn.Module:
    return ResidualMLPBlock(inputs)
