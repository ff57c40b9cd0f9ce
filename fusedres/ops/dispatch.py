"""Which path a tensor takes: the Triton kernels or the eager reference."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.forward_ad import unpack_dual

from fusedres.kernels.layout import MAX_WINDOW
from fusedres.kernels.tiling import MAX_LAYER_NORM, fuses_layer_norm_linear, fuses_linear_layer_norm
from fusedres.kernels.workspace import num_sms

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
BACKENDS = ("auto", "triton", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ENVIRONMENT: Any = os.environ._data  # pyright: ignore[reportAttributeAccessIssue]
_BACKEND = os.environ.encodekey("FUSEDRES_BACKEND")
_REFERENCE = os.environ.encodevalue("reference")
_AUTO = (None, os.environ.encodevalue(""), os.environ.encodevalue("auto"))


def _constant(function: FunctionT) -> FunctionT:
    """What :func:`torch.compiler.assume_constant_result` does, without importing the compiler for it."""
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel runs for tensors of this device and dtype; ``None`` when one does.

    Raises:
        ValueError: ``FUSEDRES_BACKEND`` is not one of ``auto``, ``triton``, ``reference``.
    """
    chosen, has_triton, interpreting = _policy()
    if chosen not in BACKENDS:
        raise ValueError(f"FUSEDRES_BACKEND must be one of {BACKENDS}, got {chosen!r}")
    if chosen == "reference":
        return "FUSEDRES_BACKEND=reference"
    if not has_triton:
        return "triton is not installed"
    if device.type != "cuda" and not (device.type == "cpu" and interpreting):
        return f"there is no kernel for {device.type} tensors"
    if dtype not in KERNEL_DTYPES:
        return f"there is no kernel for {dtype}"
    return None


def takes_reference(input: Tensor) -> bool:
    """Whether no kernel is for tensors where ``input`` is: what a CPU can be told without looking any further."""
    if not input.is_cpu or torch.compiler.is_dynamo_compiling():
        return False
    chosen = _ENVIRONMENT.get(_BACKEND)
    return chosen == _REFERENCE or (chosen in _AUTO and not _triton()[1])


def use_kernels(input: Tensor, *others: Tensor | None, reason: str | None = None) -> bool:
    """Whether a call with these tensors, of which ``input`` is the activation, goes to the kernels.

    ``reason`` is why it does not, where the caller knows one.

    Raises:
        RuntimeError: ``FUSEDRES_BACKEND=triton`` and no kernel covers it.
        ValueError: ``FUSEDRES_BACKEND`` is unknown.
    """
    if takes_reference(input):
        return False
    given = [input, *[tensor for tensor in others if tensor is not None]]
    reason = refusal(input.device, input.dtype) or reason or _transform_refusal(given)
    for tensor in given:
        reason = reason or _tensor_refusal(tensor)
    if reason is None:
        return True
    if backend() == "triton" and not is_known(input.numel() == 0):
        raise RuntimeError(f"FUSEDRES_BACKEND=triton, but {reason}")
    return False


def backend() -> str:
    """``FUSEDRES_BACKEND``, whatever it is."""
    return _policy()[0]


def path_for(refused: str | None) -> str:
    """``triton`` for a call that is not refused; else ``reference``, or ``raises`` where kernels are asked for."""
    if refused is None:
        return "triton"
    return "raises" if backend() == "triton" else "reference"


def layer_norm_refusal(features: int) -> str | None:
    """Why no kernel normalises rows of so many features; ``None`` when one does."""
    return f"no kernel normalises over more than {MAX_LAYER_NORM} features" if features > MAX_LAYER_NORM else None


def pool_refusal(kernel_size: Sequence[int], dilation: Sequence[int], ceil_mode: bool) -> str | None:
    """Why no kernel pools with such windows; ``None`` when one does."""
    if any(step != 1 for step in dilation):
        return f"no kernel pools with a dilation of {tuple(dilation)}"
    if ceil_mode:
        return "no kernel pools in ceil mode"
    if math.prod(kernel_size) > MAX_WINDOW:
        return f"no kernel pools over more than {MAX_WINDOW} elements"
    return None


def multiplies_itself(norm_first: bool, M: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether one kernel normalises and multiplies M rows of K to M of N; else the vendor's product is one of two."""
    tensor_cores = dtype.itemsize == 2 or tf32()
    if norm_first:
        return fuses_layer_norm_linear(M, N, K, tensor_cores)
    sms = num_sms(device if device.type == "cuda" else torch.device("cpu"))
    return fuses_linear_layer_norm(M, N, K, dtype.itemsize, tensor_cores, sms)


def is_known(condition: bool | torch.SymBool) -> bool:
    """Whether ``condition`` holds; in a trace that leaves a size open until the data is there, whether it surely does.

    The operators themselves take what is not refused for that reason, such as a batch that turns out to be empty.
    """
    if not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # imports SymPy

    return guard_or_false(condition)


def autocasts(input: Tensor) -> bool:
    """Whether autocast is on where ``input`` is; asking is an error on devices that have none, such as meta."""
    kind = input.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def autocast_dtypes(input: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of a linear map of ``input``, and of the layer normalisation of that, under autocast or without."""
    if not autocasts(input):
        return input.dtype, input.dtype
    device = input.device.type
    linear = torch.get_autocast_dtype(device)
    return linear, torch.float32 if device == "cuda" else linear


@_constant
def tf32() -> bool:
    """Whether PyTorch is told to multiply float32 matrices in TF32, by its newer or its older switch."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@_constant
def _policy() -> tuple[str, bool, bool]:
    # Past os.environ's own look-up, which raises and catches an exception where the variable is not set.
    chosen = _ENVIRONMENT.get(_BACKEND)
    return (os.environ.decodevalue(chosen) if chosen else "auto"), *_triton()


@functools.cache
def _triton() -> tuple[bool, bool]:
    """Whether triton is installed, and whether it interprets; it decides the latter when kernels are defined."""
    if importlib.util.find_spec("triton") is None:
        return False, False
    from triton import knobs

    return True, knobs.runtime.interpret


def _tensor_refusal(tensor: Tensor) -> str | None:
    if is_known(tensor.numel() == 0):
        return "a tensor is empty"
    if tensor.layout is not torch.strided:
        return f"there is no kernel for the layout {tensor.layout}"
    if tensor.dtype not in KERNEL_DTYPES and (tensor.is_floating_point() or tensor.is_complex()):
        return f"there is no kernel for {tensor.dtype}"
    return None


def _transform_refusal(tensors: list[Tensor]) -> str | None:
    """Function transforms and tracers that do not see through an operator."""
    if _transforms_active():
        return "torch.func transforms take the reference path"
    if torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return "torch.jit.trace takes the reference path"
    if forward_ad._current_level >= 0 and any(unpack_dual(tensor).tangent is not None for tensor in tensors):
        return "forward-mode differentiation takes the reference path"
    return None


@_constant
def _transforms_active() -> bool:
    return torch._C._are_functorch_transforms_active()
