"""Linear and LayerNorm in either order, with an activation, and a residual block of them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fusedres.functional import ACTIVATIONS, layer_norm_linear_act, linear_layer_norm_act
from fusedres.nn.scripting import Unscriptable

# Seen by torch.fx as one call, so that a symbolic trace of a fused model does not enter the validation.
torch.fx.wrap("layer_norm_linear_act")
torch.fx.wrap("linear_layer_norm_act")


class _LayerNormAndLinear(Unscriptable, nn.Module):
    """The children and the arguments that both orders have."""

    norm_first: ClassVar[bool]
    norm: nn.LayerNorm
    linear: nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        ln_bias: bool = True,
        act: str | None = "relu",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {ACTIVATIONS}, got {act!r}")
        self.act = act
        normalised = in_features if self.norm_first else out_features
        norm = nn.LayerNorm(normalised, eps, elementwise_affine, ln_bias, device, dtype)
        linear = nn.Linear(in_features, out_features, bias, device, dtype)
        # In the order of the layers: an optimizer's state goes by the order of the parameters.
        children = {"norm": norm, "linear": linear} if self.norm_first else {"linear": linear, "norm": norm}
        for name, child in children.items():
            self.add_module(name, child)

    def extra_repr(self) -> str:
        return f"act={self.act!r}"


class LayerNormLinear(_LayerNormAndLinear):
    """``act(linear(norm(input)))`` in one operation.

    Args:
        in_features: K, normalised over.
        out_features: N.
        bias: whether the linear map has one.
        eps, elementwise_affine, ln_bias: as ``eps``, ``elementwise_affine`` and ``bias`` of
            :class:`torch.nn.LayerNorm`.
        act: ``"relu"`` or ``None``.

    The parameters are those of the children ``norm`` (:class:`torch.nn.LayerNorm`) and ``linear``
    (:class:`torch.nn.Linear`), which are not called themselves: hooks belong on this module.

    Raises:
        ValueError: an unknown ``act``.
    """

    norm_first = True

    def forward(self, input: Tensor) -> Tensor:
        """``(*, in_features)`` to ``(*, out_features)``."""
        norm, linear = self.norm, self.linear
        return layer_norm_linear_act(
            input, norm.weight, norm.bias, linear.weight, linear.bias, eps=norm.eps, act=self.act
        )


class LinearLayerNorm(_LayerNormAndLinear):
    """``act(norm(linear(input))) + residual`` in one operation; arguments as :class:`LayerNormLinear`.

    The normalisation is over ``out_features``.

    Raises:
        ValueError: an unknown ``act``.
    """

    norm_first = False

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``(*, in_features)`` to ``(*, out_features)``; ``residual`` is added after the activation."""
        norm, linear = self.norm, self.linear
        return linear_layer_norm_act(
            input, linear.weight, linear.bias, norm.weight, norm.bias, eps=norm.eps, act=self.act, residual=residual
        )


class ResidualMLPBlock(LinearLayerNorm):
    """``act(norm(linear(x))) + skip(x)``: a :class:`LinearLayerNorm` with the skip added after the activation.

    Args:
        skip: the skip's projection; ``None`` is the identity where the sizes are equal, else a Linear without bias.
        others: as :class:`LinearLayerNorm`; ``out_features`` defaults to ``in_features``.

    Raises:
        ValueError: an unknown ``act``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *args: Any,
        skip: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        out_features = in_features if out_features is None else out_features
        super().__init__(in_features, out_features, *args, **kwargs)
        if skip is None and in_features != out_features:
            skip = nn.Linear(in_features, out_features, False, kwargs.get("device"), kwargs.get("dtype"))
        self.skip = skip

    def forward(self, input: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """``(*, in_features)`` to ``(*, out_features)``."""
        return super().forward(input, input if self.skip is None else self.skip(input))
