"""Blocks of Linear and LayerNorm from forwards, and how a fused one is compared with eager."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres import models
from tests import zoo
from tests.zoo import TOLERANCE, counts

LN_LINEAR, LINEAR_LN = "ln_linear_act", "linear_ln_act"


def randomised(model: nn.Module) -> nn.Module:
    """float64, with LayerNorms that are not the identity."""
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name or "ln" in name else 0.0, 0.5)
    return model.double()


def rows(*shape: int) -> Tensor:
    return torch.randn(shape or (3, 8), dtype=torch.float64)


def plain() -> nn.Module:
    return randomised(models.plain_mlp(in_features=8, width=8, out_features=8, depth=2))


def residual() -> nn.Module:
    return randomised(models.residual_mlp(in_channels=2, image_size=2, width=8, depth=2, num_classes=8))


def functional() -> nn.Module:
    return randomised(zoo.HandMLP(zoo.FunctionalMLPBlock, inputs=8))


BUILDS = {plain: {LN_LINEAR: 2}, residual: {LINEAR_LN: 2}, functional: {LINEAR_LN: 3}}


class Parts(nn.Module):
    """Children and parameters for the forwards below."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.fc2, self.wide = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 12)
        self.ln, self.ln2, self.ln3 = nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.LayerNorm(8)
        self.bare, self.outer = nn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm((3, 8))
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)
        self.alias, self.drop, self.gelu = nn.Identity(), nn.Dropout(0.0), nn.GELU()
        self.w, self.b = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8))
        self.ln_w, self.ln_b = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
        self.size, self.eps = (8,), 1e-3


def block_of(forward: Callable[..., object]) -> Parts:
    block = type("Block", (Parts,), {"forward": forward})()
    randomised(block)
    return block


def assert_same_runs(block: nn.Module, reference: nn.Module, x: Tensor) -> None:
    """Outputs, the input afterwards and, where eager has them, gradients."""
    for training in (True, False):
        torch.manual_seed(1)
        results = [_run(candidate, x, training) for candidate in (block, reference)]
        for ours, its in zip(*results, strict=False):  # eager's backward may refuse what fused allows
            torch.testing.assert_close(ours, its, **TOLERANCE)
        assert len(results[0]) >= len(results[1])


def _run(block: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    given = leaf * 1
    outputs = block.train(training)(given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = [value.detach().clone() for value in (*outputs, given)]
    generator = torch.Generator().manual_seed(1)
    block.zero_grad()
    loss = sum((out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum() for out in outputs)
    assert isinstance(loss, Tensor)
    try:
        loss.backward()
    except RuntimeError as error:
        assert "inplace" in str(error)
        return results
    assert leaf.grad is not None
    return [*results, leaf.grad, *(p.grad for p in block.parameters() if p.grad is not None)]


def assert_found(block: nn.Module, expected: dict[str, int], x: Tensor | None = None) -> None:
    reference = copy.deepcopy(block)
    assert counts(block) == expected, fusedres.explain(block)
    fusedres.fuse(block)
    assert counts(block) == expected, fusedres.explain(block)
    assert_same_runs(block, reference, rows() if x is None else x)


def assert_same_outcome(ours: Callable[[], Tensor], its: Callable[[], Tensor]) -> None:
    """The same value and dtype, or an error of the same type."""
    try:
        expected = its()
    except (RuntimeError, TypeError, ValueError) as error:
        with pytest.raises(type(error)):
            ours()
    else:
        result = ours()
        assert result.dtype == expected.dtype
        torch.testing.assert_close(result, expected)
