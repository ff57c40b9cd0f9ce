"""What the fused functions refuse, before anything is launched."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.ops import autocasts, is_known

ACTIVATIONS = (None, "relu")


class BatchNormState(NamedTuple):
    """What a BatchNorm normalises with: the arguments of :func:`batch_norm_act` after ``input``.

    Functions of several BatchNorms take one for each.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float | None = 0.1
    eps: float = 1e-5
    num_batches_tracked: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those with a value for each channel."""
        return self[:4]


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def check_batch_norm(
    input: Tensor,
    norm: BatchNormState,
    residual: Tensor | None,
    act: str | None,
    *,
    shared: bool = False,
    dtype: torch.dtype | None = None,
    name: str = "input",
    prefix: str = "",
) -> None:
    """Raise TypeError or ValueError, naming the argument and the value, before anything is launched.

    ``dtype``: of the sum where it is input + residual that is normalised. ``shared``: other ranks have values too.
    ``name``: of ``input``; ``prefix``: of what ``norm`` holds.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {ACTIVATIONS}, got {act!r}")
    if not input.is_floating_point():
        raise TypeError(f"{name} must be floating-point, got {input.dtype}")
    if input.dim() < 2:
        raise ValueError(f"{name} must have at least 2 dimensions (N, C, *), got shape {tuple(input.shape)}")
    running = f"{prefix}running_mean and {prefix}running_var"
    if (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError(f"{running} must both be given or both be None")
    if norm.running_mean is None and not norm.training:
        raise ValueError(f"{running} must be given when {prefix}training is False")
    for field, tensor in zip(norm._fields, norm.tensors, strict=False):
        if tensor is not None:
            _check_vector(prefix + field, tensor, input.shape[1], input, dtype)
    if residual is not None:
        check_residual(residual, input, input.shape)
        if dtype is not None and dtype.is_complex:
            raise TypeError(f"residual must be floating-point, got {residual.dtype}")
    if norm.training:
        _check_training(input, norm, shared, name, prefix)


def _check_training(input: Tensor, norm: BatchNormState, shared: bool, name: str, prefix: str) -> None:
    if not shared and input.shape[1] != 0:
        if is_known(input.numel() == input.shape[1]):
            shape = tuple(input.shape)
            raise ValueError(f"{name} must have more than 1 value per channel when training, got shape {shape}")
        if torch.compiler.is_compiling():
            torch._check(input.numel() != input.shape[1])  # where it is open: raises when the data is there
    count = norm.num_batches_tracked
    if count is not None:
        if count.numel() != 1 or count.is_floating_point():
            raise ValueError(f"{prefix}num_batches_tracked must be one integer, got {count!r}")
        _check_device(f"{prefix}num_batches_tracked", count, input)
    elif norm.momentum is None and norm.running_mean is not None:
        raise ValueError(f"{prefix}momentum=None (the cumulative average) needs {prefix}num_batches_tracked")


def check_linear(input: Tensor, weight: Tensor, bias: Tensor | None, act: str | None) -> None:
    """Raise TypeError or ValueError for what a linear map and its normalisation have in common."""
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {ACTIVATIONS}, got {act!r}")
    if not input.is_floating_point():
        raise TypeError(f"input must be floating-point, got {input.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight must have 2 dimensions (N, K), got shape {tuple(weight.shape)}")
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(f"input must have shape (*, {weight.shape[1]}), got {tuple(input.shape)}")
    if weight.dtype != input.dtype and not (autocasts(input) and weight.is_floating_point()):
        raise TypeError(f"weight must be of input's dtype {input.dtype}, got {weight.dtype}")
    _check_device("weight", weight, input)
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
        if bias.dtype != weight.dtype and not (autocasts(input) and bias.is_floating_point()):
            raise TypeError(f"bias must be of weight's dtype {weight.dtype}, got {bias.dtype}")
        _check_device("bias", bias, input)


def check_layer_norm(ln_weight: Tensor | None, ln_bias: Tensor | None, size: int, input: Tensor) -> None:
    for name, tensor in (("ln_weight", ln_weight), ("ln_bias", ln_bias)):
        if tensor is not None:
            odd = tensor.dtype not in (torch.float32, input.dtype)
            autocast = odd and tensor.is_floating_point() and autocasts(input)
            _check_vector(name, tensor, size, input, tensor.dtype if autocast else None)
    if ln_weight is not None and ln_bias is not None and ln_weight.dtype != ln_bias.dtype:
        raise TypeError(f"ln_bias must be of ln_weight's dtype {ln_weight.dtype}, got {ln_bias.dtype}")


def _check_vector(name: str, tensor: Tensor, size: int, input: Tensor, dtype: torch.dtype | None = None) -> None:
    """``dtype``: of what is normalised, where it is not ``input``'s."""
    if tensor.dim() != 1 or tensor.shape[0] != size:
        raise ValueError(f"{name} must have shape ({size},), got {tuple(tensor.shape)}")
    if tensor.dtype not in (torch.float32, dtype or input.dtype):
        whose = "input's dtype" if dtype is None else "the sum's dtype"
        raise TypeError(f"{name} must be float32 or of {whose} {dtype or input.dtype}, got {tensor.dtype}")
    _check_device(name, tensor, input)


def check_residual(residual: Tensor, input: Tensor, shape: torch.Size, name: str = "residual") -> None:
    if residual.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(residual.shape)}")
    if not (residual.is_floating_point() or residual.is_complex()):
        raise TypeError(f"{name} must be floating-point, got {residual.dtype}")
    _check_device(name, residual, input)


def _check_device(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        raise ValueError(f"{name} must be on {input.device}, got {tensor.device}")
