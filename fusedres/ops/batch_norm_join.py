"""The operators ``fusedres::batch_norm_add_batch_norm_act``, its inference form and their backward.

Like those of ``batch_norm``, with two inputs that are normalised and then added. With ``fork`` the output has two
names, so that the gradients of its two readers meet in the backward's reduction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedres.kernels.layout import contiguous, dense, dense_like
from fusedres.ops.batch_norm_shared import finish_update
from fusedres.ops.registration import refuse_double_backward, register, reserve_counters

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def _batch_norm_join(
    input: Tensor,
    other: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    other_weight: Tensor | None,
    other_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    other_running_mean: Tensor | None,
    other_running_var: Tensor | None,
    other_num_batches_tracked: Tensor | None,
    momentum: float | None,
    other_momentum: float | None,
    eps: float,
    other_eps: float,
    act: str | None,
    fork: bool,
    save_for_backward: bool,
) -> Outputs:
    from fusedres.kernels.batch_norm_join import Norm, batch_norm_join_forward

    a = dense(input)
    mean, var = contiguous(running_mean), contiguous(running_var)
    other_mean, other_var = contiguous(other_running_mean), contiguous(other_running_var)
    norm_a = Norm(contiguous(weight), contiguous(bias), mean, var, num_batches_tracked, momentum, eps)
    norm_b = Norm(
        contiguous(other_weight), contiguous(other_bias), other_mean, other_var, other_num_batches_tracked,
        other_momentum, other_eps,
    )  # fmt: skip
    out, stats, other_stats = batch_norm_join_forward(a, dense_like(other, a), norm_a, norm_b, act)
    finish_update(running_mean, running_var, num_batches_tracked, mean, var)
    finish_update(other_running_mean, other_running_var, other_num_batches_tracked, other_mean, other_var)
    return out, out.new_empty(0), stats, other_stats


def _batch_norm_join_inference(
    input: Tensor,
    other: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    other_weight: Tensor | None,
    other_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    other_running_mean: Tensor,
    other_running_var: Tensor,
    eps: float,
    other_eps: float,
    act: str | None,
    fork: bool,
    save_for_backward: bool,
) -> Outputs:
    from fusedres.kernels.batch_norm_join import Norm, batch_norm_join_inference_forward

    a = dense(input)
    norm_a = Norm(
        contiguous(weight), contiguous(bias), contiguous(running_mean), contiguous(running_var), None, None, eps
    )
    norm_b = Norm(
        contiguous(other_weight), contiguous(other_bias), contiguous(other_running_mean),
        contiguous(other_running_var), None, None, other_eps,
    )  # fmt: skip
    b = dense_like(other, a)
    out, stats, other_stats = batch_norm_join_inference_forward(a, b, norm_a, norm_b, act, save_for_backward)
    return out, out.new_empty(0), stats, other_stats


def _batch_norm_join_backward(
    grad: Tensor,
    grad_fork: Tensor | None,
    input: Tensor,
    other: Tensor,
    stats: Tensor,
    other_stats: Tensor,
    act: str | None,
    frozen: bool,
    needs_input: bool,
    needs_other: bool,
    needs_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from fusedres.kernels.batch_norm_join_backward import Gradients, batch_norm_join_backward

    a = dense(input)
    outputs = _gradients(a, frozen, needs_input, needs_other, needs_parameters)
    wanted = Gradients(*(out if out.numel() else None for out in outputs))
    fork = None if grad_fork is None else dense_like(grad_fork, a)
    batch_norm_join_backward(
        dense_like(grad, a), fork, a, dense_like(other, a), stats, other_stats, act, frozen, wanted
    )  # fmt: skip
    return outputs


def _gradients(
    a: Tensor, frozen: bool, needs_input: bool, needs_other: bool, needs_parameters: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised gradients of both inputs and of the parameters; those that nothing needs are empty."""
    sums = needs_parameters or not frozen  # the inputs' gradients are made of them
    grad_input, grad_other = (
        torch.empty_like(a) if needed else a.new_empty(0) for needed in (needs_input, needs_other)
    )
    return grad_input, grad_other, a.new_empty((4, a.shape[1]) if sums else 0, dtype=torch.float32)


