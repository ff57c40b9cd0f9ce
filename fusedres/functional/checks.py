"""What the fused functions refuse, before anything is launched."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.norm import Norm
from fusedres.ops import autocasts, is_known
from fusedres.reference import Extent

ACTIVATIONS = (None, "relu")


def needs_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def check_batch_norm(
    input: Tensor,
    norm: Norm,
    residual: Tensor | None,
    act: str | None,
    *,
    shared: bool = False,
    dtype: torch.dtype | None = None,
    name: str = "input",
    prefix: str = "",
) -> None:
    """Raise TypeError or ValueError, naming the argument and the value, before anything is launched.

    ``dtype``: of the sum where it is input + residual that is normalised. ``shared``: other ranks have values too.
    ``name``: of ``input``; ``prefix``: of what ``norm`` holds.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {ACTIVATIONS}, got {act!r}")
    if not input.is_floating_point():
        raise TypeError(f"{name} must be floating-point, got {input.dtype}")
    if input.dim() < 2:
        raise ValueError(f"{name} must have at least 2 dimensions (N, C, *), got shape {tuple(input.shape)}")
    running = f"{prefix}running_mean and {prefix}running_var"
    if (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError(f"{running} must both be given or both be None")
    if norm.running_mean is None and not norm.training:
        raise ValueError(f"{running} must be given when {prefix}training is False")
    size = input.shape[1]
    for field, tensor in zip(norm._fields, norm.tensors, strict=False):
        if tensor is not None:
            _check_vector(prefix + field, tensor, size, input, dtype)
    if residual is not None:
        check_residual(residual, input, input.shape)
        if dtype is not None and dtype.is_complex:
            raise TypeError(f"residual must be floating-point, got {residual.dtype}")
    if norm.training:
        _check_training(input, norm, shared, name, prefix)


def is_usual(input: Tensor, norm: Norm, residual: Tensor | None, act: str | None) -> bool:
    """Whether a call on a CPU is right because it is one of the most common kind, told in as few looks as it takes."""
    mean, var, weight, bias, training, momentum, _, count = norm
    dtype = input.dtype
    if act not in ACTIVATIONS or not dtype.is_floating_point or mean is None or var is None or momentum is None:
        return False
    if weight is None or bias is None or input.dim() < 2:
        return False
    channels = input.size(1)
    for vector in (mean, var, weight, bias):
        if vector.dtype is not dtype or vector.dim() != 1 or vector.numel() != channels or not vector.is_cpu:
            return False
    if residual is not None and (residual.dtype is not dtype or not residual.is_cpu or residual.shape != input.shape):
        return False
    if not training:
        return True
    counts = count is None or (count.dtype is torch.int64 and count.is_cpu and count.numel() == 1)
    return counts and 0 < channels < input.numel()


def _check_training(input: Tensor, norm: Norm, shared: bool, name: str, prefix: str) -> None:
    if not shared and input.shape[1] != 0:
        if is_known(input.numel() == input.shape[1]):
            shape = tuple(input.shape)
            raise ValueError(f"{name} must have more than 1 value per channel when training, got shape {shape}")
        if torch.compiler.is_compiling():
            torch._check(input.numel() != input.shape[1])  # where it is open: raises when the data is there
    count = norm.num_batches_tracked
    if count is not None:
        if count.numel() != 1 or count.is_floating_point():
            raise ValueError(f"{prefix}num_batches_tracked must be one integer, got {count!r}")
        _check_device(f"{prefix}num_batches_tracked", count, input)
    elif norm.momentum is None and norm.running_mean is not None:
        raise ValueError(f"{prefix}momentum=None (the cumulative average) needs {prefix}num_batches_tracked")


class Geometry(NamedTuple):
    """How a convolution moves over its input."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def check_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    dtype: torch.dtype | None = None,
) -> Geometry | None:
    """The geometry of a convolution of what looks like ``input``; ``None`` where it pads one side more than the other.

    ``dtype``: of the sum where it is input + residual that is normalised.

    Raises:
        RuntimeError: what PyTorch's own convolution refuses, in its words.
    """
    strides, dilations = _pair(stride), _pair(dilation)
    both: list[int] = []  # sides together
    if padding == "same" and strides == [1, 1]:
        both = [step * (size - 1) for step, size in zip(dilations, weight.shape[2:], strict=False)]
    elif not isinstance(padding, str):
        both = [2 * pads for pads in _pair(padding)]
    elif padding == "valid":
        both = [0, 0]
    geometry = Geometry(strides, [pads // 2 for pads in both], dilations, groups)
    if not _convolves(input, weight, bias, geometry, dtype or input.dtype):
        F.conv2d(input.detach().to(dtype or input.dtype), weight, bias, stride, padding, dilation, groups)  # pyright: ignore[reportArgumentType]
        return None
    return None if any(pads % 2 for pads in both) else geometry


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else [*value] * (2 if len(value) == 1 else 1)


def _convolves(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, dtype: torch.dtype) -> bool:
    """Whether PyTorch's own convolution takes an input of this shape and device, and of ``dtype``."""
    stride, padding, dilation, groups = geometry
    casts = autocasts(input)
    for parameter in (weight,) if bias is None else (weight, bias):
        if parameter.device != input.device or not (parameter.dtype == dtype or casts):
            return False
    if not all(len(pair) == 2 for pair in geometry[:3]) or min(*stride, *dilation, groups) < 1 or min(padding) < 0:
        return False
    if weight.dim() != 4 or weight.shape[1] * groups != input.shape[1] or weight.shape[0] % groups != 0:
        return False
    reach = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
    extents = zip(input.shape[2:], padding, reach, strict=True)
    fits = all(not is_known(extent + 2 * pads <= over) for extent, pads, over in extents)
    return fits and (bias is None or bias.shape == weight.shape[:1])


class Pooling(NamedTuple):
    """The arguments of :func:`torch.nn.functional.max_pool2d` behind ``input``, by rows and columns."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool


def check_pooling(
    input: Tensor,
    kernel_size: Extent,
    stride: Extent | None,
    padding: Extent,
    dilation: Extent,
    ceil_mode: bool,
) -> Pooling:
    """The arguments as pairs.

    Raises:
        ValueError: what PyTorch refuses too, naming the argument and the value.
    """
    if input.dim() != 4:
        raise ValueError(f"input must have 4 dimensions (N, C, H, W), got shape {tuple(input.shape)}")
    window: Any = (kernel_size, stride, padding, dilation)
    if list in map(type, window):  # which cannot be looked up
        window = tuple(tuple(value) if isinstance(value, list) else value for value in window)
    pooling, (height, width) = _pooling(*window, ceil_mode)
    if is_known((input.shape[2] < height) | (input.shape[3] < width)):
        raise ValueError(f"input of shape {tuple(input.shape)} is smaller than the window {kernel_size!r}")
    return pooling


@functools.lru_cache(256, typed=True)
def _pooling(
    kernel_size: Extent, stride: Extent | None, padding: Extent, dilation: Extent, ceil_mode: bool
) -> tuple[Pooling, list[int]]:
    """The arguments as pairs, and the least rows and columns that an input has."""
    kernel = _window("kernel_size", kernel_size, 1)
    steps = kernel if stride is None else _window("stride", stride, 1)
    pads, apart = _window("padding", padding, 0), _window("dilation", dilation, 1)
    least = []
    for size, step, pad, gap in zip(kernel, steps, pads, apart, strict=True):
        extent = gap * (size - 1) + 1
        if 2 * pad > extent:
            raise ValueError(f"padding must be at most half of the window {extent}, got {padding!r}")
        least.append(extent - 2 * pad - (step - 1 if ceil_mode else 0))
    return Pooling(kernel, steps, pads, apart, bool(ceil_mode)), least


def _window(name: str, value: Extent, least: int) -> tuple[int, int]:
    pair = tuple(_pair(value))
    if len(pair) != 2 or any(not isinstance(item, int) or item < least for item in pair):
        raise ValueError(f"{name} must be one or two integers of at least {least}, got {value!r}")
    return pair


def check_linear(input: Tensor, weight: Tensor, bias: Tensor | None, act: str | None) -> None:
    """Raise TypeError or ValueError for what a linear map and its normalisation have in common."""
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {ACTIVATIONS}, got {act!r}")
    if not input.is_floating_point():
        raise TypeError(f"input must be floating-point, got {input.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight must have 2 dimensions (N, K), got shape {tuple(weight.shape)}")
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(f"input must have shape (*, {weight.shape[1]}), got {tuple(input.shape)}")
    if weight.dtype != input.dtype and not (autocasts(input) and weight.is_floating_point()):
        raise TypeError(f"weight must be of input's dtype {input.dtype}, got {weight.dtype}")
    _check_device("weight", weight, input)
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
        if bias.dtype != weight.dtype and not (autocasts(input) and bias.is_floating_point()):
            raise TypeError(f"bias must be of weight's dtype {weight.dtype}, got {bias.dtype}")
        _check_device("bias", bias, input)


def check_layer_norm(ln_weight: Tensor | None, ln_bias: Tensor | None, size: int, input: Tensor) -> None:
    for name, tensor in (("ln_weight", ln_weight), ("ln_bias", ln_bias)):
        if tensor is not None:
            odd = tensor.dtype not in (torch.float32, input.dtype)
            autocast = odd and tensor.is_floating_point() and autocasts(input)
            _check_vector(name, tensor, size, input, tensor.dtype if autocast else None)
    if ln_weight is not None and ln_bias is not None and ln_weight.dtype != ln_bias.dtype:
        raise TypeError(f"ln_bias must be of ln_weight's dtype {ln_weight.dtype}, got {ln_bias.dtype}")


def _check_vector(name: str, tensor: Tensor, size: int, input: Tensor, dtype: torch.dtype | None = None) -> None:
    """``dtype``: of what is normalised, where it is not ``input``'s."""
    if tensor.dim() != 1 or tensor.shape[0] != size:
        raise ValueError(f"{name} must have shape ({size},), got {tuple(tensor.shape)}")
    if tensor.dtype is not torch.float32 and tensor.dtype is not (dtype or input.dtype):
        whose = "input's dtype" if dtype is None else "the sum's dtype"
        raise TypeError(f"{name} must be float32 or of {whose} {dtype or input.dtype}, got {tensor.dtype}")
    _check_device(name, tensor, input)


def check_residual(residual: Tensor, input: Tensor, shape: torch.Size, name: str = "residual") -> None:
    if residual.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(residual.shape)}")
    if not (residual.is_floating_point() or residual.is_complex()):
        raise TypeError(f"{name} must be floating-point, got {residual.dtype}")
    _check_device(name, residual, input)


def _check_device(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        raise ValueError(f"{name} must be on {input.device}, got {tensor.device}")
