"""BatchNorm2d with an optional residual addition and activation, or with an activation and max pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusedres.functional import (
    ACTIVATIONS,
    Extent,
    Norm,
    add_normalise,
    batch_norm_act_max_pool2d,
    normalise,
)
from fusedres.nn.scripting import Unscriptable

# Seen by torch.fx as one call, so that a symbolic trace of a fused model does not enter the validation.
torch.fx.wrap("normalise")
torch.fx.wrap("add_normalise")
torch.fx.wrap("batch_norm_act_max_pool2d")

_OWN = "own"  # `act` left out of a call: the module's own


class _BatchNormWithAct(Unscriptable, nn.BatchNorm2d):
    """An :class:`torch.nn.BatchNorm2d` that does more than normalise, and says so where that would be lost."""

    act: str | None

    def __init__(self, num_features: int, *args: Any, act: str | None = "relu", **kwargs: Any) -> None:
        super().__init__(num_features, *args, **kwargs)
        if act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {ACTIVATIONS}, got {act!r}")
        self.act = act

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act!r}"

    def _beyond(self) -> str | None:
        """What it does beside normalising, in words."""
        return None if self.act is None else "activation"

    @property
    def qconfig(self) -> Any:
        """Absent until set, where it only normalises; else refuses the conversion that would lose the rest.

        ``nn.SyncBatchNorm.convert_sync_batchnorm`` replaces every BatchNorm by a plain SyncBatchNorm and asks
        for this attribute on the way; an AttributeError would be swallowed there and the activation dropped.
        """
        if "_qconfig" in self.__dict__:
            return self._qconfig
        beyond = self._beyond()
        if beyond is None:
            raise AttributeError("qconfig")
        name = f"{type(self).__name__}(act={self.act!r})"
        raise RuntimeError(f"converting {name} to a plain normalisation would drop its {beyond}")

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        self._qconfig = value


class BatchNormAct2d(_BatchNormWithAct):
    r"""``act(batch_norm(input) + residual)`` as a module; an :class:`torch.nn.BatchNorm2d` in all else.

    Args:
        act: ``"relu"`` or ``None``, applied after the residual is added. Keyword only; the other arguments are
            those of :class:`torch.nn.BatchNorm2d`, and so are the parameters, the buffers and their names.

    Raises:
        ValueError: an unknown ``act``.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None, *, act: str | None = _OWN) -> Tensor:
        """Normalise ``input`` ``(N, C, H, W)``; ``act`` overrides the module's for this call."""
        act = self.act if act == _OWN else act
        group = None if type(self) is BatchNormAct2d else self._group()
        return normalise(input, batch_norm_state(self, input), residual, act, group)

    def add(self, input: Tensor, residual: Tensor, *, act: str | None = _OWN) -> tuple[Tensor, Tensor]:
        """``(s, self(s))`` of ``s = input + residual``, see :func:`fusedres.functional.add_batch_norm_act`."""
        act = self.act if act == _OWN else act
        return add_normalise(input, residual, batch_norm_state(self, input), act, self._group())

    def _group(self) -> Any:
        """The ranks over whose batches the statistics are taken."""
        return None


class BatchNormActMaxPool2d(_BatchNormWithAct):
    r"""``max_pool2d(act(batch_norm(input)))`` as a module; an :class:`torch.nn.BatchNorm2d` in all else.

    Args:
        act: ``"relu"`` or ``None``. Keyword only, as what follows; the other arguments are those of
            :class:`torch.nn.BatchNorm2d`, and so are the parameters, the buffers and their names.
        kernel_size, stride, padding, dilation, ceil_mode: of the pooling, as
            :func:`fusedres.functional.batch_norm_act_max_pool2d`.

    Raises:
        ValueError: an unknown ``act``.
    """

    def __init__(
        self,
        num_features: int,
        *args: Any,
        kernel_size: Extent = 3,
        stride: Extent | None = 2,
        padding: Extent = 1,
        dilation: Extent = 1,
        ceil_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, *args, **kwargs)
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.dilation, self.ceil_mode = dilation, ceil_mode

    def forward(self, input: Tensor) -> Tensor:
        """Normalise and pool ``input`` ``(N, C, H, W)``."""
        state = batch_norm_state(self, input)
        return batch_norm_act_max_pool2d(
            input, *state[:7], act=self.act, **self._pooling(), num_batches_tracked=state[7]
        )  # fmt: skip

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in self._pooling().items())])

    def _pooling(self) -> dict[str, Any]:
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        return {name: getattr(self, name) for name in names}

    def _beyond(self) -> str:
        return "pooling" if self.act is None else "activation and its pooling"


def batch_norm_state(norm: nn.BatchNorm2d, input: Tensor) -> Norm:
    """What ``norm`` normalises ``input`` with in its mode.

    Raises:
        ValueError: ``input`` is not ``(N, C, H, W)``.
    """
    if isinstance(input, Tensor) and input.dim() != 4:  # a symbolic trace has no dimensions yet
        norm._check_input_dim(input)
    training = norm.training
    tracking = training and norm.track_running_stats
    # Past Module.__getattr__, which takes longer than all else here; a parametrized weight is no parameter.
    parameters, buffers = norm._parameters, norm._buffers
    if "weight" in parameters and "bias" in parameters:
        weight, bias = parameters["weight"], parameters["bias"]
    else:
        weight, bias = norm.weight, norm.bias
    mean, var = (buffers["running_mean"], buffers["running_var"]) if tracking or not training else (None, None)
    count = buffers["num_batches_tracked"] if tracking else None
    return Norm(mean, var, weight, bias, training or mean is None, norm.momentum, norm.eps, count)


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
