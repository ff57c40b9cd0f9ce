"""What rewritten forwards call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from fusedres.functional import (
    Norm,
    add_normalise,
    autocasts,
    batch_norm_act_conv2d,
    batch_norm_act_global_avg_pool2d,
    batch_norm_add_batch_norm_act,
    forked_batch_norm_act,
    forked_batch_norm_add_batch_norm_act,
    layer_norm_linear_act,
    linear_layer_norm_act,
    normalise,
    normalise_max_pool2d,
    takes_reference,
)
from fusedres.fusion.foreign import computes_one_norm, is_timms, timms_act
from fusedres.nn import BatchNormAct2d, batch_norm_state

# A layer is a module, whose tensors are read at each call, or what its function takes after the input.
BatchNorm: TypeAlias = "nn.BatchNorm2d | Norm"
Linear: TypeAlias = "nn.Linear | tuple[Tensor, Tensor | None]"
LayerNorm: TypeAlias = "nn.LayerNorm | tuple[Sequence[int], Tensor | None, Tensor | None, float]"
MaxPool: TypeAlias = "nn.MaxPool2d | tuple[Any, ...]"  # kernel_size, stride, padding, dilation, ceil_mode
FORK, POOL = "fork", "pool"  # how a value ends, see norm_act()
OWN_ACT = "own"  # the activation of the BatchNormAct2d that is called


def batch_norm(input: Tensor, norm: Norm, act: str | None = None, residual: Tensor | None = None) -> Tensor:
    """``act(norm(input) + residual)`` in one operation."""
    return normalise(input, Norm(*norm), residual, act)


def norm_act(
    norm: BatchNorm, input: Tensor, residual: Any, act: str | None, changes: str | None = None, ends: str | None = None
) -> Any:
    """``act(norm(input) + residual)`` with eager's result, fused where the addition neither broadcasts nor casts.

    Args:
        residual: ``None`` where nothing is added.
        changes: the operand that the addition changed in place, ``"norm"`` or ``"residual"``, if any: its dtype is the
            result's.
        ends: how the result is given: as it is (``None``), under two names (``FORK``) or averaged (``POOL``).
    """
    if residual is not None and not _can_add(input, residual, changes):
        out = _add(_normalise(norm, input, None, None), residual, changes)
        return _end(torch.relu(out) if _act(norm, act) == "relu" else out, ends)
    if ends is None or not _is_plain(norm) or (ends == POOL and input.dim() != 4):
        return _end(_normalise(norm, input, residual, act), ends)
    state, act = _state(norm, input), _act(norm, act)
    if ends == FORK:
        return forked_batch_norm_act(input, state, residual=residual, act=act)
    return batch_norm_act_global_avg_pool2d(
        input, *state[:7], residual=residual, act=act, num_batches_tracked=state[7]
    )  # fmt: skip


def norm_add_norm(
    norm: BatchNorm,
    input: Tensor,
    other_norm: BatchNorm,
    other: Tensor,
    act: str | None,
    changes: str | None = None,
    ends: str | None = None,
) -> Any:
    """``act(norm(input) + other_norm(other))`` with eager's result; ``changes`` and ``ends`` as in :func:`norm_act`."""
    plain = _is_plain(norm) and _is_plain(other_norm)
    if not plain or input.shape != other.shape or input.dtype != other.dtype or input.device != other.device:
        return norm_act(norm, input, _normalise(other_norm, other, None, None), act, changes, ends)
    arguments = input, other, _state(norm, input), _state(other_norm, other)
    if ends == FORK:
        return forked_batch_norm_add_batch_norm_act(*arguments, act=_act(norm, act))
    return batch_norm_add_batch_norm_act(*arguments, act=_act(norm, act))


