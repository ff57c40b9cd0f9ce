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
