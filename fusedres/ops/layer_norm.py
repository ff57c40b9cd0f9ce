"""The operators ``fusedres::layer_norm_linear_act`` and ``fusedres::linear_layer_norm_act``, and their backwards.

All tensors are seen as rows: leading dimensions are flattened here, and the kernels know two dimensions. Where the
vendor library multiplies faster than a fused kernel is in :mod:`fusedres.kernels.tiling`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedres.kernels import tiling
from fusedres.kernels.layout import contiguous
from fusedres.kernels.workspace import num_sms
from fusedres.ops.registration import refuse_double_backward, register, reserve_counters

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _layer_norm_linear_act(
    input: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    act: str | None,
    tf32: bool,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor]:
    from fusedres.kernels.layer_norm import layer_norm_fwd
    from fusedres.kernels.layer_norm_linear import layer_norm_linear_fwd

    x, weight = _rows(input), weight.contiguous()
    ln_weight, ln_bias, bias = contiguous(ln_weight), contiguous(ln_bias), contiguous(bias)
    (M, K), N = x.shape, weight.shape[0]
    out = weight.new_empty((*input.shape[:-1], N))
    stats = x.new_empty((2, M) if save_for_backward else 0, dtype=torch.float32)
    saved = stats if save_for_backward else None
    tensor_cores = weight.itemsize == 2 or tf32
    if tiling.fuses_layer_norm_linear(M, N, K, tensor_cores):
        config = tiling.layer_norm_linear(M, N, K, x.itemsize, weight.itemsize, tensor_cores, num_sms(x.device))
        layer_norm_linear_fwd(x, ln_weight, ln_bias, weight, bias, saved, config, eps, act, tf32, _rows(out))
    else:
        normalised = torch.empty_like(x, dtype=weight.dtype)
        layer_norm_fwd(x, None, ln_weight, ln_bias, saved, eps, None, normalised)
        _linear(normalised, weight, bias, _rows(out))
        if act == "relu":
            torch.relu_(out)  # the vendor's epilogue does not promise to keep NaN
    return out, stats


def _layer_norm_linear_act_backward(
    grad: Tensor,
    input: Tensor,
    out: Tensor | None,
    stats: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    weight: Tensor,
    needs: list[bool],
) -> Gradients:
    from fusedres.kernels.layer_norm import ColumnSums, layer_norm_bwd
    from fusedres.kernels.layer_norm_linear import relu_bias_bwd

    x, dy = _rows(input), _rows(grad)
    gradients = _gradients(input.shape, input.dtype, ln_weight, ln_bias, weight, needs)
    dx, d_ln_weight, d_ln_bias, d_weight, d_bias = (t if t.numel() else None for t in gradients)
    g = dy
    if out is not None:
        g = torch.empty_like(dy)
        relu_bias_bwd(dy, _rows(out), g, d_bias)
    elif d_bias is not None:
        relu_bias_bwd(dy, None, None, d_bias)
    d_normalised = torch.mm(g, weight) if any(needs[:3]) else None
    normalised = None if d_weight is None else torch.empty_like(x, dtype=weight.dtype)
    if d_normalised is not None or normalised is not None:
        layer_norm_bwd(
            d_normalised, x, stats, contiguous(ln_weight), contiguous(ln_bias), None,
            None if dx is None else _rows(dx), normalised, ColumnSums(d_ln_weight, d_ln_bias, None),
        )  # fmt: skip
    if normalised is not None and d_weight is not None:
        torch.mm(g.t(), normalised, out=d_weight)
    return gradients


def _linear_layer_norm_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    eps: float,
    act: str | None,
    tf32: bool,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from fusedres.kernels.layer_norm import layer_norm_fwd
    from fusedres.kernels.layer_norm_linear import linear_layer_norm_fwd

    x, weight, residual = _rows(input), weight.contiguous(), None if residual is None else _rows(residual)
    bias, ln_weight, ln_bias = contiguous(bias), contiguous(ln_weight), contiguous(ln_bias)
    (M, K), N = x.shape, weight.shape[0]
    dtype = dtype if residual is None else torch.promote_types(dtype, residual.dtype)
    out = x.new_empty((*input.shape[:-1], N), dtype=dtype)
    stats = x.new_empty((2, M) if save_for_backward else 0, dtype=torch.float32)
    saved = stats if save_for_backward else None
    sms = num_sms(x.device)
    if tiling.fuses_linear_layer_norm(M, N, K, x.itemsize, x.itemsize == 2 or tf32, sms):
        product = x.new_empty((M, N) if save_for_backward else 0)
        config = tiling.linear_layer_norm(M, N, K, x.itemsize, sms)
        linear_layer_norm_fwd(
            x, weight, bias, ln_weight, ln_bias, residual, product if save_for_backward else None, saved, config,
            eps, act, tf32, _rows(out),
        )  # fmt: skip
    else:
        product = x.new_empty((M, N))
        _linear(x, weight, bias, product)
        layer_norm_fwd(product, residual, ln_weight, ln_bias, saved, eps, act, _rows(out))
        product = product if save_for_backward else x.new_empty(0)
    return out, product, stats


def _linear_layer_norm_act_backward(
    grad: Tensor,
    input: Tensor | None,
    weight: Tensor,
    product: Tensor,
    stats: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    act: str | None,
    needs: list[bool],
) -> Gradients:
    from fusedres.kernels.layer_norm import ColumnSums, layer_norm_bwd

    dy = _rows(grad)
    shape = (*grad.shape[:-1], weight.shape[1])
    gradients = _gradients(shape, weight.dtype, ln_weight, ln_bias, weight, needs)
    dx, d_ln_weight, d_ln_bias, d_weight, d_bias = (t if t.numel() else None for t in gradients)
    dz = None if dx is None and d_weight is None and d_bias is None else torch.empty_like(product)
    summed = product.shape[1] <= tiling.MAX_SUMMED
    layer_norm_bwd(
        dy, product, stats, contiguous(ln_weight), contiguous(ln_bias), act, dz, None,
        ColumnSums(d_ln_weight, d_ln_bias, d_bias if summed else None),
    )  # fmt: skip
    if dz is not None:
        if dx is not None:
            torch.mm(dz, weight, out=_rows(dx))
        if d_weight is not None and input is not None:
            torch.mm(dz.t(), _rows(input), out=d_weight)
        if d_bias is not None and not summed:
            torch.sum(dz, 0, out=d_bias)
    return gradients


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """The vendor's product."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _rows(tensor: Tensor) -> Tensor:
    """[M, features], dense; a view where it can be one."""
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def _gradients(
    shape: Sequence[int],
    dtype: torch.dtype,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    weight: Tensor,
    needs: list[bool],
) -> Gradients:
    """Uninitialised gradients of an input of ``shape``, ln_weight, ln_bias, weight and bias; empty if not needed."""
    needs_input, needs_ln_weight, needs_ln_bias, needs_weight, needs_bias = needs

    def like(tensor: Tensor | None, shape: Any, needed: bool) -> Tensor:
        tensor = weight if tensor is None else tensor
        return tensor.new_empty(shape if needed else 0)

    return (
        weight.new_empty(shape if needs_input else 0, dtype=dtype),
        like(ln_weight, None if ln_weight is None else ln_weight.shape, needs_ln_weight),
        like(ln_bias, None if ln_bias is None else ln_bias.shape, needs_ln_bias),
        like(weight, weight.shape, needs_weight),
        like(weight, weight.shape[:1], needs_bias),
    )