def norm_max_pool(norm: BatchNorm, input: Tensor, act: str | None, pool: MaxPool, ends: str | None = None) -> Any:
    """``pool(act(norm(input)))`` with eager's result; ``ends`` as in :func:`norm_act`."""
    indices = isinstance(pool, nn.MaxPool2d) and pool.return_indices
    if not _is_plain(norm) or input.dim() != 4 or indices:
        out = _normalise(norm, input, None, act)
        return _end(pool(out) if isinstance(pool, nn.MaxPool2d) else F.max_pool2d(out, *pool), ends)
    if isinstance(pool, nn.MaxPool2d):
        pool = pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
    both = normalise_max_pool2d(input, _state(norm, input), _act(norm, act), pool, fork=ends == FORK)
    return both if ends == FORK else both[0]


def norm_conv(norm: BatchNorm, input: Tensor, act: str | None, conv: nn.Conv2d) -> Tensor:
    """``conv(act(norm(input)))``; the convolution's input is not kept for the backward but computed again."""
    if not _is_plain(norm) or input.dim() != 4 or conv.padding_mode != "zeros":
        return conv(_normalise(norm, input, None, act))
    state = _state(norm, input)
    return batch_norm_act_conv2d(
        input, *state[:7], act=act, conv_weight=conv.weight, conv_bias=conv.bias, stride=conv.stride,
        padding=conv.padding, dilation=conv.dilation, groups=conv.groups, num_batches_tracked=state[7],
    )  # fmt: skip


def add_norm(norm: BatchNorm, input: Any, residual: Any, in_place: bool, act: str | None) -> tuple[Tensor, Tensor]:
    """``(s, act(norm(s)))`` of ``s = input + residual``, or ``input += residual``, with eager's result."""
    fused = (
        isinstance(input, Tensor)
        and isinstance(residual, Tensor)
        and input.shape == residual.shape
        and input.device == residual.device
        and input.is_floating_point()
        and residual.is_floating_point()
        # The statistics may be of the sum's dtype.
        and (input.dtype == residual.dtype or (not in_place and _is_single(norm)))
    )
    if fused and isinstance(norm, BatchNormAct2d):
        return norm.add(input, residual, act=act)
    if fused and (isinstance(norm, tuple) or computes_one_norm(norm)):
        return add_normalise(input, residual, _state(norm, input), _act(norm, act))
    if in_place:
        input += residual
    else:
        input = input + residual
    return input, _normalise(norm, input, None, act)


