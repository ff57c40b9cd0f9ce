"""BatchNorm with the statistics of all ranks of a process group: its steps as operators, and their autograd.

A layer gathers one message a rank in the forward, (mean, M2, count) of the channels, and reduces one sum in the
backward; a rank whose batch is empty takes part in both. The collectives stand between the operators, where
torch.compile sees them. Each step exists twice under one name, as an operator over kernels and in the reference, and
messages are the same, so that ranks need not take the same path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedres import reference
from fusedres.kernels.layout import dense, dense_like
from fusedres.norm import Norm
from fusedres.ops.batch_norm import is_masked, mask_of
from fusedres.ops.batch_norm_family import NORM, at_unit_stride, finish_update, flat, unflat
from fusedres.ops.registration import refuse_double_backward, register, reserve_counters


def sync_batch_norm_act(
    input: Tensor,
    residual: Tensor | None,
    norm: Norm,
    act: str | None,
    *,
    added: bool,
    group: tuple[str, int],
    kernels: bool,
    save_for_backward: bool,
) -> Any:
    """``act(bn(input) + residual)``, or where it is ``added`` before, ``(s, act(bn(s)))`` of s = input + residual.

    ``group`` is the name of the process group and its size.
    """
    x = dense(input)
    residual = None if residual is None else dense_like(residual, x)
    return _SyncBatchNormAct.apply(x, residual, *norm, act, added, *group, kernels, save_for_backward)


class _SyncBatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, *args: Any) -> Any:
        norm = Norm(*args[:8])
        act, added, group_name, ranks, kernels, save_for_backward = args[8:]
        steps: Any = torch.ops.fusedres if kernels else reference
        merge = sync_merge if kernels else reference.sync_merge
        message, s = steps.sync_moments(x, residual if added else None)
        messages = torch.ops._c10d_functional.all_gather_into_tensor(message, ranks, group_name)
        messages = torch.ops._c10d_functional.wait_tensor(messages).view(ranks, -1)
        stats, inverse = merge(messages, norm)
        normalised = s if added else x
        out, mask = steps.sync_normalise(normalised, None if added else residual, stats, act, save_for_backward)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(normalised, stats, inverse, mask)
        ctx.act, ctx.added, ctx.group_name, ctx.steps = act, added, group_name, steps
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, residual, norm.weight, norm.bias))
        return (s, out) if added else out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("BatchNorm over several ranks has no double backward")
        x, stats, inverse, mask = ctx.saved_tensors
        needs = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[4:6])
        x_dtype, residual_dtype, weight_dtype, bias_dtype = (
            dtype if needed else None for dtype, needed in zip(ctx.dtypes, needs, strict=True)
        )
        grad_sum, grad = grads if ctx.added else (None, grads[0])
        # Without a gradient as well: the other ranks wait for this one's share.
        grad = torch.zeros_like(x) if grad is None else dense_like(grad, x)
        grad_sum = None if grad_sum is None else dense_like(grad_sum, x)
        # Without an activation the residual's gradient is the incoming one.
        writes = residual_dtype is not None and ctx.act is not None and not ctx.added
        sums, g = ctx.steps.sync_reduce(grad, x, stats, mask, ctx.act, residual_dtype if writes else None)
        grad_x = None
        if x_dtype is not None or (ctx.added and residual_dtype is not None):
            total = torch.ops._c10d_functional.all_reduce(sums, "sum", ctx.group_name)
            means = torch.ops._c10d_functional.wait_tensor(total) * inverse
            masked = (g, None) if writes and g.dtype == grad.dtype else (grad, ctx.act)
            grad_x = ctx.steps.sync_gradient(masked[0], grad_sum, x, stats, means, mask, masked[1])
        if ctx.added:
            grad_residual = None if grad_x is None or residual_dtype is None else grad_x.to(residual_dtype)
        elif residual_dtype is not None:
            grad_residual = g if writes else grad.to(residual_dtype)
        else:
            grad_residual = None
        return (
            None if grad_x is None or x_dtype is None else grad_x.to(x_dtype),
            grad_residual,
            None,
            None,
            sums[1].to(weight_dtype) if weight_dtype else None,
            sums[0].to(bias_dtype) if bias_dtype else None,
            *(None,) * 10,
        )


def _moments(input: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    from fusedres.kernels.sync_batch_norm import moments

    return moments(input, residual)


def sync_merge(messages: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    return torch.ops.fusedres.sync_merge(*flat((messages,), (norm,)))


def _merge(messages: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    from fusedres.kernels.sync_batch_norm import merge

    norms = (unflat(args, training=True),)
    read = at_unit_stride(norms)
    merged = merge(messages, *read)
    finish_update(norms, read)
    return merged


def _normalise(
    input: Tensor, residual: Tensor | None, stats: Tensor, act: str | None, save_for_backward: bool
) -> tuple[Tensor, Tensor]:
    from fusedres.kernels.sync_batch_norm import normalise

    return normalise(input, residual, stats, act, save_for_backward)


def _reduce(
    grad: Tensor, input: Tensor, stats: Tensor, mask: Tensor, act: str | None, residual_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    from fusedres.kernels.sync_batch_norm import reduce

    return reduce(grad, input, stats, mask, act, residual_dtype)


def _gradient(
    grad: Tensor,
    grad_sum: Tensor | None,
    input: Tensor,
    stats: Tensor,
    means: Tensor,
    mask: Tensor,
    act: str | None,
) -> Tensor:
    from fusedres.kernels.sync_batch_norm import gradient

    return gradient(grad, grad_sum, input, stats, means, mask, act)


def _fake_moments(input: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    reserve_counters(input.device)
    message = input.new_empty(2 * input.shape[1] + 1, dtype=torch.float32)
    if residual is None:
        return message, input.new_empty(0)
    return message, torch.empty_like(input, dtype=torch.promote_types(input.dtype, residual.dtype))


def _fake_merge(messages: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    channels = messages.shape[1] // 2
    return messages.new_empty(4, channels), messages.new_empty(2, channels)


def _fake_normalise(
    input: Tensor, residual: Tensor | None, stats: Tensor, act: str | None, save_for_backward: bool
) -> tuple[Tensor, Tensor]:
    dtype = input.dtype if residual is None else torch.promote_types(input.dtype, residual.dtype)
    return torch.empty_like(input, dtype=dtype), mask_of(input, save_for_backward and is_masked(residual, act))


def _fake_reduce(
    grad: Tensor, input: Tensor, stats: Tensor, mask: Tensor, act: str | None, residual_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    g = input.new_empty(0) if residual_dtype is None else torch.empty_like(input, dtype=residual_dtype)
    return stats.new_empty(2, input.shape[1]), g


def _fake_gradient(grad: Tensor, grad_sum: Tensor | None, input: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(input)


register("sync_moments(Tensor input, Tensor? residual) -> (Tensor message, Tensor sum)", _moments, _fake_moments)
register(f"sync_merge(Tensor messages, {NORM}) -> (Tensor stats, Tensor inverse)", _merge, _fake_merge)
register(
    "sync_normalise(Tensor input, Tensor? residual, Tensor stats, str? act, bool save_for_backward) "
    "-> (Tensor out, Tensor mask)",
    _normalise,
    _fake_normalise,
)
register(
    "sync_reduce(Tensor grad, Tensor input, Tensor stats, Tensor mask, str? act, ScalarType? residual_dtype) "
    "-> (Tensor sums, Tensor grad_residual)",
    _reduce,
    _fake_reduce,
)
register(
    "sync_gradient(Tensor grad, Tensor? grad_sum, Tensor input, Tensor stats, Tensor means, Tensor mask, str? act) "
    "-> Tensor",
    _gradient,
    _fake_gradient,
)
