"""The operators ``fusedres::batch_norm_act_max_pool2d``, its inference form and their backward.

Like those of ``batch_norm``, which say what a fork is. ``winner``, a byte an output, is all that is kept of the pooling
and of the activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedres.kernels.layout import Window, contiguous, dense, dense_like, planes
from fusedres.ops.batch_norm_shared import finish_update, gradients
from fusedres.ops.registration import refuse_double_backward, register, reserve_counters


def _batch_norm_act_max_pool2d(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    act: str | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    fork: bool,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fusedres.kernels.batch_norm_pool import batch_norm_act_max_pool2d_forward

    mean, var = contiguous(running_mean), contiguous(running_var)
    out, stats, winner = batch_norm_act_max_pool2d_forward(
        dense(input), Window.of(kernel_size, stride, padding), contiguous(weight), contiguous(bias), mean, var,
        num_batches_tracked, momentum, eps, act, save_for_backward,
    )  # fmt: skip
    finish_update(running_mean, running_var, num_batches_tracked, mean, var)
    return out, out.new_empty(0), stats, winner


def _batch_norm_act_max_pool2d_inference(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    act: str | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    fork: bool,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fusedres.kernels.batch_norm_pool import batch_norm_act_max_pool2d_inference_forward

    out, stats, winner = batch_norm_act_max_pool2d_inference_forward(
        dense(input), Window.of(kernel_size, stride, padding), contiguous(weight), contiguous(bias),
        running_mean.contiguous(), running_var.contiguous(), eps, act, save_for_backward,
    )  # fmt: skip
    return out, out.new_empty(0), stats, winner


def _batch_norm_act_max_pool2d_backward(
    grad: Tensor,
    grad_fork: Tensor | None,
    input: Tensor,
    stats: Tensor,
    winner: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    frozen: bool,
    needs_input: bool,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from fusedres.kernels import batch_norm_pool_backward as kernels
    from fusedres.kernels.batch_norm_backward import Gradients

    x = dense(input)
    outputs = gradients(x, x.dtype if needs_input else None, None, weight_dtype, bias_dtype)
    wanted = Gradients(*(out if out.numel() else None for out in outputs))
    other = None if grad_fork is None else dense_like(grad_fork, winner, grad.dtype)
    kernels.batch_norm_act_max_pool2d_backward(
        dense_like(grad, winner), other, x, stats, winner, Window.of(kernel_size, stride, padding), frozen, wanted
    )
    grad_input, _, grad_weight, grad_bias = outputs
    return grad_input, grad_weight, grad_bias


def _fake_forward(input: Tensor, window: Window, save_stats: bool, save: bool) -> tuple[Tensor, ...]:
    x = dense(input)
    reserve_counters(x.device)
    view = planes(x, window)
    return (
        view.pooled(x, x.dtype),
        x.new_empty(0),
        x.new_empty((4, view.C) if save_stats else 0, dtype=torch.float32),
        view.pooled(x, torch.uint8) if save else x.new_empty(0, dtype=torch.uint8),
    )


def _fake_batch_norm_act_max_pool2d(input: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *_, kernel_size, stride, padding, _, save_for_backward = args
    return _fake_forward(input, Window.of(kernel_size, stride, padding), True, save_for_backward)


def _fake_batch_norm_act_max_pool2d_inference(input: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *_, kernel_size, stride, padding, _, save_for_backward = args
    return _fake_forward(input, Window.of(kernel_size, stride, padding), save_for_backward, save_for_backward)


def _fake_batch_norm_act_max_pool2d_backward(
    grad: Tensor, grad_fork: Tensor | None, input: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, needs_input, weight_dtype, bias_dtype = args
    x_dtype = input.dtype if needs_input else None
    grad_input, _, grad_weight, grad_bias = gradients(dense(input), x_dtype, None, weight_dtype, bias_dtype)
    return grad_input, grad_weight, grad_bias


class _BatchNormActMaxPool2d(torch.autograd.Function):
    """Either forward operator, with the shared backward."""

    @staticmethod
    def forward(
        ctx: Any, operator: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, *args: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = dense(input)
        with torch._C._AutoDispatchBelowAutograd():
            out, fork, stats, winner = operator(x, weight, bias, *args)
        *_, kernel_size, stride, padding, forked, _ = args
        forked = forked and any(ctx.needs_input_grad)
        if forked:
            fork = out.detach()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(stats, winner, *(() if forked else (fork,)))
        ctx.save_for_backward(x, stats, winner)
        ctx.window = kernel_size, stride, padding
        ctx.frozen = operator.__name__ == "batch_norm_act_max_pool2d_inference.default"
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (weight, bias))
        return out, fork, stats, winner

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, grad_fork = grads[:2] if grads[0] is not None else (grads[1], None)
        refuse_double_backward()
        skipped = (None,) * (len(ctx.needs_input_grad) - 4)
        if grad is None:
            return None, None, None, None, *skipped
        _, needs_input, *needs = ctx.needs_input_grad[:4]
        dtypes = [dtype if needed else None for dtype, needed in zip(ctx.dtypes, needs, strict=True)]
        grad_input, grad_weight, grad_bias = batch_norm_act_max_pool2d_backward(
            grad, grad_fork, *ctx.saved_tensors, *ctx.window, ctx.frozen, needs_input, *dtypes
        )
        return (
            None,
            grad_input if needs_input else None,
            grad_weight if dtypes[0] else None,
            grad_bias if dtypes[1] else None,
            *skipped,
        )


batch_norm_act_max_pool2d = register(
    "batch_norm_act_max_pool2d(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, str? act, "
    "int[2] kernel_size, int[2] stride, int[2] padding, bool fork, bool save_for_backward) "
    "-> (Tensor out, Tensor fork, Tensor stats, Tensor winner)",
    _batch_norm_act_max_pool2d,
    _fake_batch_norm_act_max_pool2d,
    _BatchNormActMaxPool2d,
    counter=5,
)
batch_norm_act_max_pool2d_inference = register(
    "batch_norm_act_max_pool2d_inference(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, "
    "Tensor running_var, float eps, str? act, int[2] kernel_size, int[2] stride, int[2] padding, bool fork, "
    "bool save_for_backward) -> (Tensor out, Tensor fork, Tensor stats, Tensor winner)",
    _batch_norm_act_max_pool2d_inference,
    _fake_batch_norm_act_max_pool2d_inference,
    _BatchNormActMaxPool2d,
)
batch_norm_act_max_pool2d_backward = register(
    "batch_norm_act_max_pool2d_backward(Tensor grad, Tensor? grad_fork, Tensor input, Tensor stats, Tensor winner, "
    "int[2] kernel_size, int[2] stride, int[2] padding, bool frozen, bool needs_input, ScalarType? weight_dtype, "
    "ScalarType? bias_dtype) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    _batch_norm_act_max_pool2d_backward,
    _fake_batch_norm_act_max_pool2d_backward,
)
