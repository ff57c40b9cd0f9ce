"""What a BatchNorm normalises with, in one piece from the modules to the kernels' launchers, and its gradients."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """The arguments of :func:`fusedres.functional.batch_norm_act` after ``input``, and the counter of batches.

    Functions of several BatchNorms take one for each.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float | None = 0.1
    eps: float = 1e-5
    num_batches_tracked: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those with a value for each channel."""
        return self[:4]


class Gradients(NamedTuple):
    """What a backward fills; ``None`` where it was not asked for."""

    x: Tensor | None
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
