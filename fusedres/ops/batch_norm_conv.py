"""The operators ``fusedres::batch_norm_act_conv2d`` and ``fusedres::add_batch_norm_act_conv2d``, their inference forms
and the backward that they share.

The convolution is PyTorch's own. What it reads is not kept for the backward, which makes it again from the input of
the normalisation, bit for bit, in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedres.kernels.layout import contiguous, dense, dense_like, rows
from fusedres.ops.batch_norm_shared import finish_update, gradients
from fusedres.ops.registration import refuse_double_backward, register, reserve_counters

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _batch_norm_act_conv2d(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    act: str | None,
    *args: Any,
) -> tuple[Tensor, Tensor]:
    from fusedres.kernels.batch_norm_forward import batch_norm_act_forward

    x = dense(input)
    mean, var = contiguous(running_mean), contiguous(running_var)
    y, stats, _ = batch_norm_act_forward(
        x, None, contiguous(weight), contiguous(bias), mean, var, num_batches_tracked, momentum, eps, act, False
    )
    finish_update(running_mean, running_var, num_batches_tracked, mean, var)
    return _convolve(y, conv_weight, conv_bias, *args[:4]), stats


def _batch_norm_act_conv2d_inference(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    act: str | None,
    *args: Any,
) -> tuple[Tensor, Tensor]:
    from fusedres.kernels.batch_norm_forward import batch_norm_act_inference_forward

    y, stats, _ = batch_norm_act_inference_forward(
        dense(input), None, contiguous(weight), contiguous(bias), running_mean.contiguous(), running_var.contiguous(),
        eps, act, args[-1], False,
    )  # fmt: skip
    return _convolve(y, conv_weight, conv_bias, *args[:4]), stats


def _add_batch_norm_act_conv2d(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    act: str | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    from fusedres.kernels.add_batch_norm import add_batch_norm_act_forward

    x = dense(input)
    mean, var = contiguous(running_mean), contiguous(running_var)
    s, y, stats = add_batch_norm_act_forward(
        x, dense_like(residual, x), contiguous(weight), contiguous(bias), mean, var, num_batches_tracked, momentum,
        eps, act,
    )  # fmt: skip
    finish_update(running_mean, running_var, num_batches_tracked, mean, var)
    return s, _convolve(y, conv_weight, conv_bias, *args[:4]), stats


def _add_batch_norm_act_conv2d_inference(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    act: str | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    from fusedres.kernels.add_batch_norm import add_batch_norm_act_inference_forward

    x = dense(input)
    s, y, stats = add_batch_norm_act_inference_forward(
        x, dense_like(residual, x), contiguous(weight), contiguous(bias), running_mean.contiguous(),
        running_var.contiguous(), eps, act, args[-1],
    )  # fmt: skip
    return s, _convolve(y, conv_weight, conv_bias, *args[:4]), stats


def _batch_norm_act_conv2d_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    input: Tensor,
    stats: Tensor,
    conv_weight: Tensor,
    eps: float,
    act: str | None,
    frozen: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    input_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    needs_conv: list[bool],
) -> Gradients:
    from fusedres.kernels.batch_norm_backward import Gradients as Wanted
    from fusedres.kernels.batch_norm_backward import batch_norm_act_backward
    from fusedres.kernels.batch_norm_forward import batch_norm_fwd_apply

    x, y = dense(input), None
    if needs_conv[0]:
        y, _ = batch_norm_fwd_apply(x, None, rows(x), stats, None, None, None, eps, act, False)
    needs = [any(dtype is not None for dtype in (input_dtype, weight_dtype, bias_dtype)), *needs_conv]
    dy, d_conv_weight, d_conv_bias = _convolution_gradients(
        grad, x, y, conv_weight, stride, padding, dilation, groups, needs
    )
    del y  # before the gradient of the input takes as much
    outputs = gradients(x, input_dtype, None, weight_dtype, bias_dtype)
    if needs[0]:
        wanted = Wanted(*(out if out.numel() else None for out in outputs))
        ds = None if grad_sum is None else dense_like(grad_sum, x)
        batch_norm_act_backward(dense_like(dy.to(x.dtype), x), x, None, stats, act, frozen, wanted, ds)
    d_input, _, d_weight, d_bias = outputs
    return d_input, d_weight, d_bias, d_conv_weight, d_conv_bias


def _convolve(
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """In the dtype of ``weight``, which autocast may have made another than that of ``y``."""
    y = y.to(weight.dtype)
    return torch.ops.aten.convolution(y, weight, bias, stride, padding, dilation, False, [0, 0], groups)


def _convolution_gradients(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Of y, of the weight and of the bias; empty if not needed. y looks like ``x``, and only the second reads it."""
    if y is None:
        y = x if x.dtype == weight.dtype else torch.empty_like(x, dtype=weight.dtype)
    found = torch.ops.aten.convolution_backward(
        grad, y.to(weight.dtype), weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, needs
    )
    first, second, third = (d if needed else grad.new_empty(0) for d, needed in zip(found, needs, strict=True))
    return first, second, third