def _is_single(norm: nn.BatchNorm2d | Norm) -> bool:
    vectors = norm[:4] if isinstance(norm, tuple) else (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return all(vector is None or vector.dtype == torch.float32 for vector in vectors)


def norm_and_linear(
    input: Tensor,
    norm: LayerNorm,
    linear: Linear,
    norm_first: bool,
    act: str | None,
    residual: Any = None,
    changes: str | None = None,
) -> Tensor:
    """``act(linear(norm(input)))``, or the other way round and ``+ residual``, with eager's result.

    Fused where tensors and shapes are the usual ones; ``changes`` as in :func:`norm_act`.
    """
    if not isinstance(input, Tensor) or takes_reference(input) or not _is_usual(input, norm, linear, norm_first):
        out = _layer(linear, _layer(norm, input)) if norm_first else _layer(norm, _layer(linear, input))
        out = out if act is None else out.relu_() if type(out) is Tensor else torch.relu(out)  # nobody else has seen it
        return out if residual is None else _add(out, residual, changes)
    (_, ln_weight, ln_bias, eps), (weight, bias) = _arguments(norm), _arguments(linear)
    if norm_first:
        return layer_norm_linear_act(input, ln_weight, ln_bias, weight, bias, eps=eps, act=act)
    fits = (
        isinstance(residual, Tensor)
        and residual.shape == (*input.shape[:-1], weight.shape[0])
        and residual.device == input.device
        and residual.is_floating_point()
        # Under autocast the dtype of what is added to is not the input's.
        and (changes is None or (residual.dtype == input.dtype and not autocasts(input)))
    )
    out = linear_layer_norm_act(
        input, weight, bias, ln_weight, ln_bias, eps=eps, act=act, residual=residual if fits else None
    )  # fmt: skip
    return out if fits or residual is None else _add(out, residual, changes)


def linear_shape(input: Tensor, linear: Linear) -> Tensor:
    """A tensor of the shape and device of ``linear(input)``, for those who ask for no more; it takes no memory."""
    if not isinstance(input, Tensor):  # a symbolic trace has no dimensions yet
        return _layer(linear, input)
    return input.new_empty(()).expand(*input.shape[:-1], *_arguments(linear)[0].shape[:-1])


def is_plain(tensor: Tensor) -> bool:
    """Whether it is an ordinary tensor, or stands for one in a trace; others are quantized, sharded or the like."""
    return type(tensor) in (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)


def _is_plain(norm: BatchNorm) -> bool:
    """Whether the functions that span more than one layer take it; one that ranks share is on its own."""
    if isinstance(norm, tuple) or type(norm) is BatchNormAct2d:
        return True
    return computes_one_norm(norm) and timms_act(norm) is None


def _state(norm: BatchNorm, input: Tensor) -> Norm:
    return Norm(*norm) if isinstance(norm, tuple) else batch_norm_state(norm, input)


def _act(norm: BatchNorm, act: str | None) -> str | None:
    if act != OWN_ACT:
        return act
    if isinstance(norm, BatchNormAct2d):
        return norm.act
    return timms_act(norm) if is_timms(norm) else None  # pyright: ignore[reportArgumentType]


def _end(out: Tensor, ends: str | None) -> Any:
    if ends == FORK:
        return out, out
    return F.adaptive_avg_pool2d(out, 1) if ends == POOL else out


def _normalise(norm: BatchNorm, input: Tensor, residual: Tensor | None, act: str | None) -> Tensor:
    """``act(norm(input) + residual)`` by the layer's own function."""
    if isinstance(norm, tuple) or _is_plain(norm):
        return normalise(input, _state(norm, input), residual, _act(norm, act))
    if is_timms(norm):
        out = norm(input) if residual is None else norm(input) + residual
        return torch.relu(out) if act == "relu" else out
    # By keyword: a normalisation that knows neither raises.
    given: dict[str, Any] = {} if residual is None else {"residual": residual}
    if act != OWN_ACT and (act is not None or getattr(norm, "act", None) is not None):
        given["act"] = act
    return norm(input, **given)


def _can_add(input: Tensor, residual: Any, changes: str | None) -> bool:
    return (
        isinstance(residual, Tensor)
        and residual.shape == input.shape
        and residual.device == input.device
        and (residual.dtype == input.dtype or (changes is None and residual.is_floating_point()))
    )


def _add(out: Tensor, residual: Any, changes: str | None) -> Tensor:
    if changes == "norm":
        out += residual
        return out
    return out + residual if changes is None else residual.clone().add_(out)


def _layer(layer: Linear | LayerNorm, input: Tensor) -> Tensor:
    """``layer(input)``, past the call of a module, which nobody watches here."""
    arguments = _arguments(layer)
    return F.linear(input, *arguments) if len(arguments) == 2 else F.layer_norm(input, *arguments)


def _arguments(layer: Linear | LayerNorm) -> Any:
    """What its function takes after the input."""
    if not isinstance(layer, nn.Module):
        return layer
    own = layer._parameters  # past Module.__getattr__, which takes longer than all else here
    both = "weight" in own and "bias" in own
    weight, bias = (own["weight"], own["bias"]) if both else (layer.weight, layer.bias)
    return (weight, bias) if isinstance(layer, nn.Linear) else (layer.normalized_shape, weight, bias, layer.eps)


def _is_usual(input: Tensor, norm: LayerNorm, linear: Linear, norm_first: bool) -> bool:
    """Whether the fused functions take what eager takes; what is unusual, or wrong, is left to eager."""
    (shape, ln_weight, ln_bias, _), (weight, bias) = _arguments(norm), _arguments(linear)
    if input.is_nested or input.dim() == 0 or weight.dim() != 2 or not input.is_floating_point():
        return False
    features = weight.shape[1:] if norm_first else weight.shape[:1]
    if tuple(shape) != tuple(features) or input.shape[-1] != weight.shape[1]:
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
