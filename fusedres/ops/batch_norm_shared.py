"""What the operators of the BatchNorm family have in common around their kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def finish_update(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
) -> None:
    """Tell autograd that a kernel wrote the buffers, by way of ``mean`` and ``var`` where they were not contiguous."""
    for buffer, updated in ((running_mean, mean), (running_var, var)):
        if buffer is not None and updated is not None and updated is not buffer:
            buffer.copy_(updated)
    mutated = [t for t in (running_mean, running_var, num_batches_tracked) if t is not None and not t.is_inference()]
    torch.autograd.graph.increment_version(mutated)


def gradients(
    x: Tensor,
    x_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised gradients of x, of a residual like x, weight and bias; those without a dtype are empty."""

    def activation(dtype: torch.dtype | None) -> Tensor:
        return x.new_empty(0) if dtype is None else torch.empty_like(x, dtype=dtype)

    def parameter(dtype: torch.dtype | None) -> Tensor:
        return x.new_empty(0 if dtype is None else x.shape[1], dtype=dtype)

    return activation(x_dtype), activation(residual_dtype), parameter(weight_dtype), parameter(bias_dtype)
