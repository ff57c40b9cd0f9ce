"""BatchNorm2d with an optional residual addition and activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusedres.functional import ACTIVATIONS, add_batch_norm_act, batch_norm_act
from fusedres.nn.scripting import Unscriptable

# Seen by torch.fx as one call, so that a symbolic trace of a fused model does not enter the validation.
torch.fx.wrap("batch_norm_act")
torch.fx.wrap("add_batch_norm_act")

_OWN = "own"  # `act` left out of a call: the module's own


class BatchNormAct2d(Unscriptable, nn.BatchNorm2d):
    r"""``act(batch_norm(input) + residual)`` as a module; an :class:`torch.nn.BatchNorm2d` in all else.

    Args:
        act: ``"relu"`` or ``None``, applied after the residual is added. Keyword only; the other arguments are
            those of :class:`torch.nn.BatchNorm2d`, and so are the parameters, the buffers and their names.

    Raises:
        ValueError: an unknown ``act``.
    """

    act: str | None

    def __init__(self, num_features: int, *args: Any, act: str | None = "relu", **kwargs: Any) -> None:
        super().__init__(num_features, *args, **kwargs)
        if act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {ACTIVATIONS}, got {act!r}")
        self.act = act

    def forward(self, input: Tensor, residual: Tensor | None = None, *, act: str | None = _OWN) -> Tensor:
        """Normalise ``input`` ``(N, C, H, W)``; ``act`` overrides the module's for this call."""
        return batch_norm_act(input, **self._state(input), residual=residual, act=self.act if act == _OWN else act)

    def add(self, input: Tensor, residual: Tensor, *, act: str | None = _OWN) -> tuple[Tensor, Tensor]:
        """``(s, self(s))`` of ``s = input + residual``, see :func:`fusedres.functional.add_batch_norm_act`."""
        return add_batch_norm_act(input, residual, **self._state(input), act=self.act if act == _OWN else act)

    def _state(self, input: Tensor) -> dict[str, Any]:
        return batch_norm_state(self, input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act!r}"

    @property
    def qconfig(self) -> Any:
        """Absent until set, without an activation; with one, refuses the conversion that would lose it.

        ``nn.SyncBatchNorm.convert_sync_batchnorm`` replaces every BatchNorm by a plain SyncBatchNorm and asks
        for this attribute on the way; an AttributeError would be swallowed there and the activation dropped.
        """
        if "_qconfig" in self.__dict__:
            return self._qconfig
        if self.act is None:
            raise AttributeError("qconfig")
        raise RuntimeError(
            f"converting BatchNormAct2d(act={self.act!r}) to a plain normalisation would drop its activation"
        )

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        self._qconfig = value


def batch_norm_state(norm: nn.BatchNorm2d, input: Tensor) -> dict[str, Any]:
    """What ``norm`` normalises ``input`` with in its mode: arguments of :func:`fusedres.functional.batch_norm_act`.

    Raises:
        ValueError: ``input`` is not ``(N, C, H, W)``.
    """
    if not isinstance(input, torch.fx.Proxy):  # a symbolic trace has no dimensions yet
        norm._check_input_dim(input)
    training = norm.training
    tracking = training and norm.track_running_stats
    mean, var = (norm.running_mean, norm.running_var) if tracking or not training else (None, None)
    return {
        "running_mean": mean,
        "running_var": var,
        "weight": norm.weight,
        "bias": norm.bias,
        "training": training or mean is None,
        "momentum": norm.momentum,
        "eps": norm.eps,
        "num_batches_tracked": norm.num_batches_tracked if tracking else None,
    }


def as_batch_norm_act(module: nn.Module, act: str | None) -> BatchNormAct2d:
    """Turn a plain ``nn.BatchNorm2d`` into a :class:`BatchNormAct2d` in place: the same object, tensors and hooks.

    Raises:
        TypeError: ``module`` is neither; a subclass with a forward of its own is not taken over.
    """
    if type(module) is nn.BatchNorm2d:
        module.__class__ = BatchNormAct2d
    if not isinstance(module, BatchNormAct2d):
        raise TypeError(f"expected an nn.BatchNorm2d or a BatchNormAct2d, got {type(module).__name__}")
    module.act = act
    return module
