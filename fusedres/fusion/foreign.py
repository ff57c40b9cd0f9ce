"""timm's BatchNormAct2d, a BatchNorm2d that applies its activation itself: its call is fused, the module stays.

timm is never imported here: its class is known by name, and only modules of a user who imported it have it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusedres.functional import add_batch_norm_act, batch_norm_act
from fusedres.nn.batch_norm import batch_norm_state

torch.fx.wrap("batch_norm_act")  # one call in a symbolic trace, as in BatchNormAct2d
_CLASS = ("timm.layers.norm_act", "BatchNormAct2d")


def is_foreign(module: object) -> bool:
    """Whether ``module`` is timm's BatchNormAct2d and computes ``relu(bn(x))`` or ``bn(x)``, with nobody watching.

    Asked in each forward of each block: the parts that a user can replace or hook are looked at every time.
    """
    kind = type(module)
    if (kind.__module__, kind.__name__) != _CLASS or not isinstance(module, nn.BatchNorm2d):
        return False
    parts = module._modules
    return (
        len(parts) == 2
        and type(parts.get("drop")) is nn.Identity
        and type(parts.get("act")) in (nn.ReLU, nn.Identity)
        and not any(_is_watched(part) for part in parts.values())
    )


def foreign_act(norm: nn.Module) -> str | None:
    """The activation that ``norm`` applies."""
    return "relu" if type(norm._modules["act"]) is nn.ReLU else None


def foreign_norm(norm: nn.BatchNorm2d, input: Tensor) -> Tensor:
    """``norm(input)`` in one operation."""
    return batch_norm_act(input, **batch_norm_state(norm, input), act=foreign_act(norm))


def foreign_add_norm(norm: nn.BatchNorm2d, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """``(s, norm(s))`` of ``s = input + residual`` in one operation."""
    return add_batch_norm_act(input, residual, **batch_norm_state(norm, input), act=foreign_act(norm))


def _is_watched(part: Any) -> bool:
    return bool(
        "forward" in part.__dict__
        or part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
    )
