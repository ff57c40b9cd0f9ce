"""A convolution with the BatchNorm and the activation of its input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import ops, reference
from fusedres.functional.batch_norm import add_batch_norm_act, batch_norm_act
from fusedres.functional.checks import Geometry, check_batch_norm, check_convolution, needs_grad
from fusedres.norm import Norm
from fusedres.ops import autocast_dtypes, autocasts, use_kernels


def batch_norm_act_conv2d(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    act: str | None = "relu",
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    r"""A convolution of the activated, normalised input, which is not kept for the backward.

    .. math:: y = \mathrm{conv2d}\bigl(\mathrm{act}(\mathrm{BN}(x))\bigr)

    The convolution is PyTorch's own and follows its switches. Its gradient needs what it read; the backward makes
    that again from ``input`` and the statistics, bit for bit (after Chen et al., 2016, but no statistics are taken
    twice). Kept are ``input``, ``(4, C)`` statistics and ``conv_weight``: an activation less than with
    :func:`batch_norm_act` and :func:`torch.nn.functional.conv2d`, for one launch in the backward that reads and
    writes an activation. Where ``conv_weight`` needs no gradient, nothing is made again.

    Args:
        input: ``(N, C, H, W)``, any floating dtype, any layout; contiguous and channels-last need no copy.
        running_mean, running_var, weight, bias, training, momentum, eps, act, num_batches_tracked: as
            :func:`batch_norm_act`.
        conv_weight, conv_bias, stride, padding, dilation, groups: as :func:`torch.nn.functional.conv2d`; of
            ``input``'s dtype, or of any floating dtype under autocast. With ``padding="same"`` and an extent that
            pads one side more than the other (an even kernel) the activation is kept.

    Returns:
        ``(N, C_out, H_out, W_out)``, in the memory format and dtype that eager PyTorch's sequence gives.

    Raises:
        TypeError, ValueError: as :func:`batch_norm_act`, and ``input`` of other than 4 dimensions.
        RuntimeError: what :func:`torch.nn.functional.conv2d` refuses, in its words and before anything has been
            updated; or ``FUSEDRES_BACKEND=triton`` and no kernel covers the input.
    """
    norm = Norm(running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    geometry = _check(input, None, norm, act, conv_weight, conv_bias, stride, padding, dilation, groups)
    if geometry is None:  # PyTorch's own convolution pads a copy of its input
        out = batch_norm_act(input, *norm[:7], act=act, num_batches_tracked=num_batches_tracked)
        return F.conv2d(out, conv_weight, conv_bias, stride, padding, dilation, groups)  # pyright: ignore[reportArgumentType]
    if not use_kernels(input, *norm.tensors, conv_weight, conv_bias):
        return reference.batch_norm_act_conv2d(
            input, *norm[:7], act=act, conv_weight=conv_weight, conv_bias=conv_bias, stride=stride, padding=padding,
            dilation=dilation, groups=groups, num_batches_tracked=num_batches_tracked,
        )  # fmt: skip
    save_for_backward = needs_grad(input, weight, bias, conv_weight, conv_bias)
    parameters = _autocast(input, conv_weight, conv_bias)
    return ops.batch_norm_act_conv2d(input, *parameters, norm, act, *geometry, save_for_backward)[0]


def add_batch_norm_act_conv2d(
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
    act: str | None = "relu",
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    num_batches_tracked: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The join of pre-activation blocks and the convolution that opens the next: ``s = input + residual`` and
    ``conv2d(act(batch_norm(s)))``.

    As :func:`batch_norm_act_conv2d` of the sum, which is kept in any case: it is the identity path, handed on
    unchanged (He et al., 2016).

    Args:
        input, residual: ``(N, C, H, W)`` of one shape; the dtypes may differ, ``s`` is promoted as by ``+``.
        running_mean, running_var, weight, bias, training, momentum, eps, act, num_batches_tracked: as
            :func:`batch_norm_act`.
        conv_weight, conv_bias, stride, padding, dilation, groups: as :func:`batch_norm_act_conv2d`, of the dtype of
            ``s``.

    Returns:
        ``s``, of ``input``'s shape and memory format, and the output of the convolution.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`batch_norm_act_conv2d`, where ``input`` is the sum or a term of
            it.
    """
    norm = Norm(running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    geometry = _check(input, residual, norm, act, conv_weight, conv_bias, stride, padding, dilation, groups)
    if geometry is None:  # PyTorch's own convolution pads a copy of its input
        s, out = add_batch_norm_act(input, residual, *norm[:7], act=act, num_batches_tracked=num_batches_tracked)
        return s, F.conv2d(out, conv_weight, conv_bias, stride, padding, dilation, groups)  # pyright: ignore[reportArgumentType]
    if not use_kernels(input, residual, *norm.tensors, conv_weight, conv_bias):
        return reference.add_batch_norm_act_conv2d(
            input, residual, *norm[:7], act=act, conv_weight=conv_weight, conv_bias=conv_bias, stride=stride,
            padding=padding, dilation=dilation, groups=groups, num_batches_tracked=num_batches_tracked,
        )  # fmt: skip
    save_for_backward = needs_grad(input, residual, weight, bias, conv_weight, conv_bias)
    parameters = _autocast(input, conv_weight, conv_bias)
    s, out, _ = ops.add_batch_norm_act_conv2d(
        input, residual, *parameters, norm, act, *geometry, save_for_backward
    )  # fmt: skip
    return s, out


def _check(input: Tensor, residual: Tensor | None, norm: Norm, act: str | None, *convolution: Any) -> Geometry | None:
    """The geometry of the convolution, as :func:`check_convolution`, after all other checks."""
    if input.dim() != 4:
        raise ValueError(f"expected 4D input (got {input.dim()}D input)")
    dtype = None if residual is None else torch.promote_types(input.dtype, residual.dtype)
    check_batch_norm(input, norm, residual, act, dtype=dtype)
    return check_convolution(input, *convolution, dtype=dtype)


def _autocast(input: Tensor, *parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """The parameters of a convolution as autocast casts them."""
    if not autocasts(input):
        return parameters
    dtype, _ = autocast_dtypes(input)
    return tuple(None if parameter is None else parameter.to(dtype) for parameter in parameters)
