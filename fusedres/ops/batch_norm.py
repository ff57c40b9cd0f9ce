"""The operators ``fusedres::batch_norm_act``, its inference form and their backward.

The training operator mutates the running statistics, so that they cost no launch of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedres.kernels.layout import dense, dense_like
from fusedres.ops.registration import register


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
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from fusedres.kernels.batch_norm_forward import batch_norm_act_forward

    x = dense(input)
    mean, var = _contiguous(running_mean), _contiguous(running_var)
    outputs = batch_norm_act_forward(
        x,
        None if residual is None else dense_like(residual, x),
        _contiguous(weight),
        _contiguous(bias),
        mean,
        var,
        num_batches_tracked,
        momentum,
        eps,
        act,
        save_for_backward and _masked(residual, act),
    )
    for buffer, updated in ((running_mean, mean), (running_var, var)):
        if buffer is not None and updated is not None and updated is not buffer:
            buffer.copy_(updated)
    mutated = [t for t in (running_mean, running_var, num_batches_tracked) if t is not None and not t.is_inference()]
    torch.autograd.graph.increment_version(mutated)
    return outputs


def _batch_norm_act_inference(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    act: str | None,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from fusedres.kernels.batch_norm_forward import batch_norm_act_inference_forward

    x = dense(input)
    return batch_norm_act_inference_forward(
        x,
        None if residual is None else dense_like(residual, x),
        _contiguous(weight),
        _contiguous(bias),
        running_mean.contiguous(),
        running_var.contiguous(),
        eps,
        act,
        save_for_backward,
        save_for_backward and _masked(residual, act),
    )


def _batch_norm_act_backward(
    grad: Tensor,
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
    outputs = _gradients(x, needs_input, residual_dtype, weight_dtype, bias_dtype)
    wanted = Gradients(*(out if out.numel() else None for out in outputs))
    batch_norm_act_backward(
        dense_like(grad, x), x, mask if mask.numel() else None, stats, act, frozen, wanted
    )  # fmt: skip
    return outputs


def _contiguous(vector: Tensor | None) -> Tensor | None:
    """The kernels read vectors of C at unit stride."""
    return None if vector is None else vector.contiguous()


def _masked(residual: Tensor | None, act: str | None) -> bool:
    """Whether the backward needs the bit mask; without a residual it finds the sign again from the input."""
    return residual is not None and act is not None


def _gradients(
    x: Tensor,
    needs_input: bool,
    residual_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised gradients; those not asked for are empty."""

    def activation(dtype: torch.dtype | None) -> Tensor:
        return x.new_empty(0) if dtype is None else torch.empty_like(x, dtype=dtype)

    def parameter(dtype: torch.dtype | None) -> Tensor:
        return x.new_empty(0 if dtype is None else x.shape[1], dtype=dtype)

    return (
        activation(x.dtype if needs_input else None),
        activation(residual_dtype),
        parameter(weight_dtype),
        parameter(bias_dtype),
    )


def _fake_forward(
    input: Tensor, residual: Tensor | None, act: str | None, save_stats: bool, save_for_backward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x = dense(input)
    if x.device.type == "cuda" and torch.cuda.is_available():
        from fusedres.kernels.workspace import reserve

        reserve(x.device)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    channels = x.shape[1]
    masked = save_for_backward and _masked(residual, act)
    return (
        torch.empty_like(x, dtype=dtype),
        x.new_empty((4, channels) if save_stats else 0, dtype=torch.float32),
        x.new_empty((x.numel() // channels + 7) // 8 * channels if masked else 0, dtype=torch.uint8),
    )


def _fake_batch_norm_act(input: Tensor, residual: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, act, save_for_backward = args
    return _fake_forward(input, residual, act, True, save_for_backward)


def _fake_batch_norm_act_inference(input: Tensor, residual: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, act, save_for_backward = args
    return _fake_forward(input, residual, act, save_for_backward, save_for_backward)


def _fake_batch_norm_act_backward(
    grad: Tensor, input: Tensor, stats: Tensor, mask: Tensor, act: str | None, frozen: bool, *wanted: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients(dense(input), *wanted)


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
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = dense(input)
        with torch._C._AutoDispatchBelowAutograd():
            out, stats, mask = operator(x, residual, weight, bias, *args)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(stats, mask)
        ctx.save_for_backward(x, stats, mask)
        ctx.act = args[-2]
        ctx.frozen = operator is torch.ops.fusedres.batch_norm_act_inference.default
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (residual, weight, bias))
        return out, stats, mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if torch.is_grad_enabled():  # create_graph=True
            raise NotImplementedError(
                "the kernels have no double backward; FUSEDRES_BACKEND=reference takes PyTorch's own operators"
            )
        skipped = (None,) * (len(ctx.needs_input_grad) - 5)
        if grad is None:
            return None, None, None, None, None, *skipped
        x, stats, mask = ctx.saved_tensors
        _, needs_input, *needs = ctx.needs_input_grad[:5]
        residual_dtype, weight_dtype, bias_dtype = (
            dtype if needed else None for dtype, needed in zip(ctx.dtypes, needs, strict=True)
        )
        # Without an activation the residual's gradient is the incoming one.
        direct = ctx.act is None and residual_dtype is not None
        grad_input, grad_residual, grad_weight, grad_bias = torch.ops.fusedres.batch_norm_act_backward(
            grad, x, stats, mask, ctx.act, ctx.frozen, needs_input, None if direct else residual_dtype,
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


register(
    "batch_norm_act(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, str? act, "
    "bool save_for_backward) -> (Tensor out, Tensor stats, Tensor mask)",
    _batch_norm_act,
    _fake_batch_norm_act,
    _BatchNormAct,
)
register(
    "batch_norm_act_inference(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor running_mean, "
    "Tensor running_var, float eps, str? act, bool save_for_backward) -> (Tensor out, Tensor stats, Tensor mask)",
    _batch_norm_act_inference,
    _fake_batch_norm_act_inference,
    _BatchNormAct,
)
register(
    "batch_norm_act_backward(Tensor grad, Tensor input, Tensor stats, Tensor mask, str? act, bool frozen, "
    "bool needs_input, ScalarType? residual_dtype, ScalarType? weight_dtype, ScalarType? bias_dtype) "
    "-> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    _batch_norm_act_backward,
    _fake_batch_norm_act_backward,
)
