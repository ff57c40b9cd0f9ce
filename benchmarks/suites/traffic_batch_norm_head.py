"""Traffic of the head, BatchNorm to global average pooling: what is called, and how often an activation may be read."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.suites import traffic_batch_norm
from benchmarks.suites.traffic_batch_norm import BIT, DTYPE, LAYOUTS, ON_CHIP
from fusedres import functional

SHAPES = ((4, 32, 56, 56), (208, 16, 7, 7), (4, 67, 14, 14), ON_CHIP)
HEAD = "batch_norm_act_global_avg_pool2d"
# Passes over one activation: where the statistics take a launch of their own, and where a channel tile fits on-chip.
BUDGET = {
    HEAD: {"forward": (2.0, 1.0), "backward": (3.0, 2.0), "eval": (1.0, 1.0)},
    f"{HEAD} + residual": {
        "forward": (3 + BIT, 2 + BIT), "backward": (4 + 2 * BIT, 3 + BIT), "eval": (2.0, 2.0),
    },
}  # fmt: skip


class Case(traffic_batch_norm.Case):
    """A key of this module's ``BUDGET``; others were not read for what they move."""

    def budget(self, phase: str) -> float:
        return BUDGET[self.workload][phase][self.on_chip]

    def inputs(self) -> dict[str, Tensor]:
        """Clear of 0 before the ReLU: the cotangent, one value an image, cannot leave single pixels out."""
        channels, sign = self.shape[1], self._activation().sign()
        activations = {"input": (sign * (1 + self._activation().abs())).to(DTYPE).requires_grad_()}
        if self.workload != HEAD:
            activations["residual"] = (sign * self._activation().abs()).to(DTYPE).requires_grad_()
        return activations | {
            "weight": (torch.rand(channels) + 0.5).requires_grad_(),
            "bias": (torch.rand(channels) * 0.2 - 0.1).requires_grad_(),
            "running_mean": torch.zeros(channels),
            "running_var": torch.ones(channels),
        }

    def cotangents(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        return [torch.randn(*self.shape[:2], 1, 1)]

    def fused(self, tensors: dict[str, Tensor], training: bool) -> tuple[Tensor, ...]:
        given: dict[str, Any] = tensors | {name: tensors[name].clone() for name in ("running_mean", "running_var")}
        return (functional.batch_norm_act_global_avg_pool2d(**given, training=training, act="relu"),)

    def eager(self, tensors: dict[str, Tensor], training: bool) -> tuple[Tensor, ...]:
        return (F.adaptive_avg_pool2d(super().eager(tensors, training)[0], 1),)


CASES = [Case(workload, shape, layout) for shape in SHAPES for workload in BUDGET for layout in LAYOUTS]
