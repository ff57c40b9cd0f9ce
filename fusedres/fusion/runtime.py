"""What rewritten forwards call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fusedres.nn import BatchNormAct2d


def norm_add(norm: BatchNormAct2d, input: Tensor, residual: Any, act: str | None, changes: str | None) -> Tensor:
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
        # By keyword: a normalisation that knows neither raises.
        return norm(input, residual=residual, act=act)
    out = norm(input)
    if changes == "norm":
        out += residual
    else:
        out = out + residual if changes is None else residual.clone().add_(out)
    return torch.relu(out) if act == "relu" else out


def is_changed(norms: tuple[nn.Module, ...], acts: tuple[nn.Module, ...]) -> bool:
    """Whether a module that was folded, or its forward, has been replaced, or a hook would see the difference."""
    for norm in norms:
        if type(norm) is not BatchNormAct2d:
            return True
    for act in acts:
        if type(act) is not nn.ReLU:
            return True
    for module in norms + acts:
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
