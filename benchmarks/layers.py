"""The layers that are measured by themselves, as users write them."""

from __future__ import annotations

from torch import Tensor, nn

import fusedres
from fusedres.functional import forked_batch_norm_act
from fusedres.models import ResidualMLPBlock
from fusedres.nn import BatchNormAct2d, batch_norm_state


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


class BatchNormAddReluTwice(BatchNormAddRelu):
    """The same for two readers, each with a gradient of its own: the next block and its skip."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y = super().forward(x, residual)
        return y, y


class BatchNormAddBatchNormRelu(BatchNormRelu):
    """``relu(bn(x) + projected_bn(projected))``, at the end of a block with a projection shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.projected_bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, projected: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.relu(self.bn(x) + self.projected_bn(projected))


class BatchNormReluMaxPool(BatchNormRelu):
    """``max_pool(relu(bn(x)))``, the stem."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(super().forward(x))


class BatchNormAddReluAvgPool(BatchNormAddRelu):
    """``avg_pool(relu(bn(x) + residual))``, the head."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.pool(super().forward(x, residual))


class AddBatchNormRelu(BatchNormRelu):
    """``(s, relu(bn(s)))`` of ``s = x + residual``, between two pre-activation blocks."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        s = x + residual
        return s, self.relu(self.bn(s))


class _FusedJoin(nn.Module):
    """What the rewritten forward of the blocks' parent runs."""

    def __init__(self, model: BatchNorm) -> None:
        super().__init__()
        self.bn = BatchNormAct2d(model.bn.num_features, act="relu")
        self.bn.to(model.bn.weight).load_state_dict(model.bn.state_dict())


class _FusedAddBatchNormRelu(_FusedJoin):
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return self.bn.add(x, residual)


class _FusedBatchNormAddReluTwice(_FusedJoin):
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        state = batch_norm_state(self.bn, x)
        return forked_batch_norm_act(x, state, residual=residual, act="relu")


def fused(model: nn.Module) -> nn.Module:
    """``fusedres.fuse(model)``; of what lies between blocks, what the rewritten forward of their parent runs."""
    if isinstance(model, AddBatchNormRelu):
        return _FusedAddBatchNormRelu(model)
    if isinstance(model, BatchNormAddReluTwice):
        return _FusedBatchNormAddReluTwice(model)
    return fusedres.fuse(model)


def norm_linear_relu(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, outputs), nn.ReLU())


def linear_norm_relu(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.ReLU())


def skip_linear_norm_relu(inputs: int, _: int) -> nn.Module:
    return ResidualMLPBlock(inputs)
