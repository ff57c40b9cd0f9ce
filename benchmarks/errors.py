"""The one rule of what right means: error against float64, compared with eager's own."""

from __future__ import annotations

import sys
from typing import NoReturn

import torch
from torch import Tensor


class BenchmarkError(Exception):
    """A request that cannot be carried out; its message is one line for the user."""


def fail(message: str) -> NoReturn:
    """Print one line and exit with status 2."""
    print(f"benchmarks: {message}", file=sys.stderr)
    raise SystemExit(2)


def errors(actual: Tensor, reference: Tensor) -> tuple[float, float]:
    """Relative error in the 2-norm and in the maximum norm; infinite where ``actual`` is not finite."""
    actual, reference = actual.detach().double(), reference.detach().double()
    difference = actual - reference
    if not bool(torch.isfinite(difference).all()):
        return float("inf"), float("inf")
    l2 = difference.norm() / reference.norm().clamp_min(1e-300)
    peak = difference.abs().max() / reference.abs().max().clamp_min(1e-300)
    return float(l2), float(peak)


def allowed(eager_error: float, dtype: torch.dtype) -> float:
    """Twice eager's error in the same dtype, plus 4 eps."""
    return 2 * eager_error + 4 * torch.finfo(dtype).eps


def undecided(z: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a ReLU's input, in float64, is so near to zero that rounding to ``dtype`` decides on its sign.

    Within 8 eps of its root mean square: the size of what a row of a product or a normalised row is summed up from.
    """
    return z.abs() <= 8 * torch.finfo(dtype).eps * z.square().mean().sqrt()