def _fake_layer_norm_linear_act(input: Tensor, ln_weight: Any, ln_bias: Any, weight: Tensor, *args: Any):
    reserve_counters(input.device)  # for the backward
    stats = input.new_empty((2, input.numel() // input.shape[-1]) if args[-1] else 0, dtype=torch.float32)
    return weight.new_empty((*input.shape[:-1], weight.shape[0])), stats


def _fake_layer_norm_linear_act_backward(
    grad: Tensor, input: Tensor, out: Any, stats: Any, ln_weight: Any, ln_bias: Any, weight: Tensor, needs: list[bool]
) -> Gradients:
    return _gradients(input.shape, input.dtype, ln_weight, ln_bias, weight, needs)


def _fake_linear_layer_norm_act(
    input: Tensor, weight: Tensor, bias: Any, ln_weight: Any, ln_bias: Any, residual: Tensor | None,
    dtype: torch.dtype, *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, features = input.numel() // input.shape[-1], weight.shape[0]
    dtype = dtype if residual is None else torch.promote_types(dtype, residual.dtype)
    return (
        input.new_empty((*input.shape[:-1], features), dtype=dtype),
        input.new_empty((rows, features) if args[-1] else 0),
        input.new_empty((2, rows) if args[-1] else 0, dtype=torch.float32),
    )


def _fake_linear_layer_norm_act_backward(
    grad: Tensor, input: Any, weight: Tensor, product: Any, stats: Any, ln_weight: Any, ln_bias: Any, act: Any,
    needs: list[bool],
) -> Gradients:  # fmt: skip
    return _gradients((*grad.shape[:-1], weight.shape[1]), weight.dtype, ln_weight, ln_bias, weight, needs)


class _LayerNormLinearAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: Any, *args: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, stats = operator(*args)
        input, ln_weight, ln_bias, weight, _, _, act, *_ = args
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(stats)
        # The output's sign is that of the ReLU's input.
        ctx.save_for_backward(input, None if act is None else out, stats, ln_weight, ln_bias, weight)
        return out, stats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        needs = ctx.needs_input_grad[1:6]
        rest = (None,) * (len(ctx.needs_input_grad) - 6)
        if grads[0] is None:
            return None, None, None, None, None, None, *rest
        gradients = torch.ops.fusedres.layer_norm_linear_act_backward(grads[0], *ctx.saved_tensors, needs)
        return None, *(grad if needed else None for grad, needed in zip(gradients, needs, strict=True)), *rest


class _LinearLayerNormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, product, stats = operator(*args)
        input, weight, _, ln_weight, ln_bias, residual, _, _, act, *_ = args
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(product, stats)
        # A frozen weight needs no input, as in eager.
        ctx.save_for_backward(input if ctx.needs_input_grad[2] else None, weight, product, stats, ln_weight, ln_bias)
        ctx.act, ctx.residual_dtype = act, None if residual is None else residual.dtype
        return out, product, stats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        needs_input, needs_weight, needs_bias, needs_ln_weight, needs_ln_bias, needs_residual = (
            ctx.needs_input_grad[1:7]
        )  # fmt: skip
        rest = (None,) * (len(ctx.needs_input_grad) - 7)
        grad = grads[0]
        if grad is None:
            return None, None, None, None, None, None, None, *rest
        needs = [needs_input, needs_ln_weight, needs_ln_bias, needs_weight, needs_bias]
        d_input = d_ln_weight = d_ln_bias = d_weight = d_bias = None
        if any(needs):
            d_input, d_ln_weight, d_ln_bias, d_weight, d_bias = (
                gradient if needed else None
                for gradient, needed in zip(
                    torch.ops.fusedres.linear_layer_norm_act_backward(grad, *ctx.saved_tensors, ctx.act, needs),
                    needs,
                    strict=True,
                )
            )
        d_residual = grad.to(ctx.residual_dtype) if needs_residual else None  # it is added last
        return None, d_input, d_weight, d_bias, d_ln_weight, d_ln_bias, d_residual, *rest


register(
    "layer_norm_linear_act(Tensor input, Tensor? ln_weight, Tensor? ln_bias, Tensor weight, Tensor? bias, float eps, "
    "str? act, bool tf32, bool save_for_backward) -> (Tensor out, Tensor stats)",
    _layer_norm_linear_act,
    _fake_layer_norm_linear_act,
    _LayerNormLinearAct,
)
register(
    "layer_norm_linear_act_backward(Tensor grad, Tensor input, Tensor? out, Tensor stats, Tensor? ln_weight, "
    "Tensor? ln_bias, Tensor weight, bool[5] needs) -> (Tensor grad_input, Tensor grad_ln_weight, "
    "Tensor grad_ln_bias, Tensor grad_weight, Tensor grad_bias)",
    _layer_norm_linear_act_backward,
    _fake_layer_norm_linear_act_backward,
)
register(
    "linear_layer_norm_act(Tensor input, Tensor weight, Tensor? bias, Tensor? ln_weight, Tensor? ln_bias, "
    "Tensor? residual, ScalarType dtype, float eps, str? act, bool tf32, bool save_for_backward) "
    "-> (Tensor out, Tensor product, Tensor stats)",
    _linear_layer_norm_act,
    _fake_linear_layer_norm_act,
    _LinearLayerNormAct,
)
register(
    "linear_layer_norm_act_backward(Tensor grad, Tensor? input, Tensor weight, Tensor product, Tensor stats, "
    "Tensor? ln_weight, Tensor? ln_bias, str? act, bool[5] needs) -> (Tensor grad_input, Tensor grad_ln_weight, "
    "Tensor grad_ln_bias, Tensor grad_weight, Tensor grad_bias)",
    _linear_layer_norm_act_backward,
    _fake_linear_layer_norm_act_backward,
)
