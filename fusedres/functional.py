"""Fused functions: validation, the choice between kernels and the reference, and the public documentation."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import reference
from fusedres.ops import refusal as refusal  # for explain
from fusedres.ops import use_kernels

ACTIVATIONS = (None, "relu")


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
    r"""Batch normalisation, then an optional residual addition, then an optional activation.

    .. math:: y = \mathrm{act}\Bigl(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}}\,\gamma + \beta
              + \mathrm{residual}\Bigr)

    following Ioffe & Szegedy (2015) for the normalisation and He et al. (2015) for the residual block. The
    positional arguments are those of :func:`torch.nn.functional.batch_norm`.

    Args:
        input: ``(N, C, *)``, any floating dtype, any layout; contiguous and channels-last need no copy.
        running_mean, running_var: ``(C,)`` or both ``None``. Updated in place when ``training``; the variance
            with Bessel's correction.
        weight, bias: ``(C,)`` or ``None`` (then 1 and 0).
        training: normalise with the statistics of the batch (``True``) or with the running ones.
        momentum: weight of the new statistics in the running ones; ``None`` is the cumulative average, which
            needs ``num_batches_tracked``.
        eps: added to the variance.
        residual: of ``input``'s shape and device; its dtype may differ, the output is promoted as by ``+``.
        act: ``None`` or ``"relu"``.
        num_batches_tracked: one integer, incremented when ``training``.

    Returns:
        A tensor of ``input``'s shape and memory format.

    Raises:
        TypeError: a tensor that is not floating-point, or a weight of another dtype than ``input``'s or float32.
        ValueError: shapes or devices that do not fit together, an unknown ``act``, statistics that are missing,
            or one value a channel in training. Nothing has been updated then.
        RuntimeError: ``FUSEDRES_BACKEND=triton`` and no kernel covers the input.
    """
    _check_batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, residual, act, num_batches_tracked
    )
    if not use_kernels(input, residual, weight, bias, running_mean, running_var):
        return reference.batch_norm_act(
            input, running_mean, running_var, weight, bias, training, momentum, eps,
            residual=residual, act=act, num_batches_tracked=num_batches_tracked,
        )  # fmt: skip
    save_for_backward = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (input, residual, weight, bias)
    )
    if training:
        return torch.ops.fusedres.batch_norm_act(
            input, residual, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, act,
            save_for_backward,
        )[0]  # fmt: skip
    return torch.ops.fusedres.batch_norm_act_inference(
        input, residual, weight, bias, running_mean, running_var, eps, act, save_for_backward
    )[0]


def _check_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    residual: Tensor | None,
    act: str | None,
    num_batches_tracked: Tensor | None,
) -> None:
    """Raise TypeError or ValueError, naming the argument and the value, before anything is launched."""
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {ACTIVATIONS}, got {act!r}")
    if not (input.is_floating_point() or input.is_complex()):
        raise TypeError(f"input must be floating-point, got {input.dtype}")
    if input.dim() < 2:
        raise ValueError(f"input must have at least 2 dimensions (N, C, *), got shape {tuple(input.shape)}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be given or both be None")
    if running_mean is None and not training:
        raise ValueError("running_mean and running_var must be given when training is False")
    for name, tensor in (
        ("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias)
    ):  # fmt: skip
        if tensor is not None:
            _check_channel_vector(name, tensor, input)
    if residual is not None:
        _check_residual(residual, input)
    if not training:
        return
    if input.numel() == input.shape[1] != 0:
        raise ValueError(f"input must have more than 1 value per channel when training, got shape {tuple(input.shape)}")
    if num_batches_tracked is not None:
        if num_batches_tracked.numel() != 1 or num_batches_tracked.is_floating_point():
            raise ValueError(f"num_batches_tracked must be one integer, got {num_batches_tracked!r}")
        _check_device("num_batches_tracked", num_batches_tracked, input)
    elif momentum is None and running_mean is not None:
        raise ValueError("momentum=None (the cumulative average) needs num_batches_tracked")


def _check_channel_vector(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.dim() != 1 or tensor.shape[0] != input.shape[1]:
        raise ValueError(f"{name} must have shape ({input.shape[1]},), got {tuple(tensor.shape)}")
    if tensor.dtype != torch.float32 and tensor.dtype != input.dtype:
        raise TypeError(f"{name} must be float32 or of input's dtype {input.dtype}, got {tensor.dtype}")
    _check_device(name, tensor, input)


def _check_residual(residual: Tensor, input: Tensor) -> None:
    if residual.shape != input.shape:
        raise ValueError(f"residual must have shape {tuple(input.shape)}, got {tuple(residual.shape)}")
    if not (residual.is_floating_point() or residual.is_complex()):
        raise TypeError(f"residual must be floating-point, got {residual.dtype}")
    _check_device("residual", residual, input)


def _check_device(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        raise ValueError(f"{name} must be on {input.device}, got {tensor.device}")