def _fake_forward(input: Tensor, save_stats: bool) -> Outputs:
    a = dense(input)
    reserve_counters(a.device)
    shape = (4, a.shape[1]) if save_stats else 0
    stats, other_stats = (a.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(a), a.new_empty(0), stats, other_stats


def _fake_batch_norm_join(input: Tensor, *args: Any) -> Outputs:
    return _fake_forward(input, True)


def _fake_batch_norm_join_inference(input: Tensor, *args: Any) -> Outputs:
    return _fake_forward(input, args[-1])


def _fake_batch_norm_join_backward(
    grad: Tensor,
    grad_fork: Tensor | None,
    input: Tensor,
    other: Tensor,
    stats: Tensor,
    other_stats: Tensor,
    act: str | None,
    *flags: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(dense(input), *flags)


class _BatchNormJoin(torch.autograd.Function):
    """Either forward operator, with the shared backward."""

    @staticmethod
    def forward(ctx: Any, operator: Any, input: Tensor, other: Tensor, *args: Any) -> Outputs:
        a = dense(input)
        b = dense_like(other, a)
        with torch._C._AutoDispatchBelowAutograd():
            out, fork, stats, other_stats = operator(a, b, *args)
        ctx.forks = args[-2] and any(ctx.needs_input_grad)
        if ctx.forks:
            fork = out.detach()  # a second name, with a gradient of its own
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(() if ctx.forks else (fork,)), stats, other_stats)
        ctx.save_for_backward(a, b, stats, other_stats)
        ctx.act = args[-3]
        ctx.frozen = operator.__name__ == "batch_norm_add_batch_norm_act_inference.default"
        ctx.dtypes = tuple(None if parameter is None else parameter.dtype for parameter in args[:4])
        return out, fork, stats, other_stats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        given = [grad for grad in grads[:2] if grad is not None]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        grad, grad_fork = given if len(given) == 2 else (given[0], None)
        needs_input, needs_other, *needs = ctx.needs_input_grad[1:7]
        grad_input, grad_other, sums = batch_norm_add_batch_norm_act_backward(
            grad, grad_fork, *ctx.saved_tensors, ctx.act, ctx.frozen, needs_input, needs_other, any(needs)
        )
        parameters = sums.unbind() if any(needs) else needs
        return (
            None,
            grad_input if needs_input else None,
            grad_other if needs_other else None,
            *(
                parameter.to(dtype) if needed else None
                for parameter, dtype, needed in zip(parameters, ctx.dtypes, needs, strict=True)
            ),
            *(None,) * (len(ctx.needs_input_grad) - 7),
        )


_PARAMETERS = "Tensor input, Tensor other, Tensor? weight, Tensor? bias, Tensor? other_weight, Tensor? other_bias, "
batch_norm_add_batch_norm_act = register(
    f"batch_norm_add_batch_norm_act({_PARAMETERS}Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, Tensor(d!)? other_running_mean, Tensor(e!)? other_running_var, "
    "Tensor(f!)? other_num_batches_tracked, float? momentum, float? other_momentum, float eps, float other_eps, "
    "str? act, bool fork, bool save_for_backward) -> (Tensor out, Tensor fork, Tensor stats, Tensor other_stats)",
    _batch_norm_join,
    _fake_batch_norm_join,
    _BatchNormJoin,
    counter=(8, 11),
)
batch_norm_add_batch_norm_act_inference = register(
    f"batch_norm_add_batch_norm_act_inference({_PARAMETERS}Tensor running_mean, Tensor running_var, "
    "Tensor other_running_mean, Tensor other_running_var, float eps, float other_eps, str? act, bool fork, "
    "bool save_for_backward) -> (Tensor out, Tensor fork, Tensor stats, Tensor other_stats)",
    _batch_norm_join_inference,
    _fake_batch_norm_join_inference,
    _BatchNormJoin,
)
batch_norm_add_batch_norm_act_backward = register(
    "batch_norm_add_batch_norm_act_backward(Tensor grad, Tensor? grad_fork, Tensor input, Tensor other, Tensor stats, "
    "Tensor other_stats, str? act, bool frozen, bool needs_input, bool needs_other, bool needs_parameters) "
    "-> (Tensor grad_input, Tensor grad_other, Tensor grad_parameters)",
    _batch_norm_join_backward,
    _fake_batch_norm_join_backward,
)
