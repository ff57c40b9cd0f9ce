"""Layer normalisation in front of a linear map or behind one."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import reference
from fusedres.functional.checks import check_layer_norm, check_linear, check_residual, needs_grad
from fusedres.ops import autocast_dtypes, layer_norm_refusal, tf32, use_kernels


def layer_norm_linear_act(
    input: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: str | None = None,
) -> Tensor:
    r"""Layer normalisation over the last dimension, a linear map, then an optional activation.

    .. math:: y = \mathrm{act}(\mathrm{LN}(x)\,W^\top + b), \quad
              \mathrm{LN}(x) = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}}\,\gamma + \beta

    with the normalisation of Ba et al. (2016).

    Args:
        input: ``(*, K)``, any leading shape, any floating dtype.
        ln_weight, ln_bias: gamma and beta, ``(K,)`` or ``None`` (then 1 and 0).
        weight: ``(N, K)``, of ``input``'s dtype, or of any floating dtype under autocast.
        bias: ``(N,)`` or ``None``.
        eps: added to the variance.
        act: ``None`` or ``"relu"``.

    Returns:
        ``(*, N)``, in the dtype that eager PyTorch's sequence gives, under autocast too.

    Raises:
        TypeError: a tensor that is not floating-point, or dtypes that do not fit together.
        ValueError: shapes or devices that do not fit together, or an unknown ``act``.
        RuntimeError: ``FUSEDRES_BACKEND=triton`` and no kernel covers the input.
    """
    check_linear(input, weight, bias, act)
    check_layer_norm(ln_weight, ln_bias, weight.shape[1], input)
    reason = layer_norm_refusal(weight.shape[1])
    if not use_kernels(input, weight, bias, ln_weight, ln_bias, reason=reason):
        return reference.layer_norm_linear_act(input, ln_weight, ln_bias, weight, bias, eps=eps, act=act)
    dtype, _ = autocast_dtypes(input)
    return torch.ops.fusedres.layer_norm_linear_act(
        input, ln_weight, ln_bias, weight.to(dtype), None if bias is None else bias.to(dtype), eps, act, tf32(),
        needs_grad(input, ln_weight, ln_bias, weight, bias),
    )[0]  # fmt: skip


def linear_layer_norm_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    *,
    eps: float = 1e-5,
    act: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    r"""A linear map, layer normalisation of its output, an optional activation, then an optional residual addition.

    .. math:: y = \mathrm{act}(\mathrm{LN}(x W^\top + b)) + \mathrm{residual}

    Args:
        input: ``(*, K)``, any leading shape, any floating dtype.
        weight: ``(N, K)``, of ``input``'s dtype, or of any floating dtype under autocast.
        bias: ``(N,)`` or ``None``.
        ln_weight, ln_bias: gamma and beta, ``(N,)`` or ``None`` (then 1 and 0).
        eps: added to the variance.
        act: ``None`` or ``"relu"``.
        residual: ``(*, N)``; its dtype may differ, the output is promoted as by ``+``.

    Returns:
        ``(*, N)``, in the dtype that eager PyTorch's sequence gives, under autocast too.

    Raises:
        TypeError: a tensor that is not floating-point, or dtypes that do not fit together.
        ValueError: shapes or devices that do not fit together, or an unknown ``act``.
        RuntimeError: ``FUSEDRES_BACKEND=triton`` and no kernel covers the input.
    """
    check_linear(input, weight, bias, act)
    check_layer_norm(ln_weight, ln_bias, weight.shape[0], input)
    if residual is not None:
        check_residual(residual, input, torch.Size((*input.shape[:-1], weight.shape[0])))
    reason = layer_norm_refusal(weight.shape[0])
    if not use_kernels(input, weight, bias, ln_weight, ln_bias, residual, reason=reason):
        return reference.linear_layer_norm_act(
            input, weight, bias, ln_weight, ln_bias, eps=eps, act=act, residual=residual
        )
    dtype, ln_dtype = autocast_dtypes(input)
    return torch.ops.fusedres.linear_layer_norm_act(
        input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), ln_weight, ln_bias, residual,
        ln_dtype, eps, act, tf32(), needs_grad(input, weight, bias, ln_weight, ln_bias, residual),
    )[0]  # fmt: skip
