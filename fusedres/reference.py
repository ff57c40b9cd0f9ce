"""The specification of every fused function, written in eager PyTorch.

It is the path taken on devices and for dtypes that no kernel covers, and what the kernels are tested against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    act: str | None = None,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """``act(batch_norm(input) + residual)``; arguments as :func:`fusedres.functional.batch_norm_act`."""
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if momentum is None:
        # The cumulative average; like PyTorch's own module, this reads the counter on the host.
        momentum = 1.0 / float(num_batches_tracked) if training and num_batches_tracked is not None else 0.0
    out = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        out = out + residual
    return torch.relu_(out) if act == "relu" else out


def add_batch_norm_act(
    input: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    act: str | None = None,
    num_batches_tracked: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(s, act(batch_norm(s)))`` of ``s = input + residual``, as :func:`fusedres.functional.add_batch_norm_act`."""
    total = input + residual
    out = batch_norm_act(
        total, running_mean, running_var, weight, bias, training, momentum, eps,
        act=act, num_batches_tracked=num_batches_tracked,
    )  # fmt: skip
    return total, out


def layer_norm_linear_act(
    input: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: str | None = None,
) -> Tensor:
    """``act(linear(layer_norm(input)))``; arguments as :func:`fusedres.functional.layer_norm_linear_act`."""
    out = F.linear(F.layer_norm(input, weight.shape[1:], ln_weight, ln_bias, eps), weight, bias)
    return torch.relu_(out) if act == "relu" else out


def linear_layer_norm_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    *,
    eps: float = 1e-5,
    act: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``act(layer_norm(linear(input))) + residual``, as :func:`fusedres.functional.linear_layer_norm_act`."""
    out = F.layer_norm(F.linear(input, weight, bias), weight.shape[:1], ln_weight, ln_bias, eps)
    if act == "relu":
        out = torch.relu_(out)
    return out if residual is None else out + residual
