"""timm's BatchNormAct2d, a BatchNorm2d that applies its activation itself: its forward is fused, wherever it is called.

timm is never imported here: its class is known by name, and only modules of a user who imported it have it.
"""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fusedres.functional import normalise
from fusedres.fusion.derived import Derived, disguise
from fusedres.fusion.watching import is_standard
from fusedres.nn import batch_norm_state

torch.fx.wrap("normalise")  # one call in a symbolic trace, as in BatchNormAct2d
_CLASS = ("timm.layers.norm_act", "BatchNormAct2d")


class TakenNorm(Derived):
    """Mixed into timm's class: ReLU is applied in the same operation, any other activation after it."""

    def forward(self, x: Tensor) -> Tensor:
        """See timm's class."""
        assert isinstance(self, nn.BatchNorm2d)
        fuses = computes_one_norm(self) and not _has_any_global_hook()
        out = normalise(x, batch_norm_state(self, x), None, timms_act(self) if fuses else None)
        return out if fuses else self.act(self.drop(out))  # pyright: ignore[reportCallIssue]

    @property
    def qconfig(self) -> Any:
        """Absent until set; PyTorch's ``convert_sync_batchnorm`` asks, and is refused. timm's, which asks too, is not.

        See :attr:`fusedres.nn.BatchNormAct2d.qconfig`; timm's keeps the activation.
        """
        if "qconfig" in self.__dict__:
            return self.__dict__["qconfig"]
        act = self.act  # pyright: ignore[reportAttributeAccessIssue]
        caller = sys._getframe(1).f_globals.get("__name__")
        if type(act) is nn.Identity or caller != nn.SyncBatchNorm.__module__:
            raise AttributeError("qconfig")
        raise RuntimeError(
            f"converting timm's BatchNormAct2d to a plain normalisation would drop its {type(act).__name__}: "
            "timm.layers.convert_sync_batchnorm keeps it"
        )

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        self.__dict__["qconfig"] = value


def take(norm: nn.Module) -> None:
    """Give timm's BatchNormAct2d our forward: the same object, tensors and hooks."""
    if not isinstance(norm, TakenNorm):
        norm.__class__ = _taken_class(type(norm))


def is_timms(module: object) -> bool:
    """Whether ``module`` is timm's BatchNormAct2d, taken or not; of no class derived from it."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == _CLASS and isinstance(module, nn.BatchNorm2d)


def computes_one_norm(module: object) -> bool:
    """Whether ``module`` is timm's BatchNormAct2d and computes ``relu(bn(x))`` or ``bn(x)``, with nobody watching.

    Asked in each forward: the parts that a user can replace or hook are looked at every time.
    """
    if not is_timms(module):
        return False
    parts = module._modules  # pyright: ignore[reportAttributeAccessIssue]
    return (
        len(parts) == 2
        and is_standard(parts.get("drop"), nn.Identity)
        and is_standard(parts.get("act"), nn.ReLU, nn.Identity)
    )


def timms_act(norm: nn.Module) -> str | None:
    """The activation that ``norm`` fuses."""
    return "relu" if type(norm._modules["act"]) is nn.ReLU else None


def timms_pattern(norm: nn.Module) -> tuple[str, str]:
    """The pattern of a call of timm's ``norm``, whoever calls it, and why it is not more."""
    if computes_one_norm(norm):
        return ("bn_act" if timms_act(norm) else "bn"), ""
    return "bn", f"followed by its own {type(norm._modules.get('act')).__name__}"


@functools.cache
def _taken_class(original: type[nn.Module]) -> type[nn.Module]:
    attributes = disguise(original, _taken_class, original)
    return types.new_class(original.__name__, (TakenNorm, original), {}, lambda body: body.update(attributes))
