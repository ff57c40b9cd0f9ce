"""What rewritten forwards call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import _has_any_global_hook

from fusedres.functional import (
    BatchNormState,
    autocasts,
    batch_norm_act,
    layer_norm_linear_act,
    linear_layer_norm_act,
)
from fusedres.fusion.foreign import is_foreign
from fusedres.nn import OWN_NORMS, BatchNormAct2d

# A layer is a module, whose tensors are read at each call, or what its function takes after the input.
BatchNorm: TypeAlias = "BatchNormAct2d | BatchNormState"
Linear: TypeAlias = "nn.Linear | tuple[Tensor, Tensor | None]"
LayerNorm: TypeAlias = "nn.LayerNorm | tuple[Sequence[int], Tensor | None, Tensor | None, float]"


def batch_norm(input: Tensor, norm: BatchNormState, act: str | None = None, residual: Tensor | None = None) -> Tensor:
    """``act(norm(input) + residual)`` in one operation."""
    return batch_norm_act(input, *norm[:7], residual=residual, act=act, num_batches_tracked=norm[7])


def norm_add(norm: BatchNorm, input: Tensor, residual: Any, act: str | None, changes: str | None) -> Tensor:
    """``act(norm(input) + residual)`` with eager's result, fused where the addition neither broadcasts nor casts.

    ``changes`` is the operand that the addition changed in place, ``"norm"`` or ``"residual"``, if any: its dtype
    is the result's.
    """
    if (
        isinstance(residual, Tensor)
        and residual.shape == input.shape
        and residual.device == input.device
        and (residual.dtype == input.dtype or (changes is None and residual.is_floating_point()))
    ):
        if isinstance(norm, tuple):
            return batch_norm(input, norm, act, residual)
        # By keyword: a normalisation that knows neither raises.
        return norm(input, residual=residual, act=act)
    out = _add(batch_norm(input, norm) if isinstance(norm, tuple) else norm(input), residual, changes)
    return torch.relu(out) if act == "relu" else out


def norm_linear(input: Tensor, norm: LayerNorm, linear: Linear, act: str | None) -> Tensor:
    """``act(linear(norm(input)))`` with eager's result, fused where tensors and shapes are the usual ones."""
    (shape, ln_weight, ln_bias, eps), (weight, bias) = _norm_arguments(norm), _linear_arguments(linear)
    if _is_usual(input, weight, bias, weight.shape[1:], shape, ln_weight, ln_bias):
        return layer_norm_linear_act(input, ln_weight, ln_bias, weight, bias, eps=eps, act=act)
    out = _run(linear, _run(norm, input))
    return torch.relu(out) if act == "relu" else out


def linear_norm(input: Tensor, linear: Linear, norm: LayerNorm, act: str | None) -> Tensor:
    """``act(norm(linear(input)))`` with eager's result, fused where tensors and shapes are the usual ones."""
    (weight, bias), (shape, ln_weight, ln_bias, eps) = _linear_arguments(linear), _norm_arguments(norm)
    if _is_usual(input, weight, bias, weight.shape[:1], shape, ln_weight, ln_bias):
        return linear_layer_norm_act(input, weight, bias, ln_weight, ln_bias, eps=eps, act=act)
    out = _run(norm, _run(linear, input))
    return torch.relu(out) if act == "relu" else out


def linear_norm_add(
    input: Tensor, linear: Linear, norm: LayerNorm, act: str | None, residual: Any, changes: str | None
) -> Tensor:
    """``act(norm(linear(input))) + residual`` with eager's result; ``changes`` as in :func:`norm_add`."""
    (weight, bias), (shape, ln_weight, ln_bias, eps) = _linear_arguments(linear), _norm_arguments(norm)
    if (
        _is_usual(input, weight, bias, weight.shape[:1], shape, ln_weight, ln_bias)
        and isinstance(residual, Tensor)
        and residual.shape == (*input.shape[:-1], weight.shape[0])
        and residual.device == input.device
        and residual.is_floating_point()
        # Under autocast the dtype of what is added to is not the input's.
        and (changes is None or (residual.dtype == input.dtype and not autocasts(input)))
    ):
        return linear_layer_norm_act(
            input, weight, bias, ln_weight, ln_bias, eps=eps, act=act, residual=residual
        )  # fmt: skip
    return _add(linear_norm(input, linear, norm, act), residual, changes)


def linear_shape(input: Tensor, linear: Linear) -> Tensor:
    """A tensor of the shape and device of ``linear(input)``, for those who ask for no more; it takes no memory."""
    if not isinstance(input, Tensor):  # a symbolic trace has no dimensions yet
        return _run(linear, input)
    return input.new_empty(()).expand(*input.shape[:-1], *_linear_arguments(linear)[0].shape[:-1])


def is_plain(tensor: Tensor) -> bool:
    """Whether it is an ordinary tensor, or stands for one in a trace; others are quantized, sharded or the like."""
    return type(tensor) in (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)


def is_changed(
    norms: tuple[Any, ...],
    acts: tuple[Any, ...],
    linears: tuple[Any, ...] = (),
    layer_norms: tuple[Any, ...] = (),
    identities: tuple[Any, ...] = (),
) -> bool:
    """Whether a module that was folded, or its forward, has been replaced, or a hook would see the difference."""
    for norm in norms:
        if type(norm) not in OWN_NORMS and not is_foreign(norm):
            return True
    for act in acts:
        if type(act) is not nn.ReLU:
            return True
    for linear in linears:
        if type(linear) is not nn.Linear:
            return True
    for norm in layer_norms:
        if type(norm) is not nn.LayerNorm:
            return True
    for identity in identities:
        if type(identity) is not nn.Identity:
            return True
    for module in norms + acts + linears + layer_norms + identities:
        if "forward" in module.__dict__:
            return True
        # In each forward of each block: is_hooked() without the call.
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return True
    return bool(_has_any_global_hook())


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook would see ``module`` called, or not called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _add(out: Tensor, residual: Any, changes: str | None) -> Tensor:
    if changes == "norm":
        out += residual
        return out
    return out + residual if changes is None else residual.clone().add_(out)


def _run(layer: Linear | LayerNorm, input: Tensor) -> Tensor:
    if isinstance(layer, nn.Module):
        return layer(input)
    return F.linear(input, *layer) if len(layer) == 2 else F.layer_norm(input, *layer)  # pyright: ignore


def _linear_arguments(linear: Linear) -> tuple[Tensor, Tensor | None]:
    return (linear.weight, linear.bias) if isinstance(linear, nn.Module) else linear


def _norm_arguments(norm: LayerNorm) -> tuple[Sequence[int], Tensor | None, Tensor | None, float]:
    return (norm.normalized_shape, norm.weight, norm.bias, norm.eps) if isinstance(norm, nn.Module) else norm


def _is_usual(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    features: torch.Size,
    shape: Sequence[int],
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
) -> bool:
    """Whether the fused functions take what eager takes; what is unusual, or wrong, is left to eager."""
    if not isinstance(input, Tensor) or input.is_nested or weight.dim() != 2 or tuple(shape) != tuple(features):
        return False
    if input.dim() == 0 or input.shape[-1] != weight.shape[1] or not input.is_floating_point():
        return False
    if weight.dtype != input.dtype and not autocasts(input):
        return False
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        return False
    vectors = [vector for vector in (ln_weight, ln_bias) if vector is not None]
    if any(vector.shape != features or vector.dtype not in (torch.float32, input.dtype) for vector in vectors):
        return False
    given = [weight, *vectors] if bias is None else [weight, bias, *vectors]
    return all(is_plain(tensor) and tensor.device == input.device for tensor in given)
