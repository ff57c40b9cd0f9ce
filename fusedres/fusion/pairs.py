"""What rewritten forwards call to hand a sum on as its two summands, so that the BatchNorm that follows adds them.

A pair is two tensors of one shape and device, or the sum itself and ``None``. Only rewritten forwards, and the blocks
of :mod:`fusedres.nn`, see a pair; whatever else reads the value is given the sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fusedres.functional import add_batch_norm_act
from fusedres.fusion.foreign import foreign_add_norm, foreign_norm
from fusedres.fusion.runtime import BatchNormState, batch_norm, is_changed, is_hooked
from fusedres.nn import OWN_NORMS, PreActBasicBlock, PreActBottleneck

Pair = tuple[Tensor, Tensor | None]
_NATIVE = (PreActBasicBlock, PreActBottleneck)


def pair(input: Any, other: Any, in_place: bool = False) -> Pair:
    """``input + other``, or ``input += other``, as a pair where adding them later gives eager's result."""
    if (
        isinstance(input, Tensor)
        and isinstance(other, Tensor)
        and input.shape == other.shape
        and input.device == other.device
        and input.is_floating_point()
        and other.is_floating_point()
        and (input.dtype == other.dtype or not in_place)
    ):
        return input, other
    if in_place:
        input += other
        return input, None
    return input + other, None


def total(input: Tensor, residual: Tensor | None) -> Tensor:
    """The sum that a pair stands for."""
    return input if residual is None else input + residual


def operands(block: nn.Module, input: Tensor, residual: Tensor | None = None) -> Pair:
    """``block(input + residual)`` as a pair; called as usual where it has none to give or somebody would notice."""
    # A tracer of another library's asks for the modules that are called.
    if isinstance(input, Tensor):
        if is_chained(block, "_fusedres_operands"):
            return block._fusedres_operands(input, residual)  # pyright: ignore[reportCallIssue]
        if is_native(block):
            return pair(*block.operands(input, residual))  # pyright: ignore[reportCallIssue]
    return block(total(input, residual)), None


def joined(block: nn.Module, input: Tensor, residual: Tensor | None) -> Tensor:
    """``block(input + residual)``."""
    return block(input) if residual is None else total(*operands(block, input, residual))


def add_norm(
    norm: nn.BatchNorm2d | BatchNormState, input: Tensor, residual: Tensor | None, **act: Any
) -> tuple[Tensor, Tensor]:
    """``(s, norm(s))`` of ``s = input + residual``."""
    if residual is not None and input.dtype != residual.dtype and not _is_single(norm):
        input, residual = input + residual, None  # the statistics may be of the sum's dtype
    if isinstance(norm, tuple):
        if residual is None:
            return input, batch_norm(input, norm, **act)
        return add_batch_norm_act(input, residual, *norm[:7], num_batches_tracked=norm[7], **act)
    if isinstance(norm, OWN_NORMS):
        return (input, norm(input, **act)) if residual is None else norm.add(input, residual, **act)
    return (input, foreign_norm(norm, input)) if residual is None else foreign_add_norm(norm, input, residual)


def _is_single(norm: nn.BatchNorm2d | BatchNormState) -> bool:
    vectors = norm[:4] if isinstance(norm, tuple) else (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return all(vector is None or vector.dtype == torch.float32 for vector in vectors)


def is_chained(block: nn.Module, forward: str) -> bool:
    """Whether ``block`` has the second ``forward``, and its call would run the first that ``fuse`` gave it, alone."""
    return (
        forward in type(block).__dict__  # of no class that was derived from it since
        and not is_apart(block)
        and not _has_any_global_hook()
    )


def is_native(block: nn.Module) -> bool:
    """Whether ``block`` is one of :mod:`fusedres.nn` that has an ``operands`` of its own, with nobody watching."""
    return type(block) in _NATIVE and not is_apart(block) and not is_changed((block._modules.get("bn1"),))


def is_apart(block: nn.Module) -> bool:
    """Whether a call of ``block`` is more than its class's forward."""
    return (
        "forward" in block.__dict__
        or type(block).__call__ is not nn.Module.__call__
        or block._compiled_call_impl is not None
        or is_hooked(block)
    )


def is_open(modules: Iterable[nn.Module | None]) -> bool:
    """Whether user code may reach what one of ``modules`` is called with, or they may change it in place."""
    return any(not _is_closed(module) for module in modules)


def _is_closed(module: Any) -> bool:
    return (
        (type(module).__module__.startswith("torch.nn.modules.") or type(module) in OWN_NORMS)
        and "forward" not in module.__dict__
        and not getattr(module, "inplace", False)
        and not is_hooked(module)
        and not is_open(module._modules.values())
    )
