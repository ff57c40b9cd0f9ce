"""The specification of every fused function, written in eager PyTorch.

It is the path taken on devices and for dtypes that no kernel covers, and what the kernels are tested against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.norm import Norm

Extent: TypeAlias = "int | list[int] | tuple[int, ...]"  # of a window, in rows and columns


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    act: str | None = None,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """``act(batch_norm(input) + residual)``; arguments as :func:`fusedres.functional.batch_norm_act`."""
    norm = Norm(running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    return normalise(input, norm, residual=residual, act=act)


def normalise(input: Tensor, norm: Norm, *, residual: Tensor | None = None, act: str | None = None) -> Tensor:
    """:func:`batch_norm_act` with its arguments in one piece, as what follows."""
    mean, var, weight, bias, training, momentum, eps, count = norm
    if training and count is not None:
        count.add_(1)
    if momentum is None:
        # The cumulative average; like PyTorch's own module, this reads the counter on the host.
        momentum = 1.0 / float(count) if training and count is not None else 0.0
    # PyTorch's own function refuses such an eps; and where it is captured, its patterns are found again.
    if eps <= 0 or torch.compiler.is_dynamo_compiling():
        out = F.batch_norm(input, mean, var, weight, bias, training, momentum, eps)
        out = out if residual is None else out + residual
        return torch.relu_(out) if act == "relu" else out
    # F.batch_norm without its check, which the fused functions have made.
    cudnn = not input.is_cpu and torch.backends.cudnn.enabled
    out = torch.batch_norm(input, weight, bias, mean, var, training, momentum, eps, cudnn)
    if residual is not None:
        # Nobody else has seen `out`, and the backward of a normalisation does not read it.
        out = out.add_(residual) if _adds_in_place(out, residual) else out + residual
    return out.relu_() if act == "relu" else out


def _adds_in_place(out: Tensor, residual: Tensor) -> bool:
    """Whether ``out += residual`` is ``out + residual``; not where another kind of tensor or a transform decides."""
    return (
        type(out) is type(residual) is Tensor
        and out.dtype is residual.dtype
        and out.shape == residual.shape
        and not torch._C._are_functorch_transforms_active()
    )


def batch_norm_act_global_avg_pool2d(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    act: str | None = None,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """:func:`batch_norm_act` averaged over H and W, as
    :func:`fusedres.functional.batch_norm_act_global_avg_pool2d`."""
    out = batch_norm_act(
        input, running_mean, running_var, weight, bias, training, momentum, eps,
        residual=residual, act=act, num_batches_tracked=num_batches_tracked,
    )  # fmt: skip
    return F.adaptive_avg_pool2d(out, 1)


def add_batch_norm_act(
    input: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    act: str | None = None,
    num_batches_tracked: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(s, act(batch_norm(s)))`` of ``s = input + residual``, as :func:`fusedres.functional.add_batch_norm_act`."""
    norm = Norm(running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    return add_normalise(input, residual, norm, act=act)


def add_normalise(input: Tensor, residual: Tensor, norm: Norm, *, act: str | None = None) -> tuple[Tensor, Tensor]:
    """:func:`add_batch_norm_act`."""
    total = input + residual
    return total, normalise(total, norm, act=act)


def batch_norm_act_conv2d(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    act: str | None = "relu",
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """``conv2d(act(batch_norm(input)))``; arguments as :func:`fusedres.functional.batch_norm_act_conv2d`."""
    out = batch_norm_act(
        input, running_mean, running_var, weight, bias, training, momentum, eps,
        act=act, num_batches_tracked=num_batches_tracked,
    )  # fmt: skip
    return F.conv2d(out, conv_weight, conv_bias, stride, padding, dilation, groups)  # pyright: ignore[reportArgumentType]


def add_batch_norm_act_conv2d(
    input: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """``(s, conv2d(act(batch_norm(s))))`` of ``s = input + residual``, options as :func:`batch_norm_act_conv2d`."""
    total = input + residual
    return total, batch_norm_act_conv2d(
        total, running_mean, running_var, weight, bias, training, momentum, eps, **options
    )  # fmt: skip


def batch_norm_act_max_pool2d(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    act: str | None = "relu",
    kernel_size: Extent = 3,
    stride: Extent | None = 2,
    padding: Extent = 1,
    dilation: Extent = 1,
    ceil_mode: bool = False,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """``max_pool2d(act(batch_norm(input)))``, as :func:`fusedres.functional.batch_norm_act_max_pool2d`."""
    norm = Norm(running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    return normalise_max_pool2d(input, norm, (kernel_size, stride, padding, dilation, ceil_mode), act=act)


def normalise_max_pool2d(input: Tensor, norm: Norm, window: tuple[Any, ...], *, act: str | None = None) -> Tensor:
    """:func:`batch_norm_act_max_pool2d`."""
    return F.max_pool2d(normalise(input, norm, act=act), *window)


def batch_norm_add_batch_norm_act(
    input: Tensor, other: Tensor, norm: Norm, other_norm: Norm, *, act: str | None = None
) -> Tensor:
    """``act(batch_norm(input) + batch_norm(other))``, ``input`` first.

    Arguments as :func:`fusedres.functional.batch_norm_add_batch_norm_act`.
    """
    return normalise(other, other_norm, residual=normalise(input, norm), act=act)


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
    """``act(linear(layer_norm(input)))``; arguments as :func:`fusedres.functional.layer_norm_linear_act`."""
    out = F.linear(F.layer_norm(input, weight.shape[1:], ln_weight, ln_bias, eps), weight, bias)
    return torch.relu_(out) if act == "relu" else out


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
    """``act(layer_norm(linear(input))) + residual``, as :func:`fusedres.functional.linear_layer_norm_act`."""
    out = F.layer_norm(F.linear(input, weight, bias), weight.shape[:1], ln_weight, ln_bias, eps)
    if act == "relu":
        out = torch.relu_(out)
    return out if residual is None else out + residual


# The steps of sync_batch_norm_act, between which ranks exchange messages; the kernels have the same.


def sync_moments(input: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """([2C + 1] of mean, M2 and count, s = input + residual); ``s`` is empty without a residual."""
    s = input.new_empty(0) if residual is None else input + residual
    x = _wide(input if residual is None else s)
    count = x.numel() // x.shape[1]
    if count == 0:
        return x.new_zeros(2 * x.shape[1] + 1), s
    var, mean = torch.var_mean(x, _rows(x), correction=0)
    return torch.cat((mean, var * count, x.new_full((1,), count))), s


def sync_merge(messages: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """([4, C] of mean, rstd, scale and shift, [2, C] of 1/count and rstd/count) of ``messages`` [ranks, 2C + 1].

    Chan et al. (1983), over all ranks at once. Updates the running statistics.
    """
    running_mean, running_var, weight, bias, _, momentum, eps, num_batches_tracked = norm
    channels = messages.shape[1] // 2
    means, m2, count = messages.split((channels, channels, 1), 1)
    total = count.sum()
    mean = (count * means).sum(0) / total
    mean = mean + (count * (means - mean)).sum(0) / total
    var = (m2 + count * (means - mean).square()).sum(0) / total
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if running_mean is not None and running_var is not None:
        factor: Tensor | float = 0.0 if momentum is None else momentum
        if momentum is None and num_batches_tracked is not None:
            factor = 1 / num_batches_tracked.to(messages.dtype)
        for running, new in ((running_mean, mean), (running_var, var * (total / (total - 1)))):
            running.copy_(torch.where(total > 0, factor * new + (1 - factor) * running, running))
    rstd = (var + eps).rsqrt()
    scale = rstd if weight is None else rstd * weight
    shift = torch.zeros_like(rstd) if bias is None else bias.to(rstd.dtype)
    inverse = torch.stack((torch.ones_like(rstd), rstd)) / total
    return torch.stack((mean, rstd, scale, shift)), inverse


def sync_normalise(
    input: Tensor, residual: Tensor | None, stats: Tensor, act: str | None, save_for_backward: bool
) -> tuple[Tensor, Tensor]:
    """(act(bn(input) + residual), where the ReLU was open)."""
    mean, _, scale, shift = _broadcast(stats, input)
    z = (_wide(input) - mean) * scale + shift
    dtype = input.dtype
    if residual is not None:
        z = z + residual
        dtype = torch.promote_types(dtype, residual.dtype)
    z = z.to(dtype)
    if act is None:
        return z, z.new_empty(0, dtype=torch.bool)
    return torch.relu(z), ~(z <= 0)


def sync_reduce(
    grad: Tensor, input: Tensor, stats: Tensor, mask: Tensor, act: str | None, residual_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """([2, C] of Σg and rstd·Σg·(x − mean), g = grad where the ReLU was open; empty without a dtype)."""
    mean, rstd, _, _ = _broadcast(stats, input)
    g = _open(grad, mask, act).to(stats.dtype)
    sums = torch.stack((g.sum(_rows(g)), (g * ((_wide(input) - mean) * rstd)).sum(_rows(g))))
    return sums, grad.new_empty(0) if residual_dtype is None else g.to(residual_dtype)


def sync_gradient(
    grad: Tensor,
    grad_sum: Tensor | None,
    input: Tensor,
    stats: Tensor,
    means: Tensor,
    mask: Tensor,
    act: str | None,
) -> Tensor:
    """scale·(g − mean of g − (x − mean)·rstd²·mean of g·(x − mean)), with ``grad_sum`` added."""
    mean, _, scale, _ = _broadcast(stats, input)
    mean_g, mean_gx = _broadcast(means, input)
    dx = scale * (_open(grad, mask, act).to(stats.dtype) - mean_g - (_wide(input) - mean) * mean_gx)
    return (dx if grad_sum is None else dx + grad_sum).to(input.dtype)


def _wide(x: Tensor) -> Tensor:
    """In the dtype that statistics have."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rows(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _broadcast(vectors: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """The rows of ``vectors`` [*, C], each against the channels of ``x``."""
    return vectors.view(-1, x.shape[1], *(1 for _ in range(x.dim() - 2))).unbind()


def _open(grad: Tensor, mask: Tensor, act: str | None) -> Tensor:
    return grad if act is None else torch.where(mask, grad, 0)
