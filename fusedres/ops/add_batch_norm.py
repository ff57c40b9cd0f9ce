"""The operators ``fusedres::add_batch_norm_act``, its inference form and their backward.

Like those of ``batch_norm``, with two outputs: the sum, and what its normalisation gives. The backward takes a
gradient of each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedres.kernels.layout import contiguous, dense, dense_like
from fusedres.ops.batch_norm_shared import finish_update, gradients
from fusedres.ops.registration import refuse_double_backward, register, reserve_counters


def _add_batch_norm_act(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    act: str | None,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from fusedres.kernels.add_batch_norm import add_batch_norm_act_forward

    x = dense(input)
    mean, var = contiguous(running_mean), contiguous(running_var)
    outputs = add_batch_norm_act_forward(
        x, dense_like(residual, x), contiguous(weight), contiguous(bias), mean, var, num_batches_tracked, momentum,
        eps, act,
    )  # fmt: skip
    finish_update(running_mean, running_var, num_batches_tracked, mean, var)
    return outputs


def _add_batch_norm_act_inference(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    act: str | None,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from fusedres.kernels.add_batch_norm import add_batch_norm_act_inference_forward

    x = dense(input)
    return add_batch_norm_act_inference_forward(
        x, dense_like(residual, x), contiguous(weight), contiguous(bias), running_mean.contiguous(),
        running_var.contiguous(), eps, act, save_for_backward,
    )  # fmt: skip


def _add_batch_norm_act_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    stats: Tensor,
    act: str | None,
    frozen: bool,
    term_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from fusedres.kernels.batch_norm_backward import Gradients, batch_norm_act_backward

    s = dense(sum)
    outputs = gradients(s, term_dtype, None, weight_dtype, bias_dtype)
    wanted = Gradients(*(out if out.numel() else None for out in outputs))
    ds = None if grad_sum is None else dense_like(grad_sum, s)
    batch_norm_act_backward(dense_like(grad, s), s, None, stats, act, frozen, wanted, ds)
    term, _, weight, bias = outputs
    return term, weight, bias


def _fake_forward(input: Tensor, residual: Tensor, save_stats: bool) -> tuple[Tensor, Tensor, Tensor]:
    x = dense(input)
    reserve_counters(x.device)
    s = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    return s, torch.empty_like(s), x.new_empty((4, x.shape[1]) if save_stats else 0, dtype=torch.float32)


def _fake_add_batch_norm_act(input: Tensor, residual: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_forward(input, residual, True)


def _fake_add_batch_norm_act_inference(input: Tensor, residual: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_forward(input, residual, args[-1])


def _fake_add_batch_norm_act_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    stats: Tensor,
    act: str | None,
    frozen: bool,
    term_dtype: torch.dtype | None,
    *parameter_dtypes: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    term, _, weight, bias = gradients(dense(sum), term_dtype, None, *parameter_dtypes)
    return term, weight, bias


class _AddBatchNormAct(torch.autograd.Function):
    """Either forward operator, with the shared backward."""

    @staticmethod
    def forward(
        ctx: Any, operator: Any, input: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, *args: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            s, out, stats = operator(input, residual, weight, bias, *args)
        ctx.set_materialize_grads(False)
        # As a sum of terms that need no gradient, s needs none, whatever the parameters of its normalisation need.
        needs_s = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.mark_non_differentiable(*((stats,) if needs_s else (s, stats)))
        ctx.save_for_backward(s, stats)
        ctx.act = args[-2]
        ctx.frozen = operator.__name__ == "add_batch_norm_act_inference.default"
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (input, residual, weight, bias))
        return s, out, stats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_sum, grad, _ = grads
        refuse_double_backward()
        s, stats = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:5]
        dtypes = [dtype if needed else None for dtype, needed in zip(ctx.dtypes, needs, strict=True)]
        term, weight, bias = grad_sum, None, None
        if grad is not None:
            # Both terms of the sum have one gradient. It is written as they want it; where they differ, as s is.
            terms = {dtype for dtype in dtypes[:2] if dtype is not None}
            term_dtype = next(iter(terms)) if len(terms) == 1 else (s.dtype if terms else None)
            term, weight, bias = add_batch_norm_act_backward(
                grad, grad_sum, s, stats, ctx.act, ctx.frozen, term_dtype, *dtypes[2:]
            )
        return (
            None,
            *(None if term is None or dtype is None else term.to(dtype) for dtype in dtypes[:2]),
            weight if dtypes[2] else None,
            bias if dtypes[3] else None,
            *(None,) * (len(ctx.needs_input_grad) - 5),
        )


add_batch_norm_act = register(
    "add_batch_norm_act(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, str? act, "
    "bool save_for_backward) -> (Tensor sum, Tensor out, Tensor stats)",
    _add_batch_norm_act,
    _fake_add_batch_norm_act,
    _AddBatchNormAct,
    counter=6,
)
add_batch_norm_act_inference = register(
    "add_batch_norm_act_inference(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, Tensor running_mean, "
    "Tensor running_var, float eps, str? act, bool save_for_backward) -> (Tensor sum, Tensor out, Tensor stats)",
    _add_batch_norm_act_inference,
    _fake_add_batch_norm_act_inference,
    _AddBatchNormAct,
)
add_batch_norm_act_backward = register(
    "add_batch_norm_act_backward(Tensor grad, Tensor? grad_sum, Tensor sum, Tensor stats, str? act, bool frozen, "
    "ScalarType? term_dtype, ScalarType? weight_dtype, ScalarType? bias_dtype) "
    "-> (Tensor grad_term, Tensor grad_weight, Tensor grad_bias)",
    _add_batch_norm_act_backward,
    _fake_add_batch_norm_act_backward,
)
