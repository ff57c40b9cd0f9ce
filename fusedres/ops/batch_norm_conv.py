"""``fusedres::batch_norm_act_conv2d`` and ``fusedres::add_batch_norm_act_conv2d``, and the backward that they share.

The convolution is PyTorch's own. What it reads is not kept for the backward, which makes it again from the input of
the normalisation, bit for bit, in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedres.kernels.layout import dense, dense_like, rows
from fusedres.norm import Norm
from fusedres.ops.batch_norm_family import Dtypes, Family, Saved, gradients, register_family, statistics, wanted
from fusedres.ops.registration import register

_CONVOLUTION = "int[2] stride, int[2] padding, int[2] dilation, int groups"
Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int]


def _forward(
    x: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, norm: Norm, act: str | None, *args: Any
) -> tuple[Tensor, Tensor]:
    from fusedres.kernels.batch_norm_forward import batch_norm_act_forward, batch_norm_act_inference_forward

    *geometry, save = args
    if norm.training:
        y, stats, _ = batch_norm_act_forward(x, None, norm, act, False)
    else:
        y, stats, _ = batch_norm_act_inference_forward(x, None, norm, act, save, False)
    return _convolve(y, conv_weight, conv_bias, *geometry), stats


def _fake(
    x: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, norm: Norm, act: str | None, *args: Any
) -> tuple[Tensor, Tensor]:
    *geometry, save = args
    return _convolve(torch.empty_like(x), conv_weight, conv_bias, *geometry), statistics(x, norm.training or save)


def _add_forward(
    x: Tensor, residual: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, norm: Norm, act: str | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from fusedres.kernels.add_batch_norm import add_batch_norm_act_forward, add_batch_norm_act_inference_forward

    *geometry, save = args
    if norm.training:
        s, y, stats = add_batch_norm_act_forward(x, residual, norm, act)
    else:
        s, y, stats = add_batch_norm_act_inference_forward(x, residual, norm, act, save)
    return s, _convolve(y, conv_weight, conv_bias, *geometry), stats


def _add_fake(x: Tensor, residual: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    s = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    return s, *_fake(s, *args)


def _saved(inputs: tuple[Any, ...], outputs: tuple[Tensor, ...], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """What is normalised, statistics, weight; nothing for the convolution's bias, which sums the incoming gradient."""
    *normalised, conv_weight, _ = inputs
    added = len(normalised) == 2
    needs_more = (*needs[: len(inputs) - 1], *needs[len(inputs) :])
    return (outputs[0] if added else normalised[0], outputs[-1], conv_weight) if any(needs_more) else ()


def _backward(ctx: Any, saved: Saved, grad: Tensor, grad_sum: Tensor | None, dtypes: Dtypes) -> Sequence[Tensor | None]:
    input_dtype, weight_dtype, bias_dtype, *parameter_dtypes = dtypes
    if not saved:
        return grad_sum, None, grad.sum((0, 2, 3)), None, None
    act, *geometry, _ = ctx.options
    needs_conv = [weight_dtype is not None, bias_dtype is not None]
    x, weight, bias, conv_weight, conv_bias = batch_norm_act_conv2d_backward(
        grad, grad_sum, *saved, act, ctx.frozen, *geometry, input_dtype, *parameter_dtypes,
        needs_conv,
    )  # fmt: skip
    return x, conv_weight, conv_bias, weight, bias


def _allocate(
    grad: Tensor, grad_sum: Tensor | None, input: Tensor, stats: Tensor, conv_weight: Tensor, act: str | None,
    frozen: bool, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    input_dtype: torch.dtype | None, weight_dtype: torch.dtype | None, bias_dtype: torch.dtype | None,
    needs_conv: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    x = dense(input)
    d_input, _, d_weight, d_bias = gradients(x, input_dtype, None, weight_dtype, bias_dtype)
    geometry = stride, padding, dilation, groups
    _, *d_conv = _convolution_gradients(grad, x, None, conv_weight, geometry, [False, *needs_conv])
    return d_input, d_weight, d_bias, *d_conv


def _launch_backward(
    grad: Tensor, grad_sum: Tensor | None, input: Tensor, stats: Tensor, conv_weight: Tensor, act: str | None,
    frozen: bool, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    input_dtype: torch.dtype | None, weight_dtype: torch.dtype | None, bias_dtype: torch.dtype | None,
    needs_conv: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    from fusedres.kernels.batch_norm_backward import batch_norm_act_backward
    from fusedres.kernels.batch_norm_forward import batch_norm_fwd_apply

    x, y = dense(input), None
    if needs_conv[0]:
        y, _ = batch_norm_fwd_apply(x, None, rows(x), stats, None, act, False)
    needs = [any(dtype is not None for dtype in (input_dtype, weight_dtype, bias_dtype)), *needs_conv]
    dy, *d_conv = _convolution_gradients(grad, x, y, conv_weight, (stride, padding, dilation, groups), needs)
    del y  # before the gradient of the input takes as much
    outputs = gradients(x, input_dtype, None, weight_dtype, bias_dtype)
    if needs[0]:
        ds = None if grad_sum is None else dense_like(grad_sum, x)
        batch_norm_act_backward(dense_like(dy.to(x.dtype), x), x, None, stats, act, frozen, wanted(outputs), ds)
    d_input, _, d_weight, d_bias = outputs
    return d_input, d_weight, d_bias, *d_conv


def _convolve(
    y: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    """In the dtype of ``weight``, which autocast may have made another than that of ``y``."""
    y = y.to(weight.dtype)
    return torch.ops.aten.convolution(y, weight, bias, stride, padding, dilation, False, [0, 0], groups)


def _convolution_gradients(
    grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, geometry: Geometry, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of y, of the weight and of the bias; empty if not needed. y looks like ``x``, and only the second reads it."""
    if y is None:
        y = x if x.dtype == weight.dtype else torch.empty_like(x, dtype=weight.dtype)
    stride, padding, dilation, groups = geometry
    found = torch.ops.aten.convolution_backward(
        grad, y.to(weight.dtype), weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, needs
    )
    first, second, third = (d if needed else grad.new_empty(0) for d, needed in zip(found, needs, strict=True))
    return first, second, third


_PARAMETERS = "Tensor conv_weight, Tensor? conv_bias"
batch_norm_act_conv2d = register_family(
    Family(
        "batch_norm_act_conv2d", f"Tensor input, {_PARAMETERS}", f"str? act, {_CONVOLUTION}",
        "Tensor out, Tensor stats", _forward, _fake, _saved, _backward,
    )
)  # fmt: skip
add_batch_norm_act_conv2d = register_family(
    Family(
        "add_batch_norm_act_conv2d", f"Tensor input, Tensor residual, {_PARAMETERS}", f"str? act, {_CONVOLUTION}",
        "Tensor sum, Tensor out, Tensor stats", _add_forward, _add_fake, _saved, _backward, activations=2, adds=True,
    )
)  # fmt: skip
batch_norm_act_conv2d_backward = register(
    "batch_norm_act_conv2d_backward(Tensor grad, Tensor? grad_sum, Tensor input, Tensor stats, Tensor conv_weight, "
    f"str? act, bool frozen, {_CONVOLUTION}, ScalarType? input_dtype, ScalarType? weight_dtype, "
    "ScalarType? bias_dtype, bool[2] needs_conv) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, "
    "Tensor grad_conv_weight, Tensor grad_conv_bias)",
    _launch_backward,
    _allocate,
)
