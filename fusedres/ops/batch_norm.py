"""The operators ``fusedres::batch_norm_act``, its inference form and their backward.

The training operator mutates the running statistics, so that they cost no launch of their own.

A *fork* is the output under a second name, for a second reader: the backward then takes two gradients and adds them
while it reads them, where autograd would in a pass of its own. An operator must not return one memory twice, so
``fork`` is empty below autograd, whose kernel puts the name there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedres.kernels.layout import contiguous, dense, dense_like
from fusedres.ops.batch_norm_shared import finish_update, gradients
from fusedres.ops.registration import refuse_double_backward, register, reserve_counters


def _batch_norm_act(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    act: str | None,
    fork: bool,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fusedres.kernels.batch_norm_forward import batch_norm_act_forward

    x = dense(input)
    mean, var = contiguous(running_mean), contiguous(running_var)
    out, stats, mask = batch_norm_act_forward(
        x,
        None if residual is None else dense_like(residual, x),
        contiguous(weight),
        contiguous(bias),
        mean,
        var,
        num_batches_tracked,
        momentum,
        eps,
        act,
        save_for_backward and _masked(residual, act),
    )
    finish_update(running_mean, running_var, num_batches_tracked, mean, var)
    return out, out.new_empty(0), stats, mask


def _batch_norm_act_inference(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    act: str | None,
    fork: bool,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fusedres.kernels.batch_norm_forward import batch_norm_act_inference_forward

    x = dense(input)
    out, stats, mask = batch_norm_act_inference_forward(
        x,
        None if residual is None else dense_like(residual, x),
        contiguous(weight),
        contiguous(bias),
        running_mean.contiguous(),
        running_var.contiguous(),
        eps,
        act,
        save_for_backward,
        save_for_backward and _masked(residual, act),
    )
    return out, out.new_empty(0), stats, mask


def _batch_norm_act_backward(
    grad: Tensor,
    grad_fork: Tensor | None,
    input: Tensor,
    stats: Tensor,
    mask: Tensor,
    act: str | None,
    frozen: bool,
    needs_input: bool,
    residual_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fusedres.kernels.batch_norm_backward import Gradients, batch_norm_act_backward

    x = dense(input)
    outputs = gradients(x, x.dtype if needs_input else None, residual_dtype, weight_dtype, bias_dtype)
    wanted = Gradients(*(out if out.numel() else None for out in outputs))
    batch_norm_act_backward(
        dense_like(grad, x), x, mask if mask.numel() else None, stats, act, frozen, wanted,
        None if grad_fork is None else dense_like(grad_fork, x, grad.dtype), fork=grad_fork is not None,
    )  # fmt: skip
    return outputs


def _masked(residual: Tensor | None, act: str | None) -> bool:
    """Whether the backward needs the bit mask; without a residual it finds the sign again from the input."""
    return residual is not None and act is not None


def _fake_forward(
    input: Tensor, residual: Tensor | None, act: str | None, save_stats: bool, save_for_backward: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = dense(input)
    reserve_counters(x.device)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    channels = x.shape[1]
    masked = save_for_backward and _masked(residual, act)
    return (
        torch.empty_like(x, dtype=dtype),
        x.new_empty(0, dtype=dtype),
        x.new_empty((4, channels) if save_stats else 0, dtype=torch.float32),
        x.new_empty((x.numel() // channels + 7) // 8 * channels if masked else 0, dtype=torch.uint8),
    )


def _fake_batch_norm_act(input: Tensor, residual: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    *_, act, _, save_for_backward = args
    return _fake_forward(input, residual, act, True, save_for_backward)


def _fake_batch_norm_act_inference(input: Tensor, residual: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    *_, act, _, save_for_backward = args
    return _fake_forward(input, residual, act, save_for_backward, save_for_backward)


def _fake_batch_norm_act_backward(
    grad: Tensor,
    grad_fork: Tensor | None,
    input: Tensor,
    stats: Tensor,
    mask: Tensor,
    act: str | None,
    frozen: bool,
    needs_input: bool,
    *dtypes: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return gradients(dense(input), input.dtype if needs_input else None, *dtypes)


class _BatchNormAct(torch.autograd.Function):
    """Either forward operator, with the shared backward."""

    @staticmethod
    def forward(
        ctx: Any,
        operator: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        *args: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = dense(input)
        with torch._C._AutoDispatchBelowAutograd():
            out, fork, stats, mask = operator(x, residual, weight, bias, *args)
        *_, act, forked, _ = args
        forked = forked and any(ctx.needs_input_grad)
        if forked:
            fork = out.detach()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(stats, mask, *(() if forked else (fork,)))
        ctx.save_for_backward(x, stats, mask)
        ctx.act = act
        ctx.frozen = operator.__name__ == "batch_norm_act_inference.default"
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (residual, weight, bias))
        return out, fork, stats, mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, grad_fork = grads[:2] if grads[0] is not None else (grads[1], None)
        refuse_double_backward()
        skipped = (None,) * (len(ctx.needs_input_grad) - 5)
        if grad is None:
            return None, None, None, None, None, *skipped
        x, stats, mask = ctx.saved_tensors
        _, needs_input, *needs = ctx.needs_input_grad[:5]
        residual_dtype, weight_dtype, bias_dtype = (
            dtype if needed else None for dtype, needed in zip(ctx.dtypes, needs, strict=True)
        )
        # Without an activation the residual's gradient is the incoming one, where that is one.
        direct = ctx.act is None and residual_dtype is not None and grad_fork is None
        grad_input, grad_residual, grad_weight, grad_bias = batch_norm_act_backward(
            grad, grad_fork, x, stats, mask, ctx.act, ctx.frozen, needs_input, None if direct else residual_dtype,
            weight_dtype, bias_dtype,
        )  # fmt: skip
        return (
            None,
            grad_input if needs_input else None,
            grad.to(residual_dtype) if direct else (grad_residual if residual_dtype else None),
            grad_weight if weight_dtype else None,
            grad_bias if bias_dtype else None,
            *skipped,
        )


batch_norm_act = register(
    "batch_norm_act(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, str? act, "
    "bool fork, bool save_for_backward) -> (Tensor out, Tensor fork, Tensor stats, Tensor mask)",
    _batch_norm_act,
    _fake_batch_norm_act,
    _BatchNormAct,
    counter=6,
)
batch_norm_act_inference = register(
    "batch_norm_act_inference(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor running_mean, "
    "Tensor running_var, float eps, str? act, bool fork, bool save_for_backward) "
    "-> (Tensor out, Tensor fork, Tensor stats, Tensor mask)",
    _batch_norm_act_inference,
    _fake_batch_norm_act_inference,
    _BatchNormAct,
)
batch_norm_act_backward = register(
    "batch_norm_act_backward(Tensor grad, Tensor? grad_fork, Tensor input, Tensor stats, Tensor mask, str? act, "
    "bool frozen, bool needs_input, ScalarType? residual_dtype, ScalarType? weight_dtype, ScalarType? bias_dtype) "
    "-> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    _batch_norm_act_backward,
    _fake_batch_norm_act_backward,
)