def _fake_forward(
    input: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, save_stats: bool, *geometry: Any
) -> tuple[Tensor, Tensor]:
    x = dense(input)
    reserve_counters(x.device)
    out = _convolve(torch.empty_like(x), conv_weight, conv_bias, *geometry)
    return out, x.new_empty((4, x.shape[1]) if save_stats else 0, dtype=torch.float32)


def _fake_batch_norm_act_conv2d(
    input: Tensor, weight: Any, bias: Any, conv_weight: Tensor, conv_bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    return _fake_forward(input, conv_weight, conv_bias, True, *args[-5:-1])


def _fake_batch_norm_act_conv2d_inference(
    input: Tensor, weight: Any, bias: Any, conv_weight: Tensor, conv_bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    return _fake_forward(input, conv_weight, conv_bias, args[-1], *args[-5:-1])


def _fake_add_forward(input: Tensor, residual: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    s = torch.empty_like(dense(input), dtype=torch.promote_types(input.dtype, residual.dtype))
    return s, *_fake_forward(s, *args)


def _fake_add_batch_norm_act_conv2d(
    input: Tensor, residual: Tensor, weight: Any, bias: Any, conv_weight: Tensor, conv_bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_add_forward(input, residual, conv_weight, conv_bias, True, *args[-5:-1])


def _fake_add_batch_norm_act_conv2d_inference(
    input: Tensor, residual: Tensor, weight: Any, bias: Any, conv_weight: Tensor, conv_bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_add_forward(input, residual, conv_weight, conv_bias, args[-1], *args[-5:-1])


def _fake_batch_norm_act_conv2d_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    input: Tensor,
    stats: Tensor,
    conv_weight: Tensor,
    eps: float,
    act: str | None,
    frozen: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    input_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    needs_conv: list[bool],
) -> Gradients:
    x = dense(input)
    d_input, _, d_weight, d_bias = gradients(x, input_dtype, None, weight_dtype, bias_dtype)
    _, d_conv_weight, d_conv_bias = _convolution_gradients(
        grad, x, None, conv_weight, stride, padding, dilation, groups, [False, *needs_conv]
    )
    return d_input, d_weight, d_bias, d_conv_weight, d_conv_bias


class _BatchNormActConv2d(torch.autograd.Function):
    """Either forward operator, with the shared backward."""

    @staticmethod
    def forward(
        ctx: Any,
        operator: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        conv_weight: Tensor,
        *args: Any,
    ) -> tuple[Tensor, Tensor]:
        x = dense(input)
        with torch._C._AutoDispatchBelowAutograd():
            out, stats = operator(x, weight, bias, conv_weight, *args)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(stats)
        if any(ctx.needs_input_grad[1:5]):  # the gradient of the convolution's bias is a sum over the incoming one
            ctx.save_for_backward(x, stats, conv_weight)
        ctx.eps, ctx.act, *ctx.geometry = args[-7:-1]
        ctx.frozen = operator is torch.ops.fusedres.batch_norm_act_conv2d_inference.default
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (input, weight, bias))
        return out, stats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        refuse_double_backward()
        needs = ctx.needs_input_grad[1:6]
        skipped = (None,) * (len(ctx.needs_input_grad) - 6)
        if grad is None:
            return None, None, None, None, None, None, *skipped
        if not any(needs[:4]):
            return None, None, None, None, None, grad.sum((0, 2, 3)), *skipped
        dtypes = (dtype if needed else None for dtype, needed in zip(ctx.dtypes, needs[:3], strict=True))
        found = torch.ops.fusedres.batch_norm_act_conv2d_backward(
            grad, None, *ctx.saved_tensors, ctx.eps, ctx.act, ctx.frozen, *ctx.geometry, *dtypes, needs[3:]
        )
        return None, *(d if needed else None for d, needed in zip(found, needs, strict=True)), *skipped


class _AddBatchNormActConv2d(torch.autograd.Function):
    """The same for a sum that is handed on."""

    @staticmethod
    def forward(
        ctx: Any,
        operator: Any,
        input: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        conv_weight: Tensor,
        *args: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            s, out, stats = operator(input, residual, weight, bias, conv_weight, *args)
        ctx.set_materialize_grads(False)
        # As a sum of terms that need no gradient, s needs none, whatever else needs one.
        ctx.mark_non_differentiable(*((stats,) if any(ctx.needs_input_grad[1:3]) else (s, stats)))
        if any(ctx.needs_input_grad[1:6]):
            ctx.save_for_backward(s, stats, conv_weight)
        ctx.eps, ctx.act, *ctx.geometry = args[-7:-1]
        ctx.frozen = operator is torch.ops.fusedres.add_batch_norm_act_conv2d_inference.default
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (input, residual, weight, bias))
        ctx.sum_dtype = s.dtype
        return s, out, stats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_sum, grad, _ = grads
        refuse_double_backward()
        *needs, needs_conv_weight, needs_conv_bias = ctx.needs_input_grad[1:7]
        dtypes = [dtype if needed else None for dtype, needed in zip(ctx.dtypes, needs, strict=True)]
        term, found = grad_sum, (None,) * 4
        if grad is not None and (any(needs) or needs_conv_weight):
            # One gradient of both terms, as they want it; where they differ, as s is.
            terms = {dtype for dtype in dtypes[:2] if dtype is not None}
            term_dtype = next(iter(terms)) if len(terms) == 1 else (ctx.sum_dtype if terms else None)
            term, *found = torch.ops.fusedres.batch_norm_act_conv2d_backward(
                grad, grad_sum, *ctx.saved_tensors, ctx.eps, ctx.act, ctx.frozen, *ctx.geometry,
                term_dtype, *dtypes[2:], [needs_conv_weight, needs_conv_bias],
            )  # fmt: skip
        elif grad is not None:
            found = None, None, None, grad.sum((0, 2, 3))
        return (
            None,
            *(None if term is None or dtype is None else term.to(dtype) for dtype in dtypes[:2]),
            *(d if needed else None for d, needed in zip(found, ctx.needs_input_grad[3:7], strict=True)),
            *(None,) * (len(ctx.needs_input_grad) - 7),
        )


_CONVOLUTION = "int[2] stride, int[2] padding, int[2] dilation, int groups"

register(
    "batch_norm_act_conv2d(Tensor input, Tensor? weight, Tensor? bias, Tensor conv_weight, Tensor? conv_bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, "
    f"str? act, {_CONVOLUTION}, bool save_for_backward) -> (Tensor out, Tensor stats)",
    _batch_norm_act_conv2d,
    _fake_batch_norm_act_conv2d,
    _BatchNormActConv2d,
    counter=7,
)
register(
    "batch_norm_act_conv2d_inference(Tensor input, Tensor? weight, Tensor? bias, Tensor conv_weight, "
    "Tensor? conv_bias, Tensor running_mean, Tensor running_var, float eps, str? act, "
    f"{_CONVOLUTION}, bool save_for_backward) -> (Tensor out, Tensor stats)",
    _batch_norm_act_conv2d_inference,
    _fake_batch_norm_act_conv2d_inference,
    _BatchNormActConv2d,
)
register(
    "add_batch_norm_act_conv2d(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, Tensor conv_weight, "
    "Tensor? conv_bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
    f"float? momentum, float eps, str? act, {_CONVOLUTION}, bool save_for_backward) "
    "-> (Tensor sum, Tensor out, Tensor stats)",
    _add_batch_norm_act_conv2d,
    _fake_add_batch_norm_act_conv2d,
    _AddBatchNormActConv2d,
    counter=8,
)
register(
    "add_batch_norm_act_conv2d_inference(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, "
    "Tensor conv_weight, Tensor? conv_bias, Tensor running_mean, Tensor running_var, float eps, str? act, "
    f"{_CONVOLUTION}, bool save_for_backward) -> (Tensor sum, Tensor out, Tensor stats)",
    _add_batch_norm_act_conv2d_inference,
    _fake_add_batch_norm_act_conv2d_inference,
    _AddBatchNormActConv2d,
)
register(
    "batch_norm_act_conv2d_backward(Tensor grad, Tensor? grad_sum, Tensor input, Tensor stats, Tensor conv_weight, "
    f"float eps, str? act, bool frozen, {_CONVOLUTION}, ScalarType? input_dtype, ScalarType? weight_dtype, "
    "ScalarType? bias_dtype, bool[2] needs_conv) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, "
    "Tensor grad_conv_weight, Tensor grad_conv_bias)",
    _batch_norm_act_conv2d_backward,
    _fake_batch_norm_act_conv2d_backward,
)
