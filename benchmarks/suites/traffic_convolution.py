"""Traffic of a convolution with the BatchNorm and ReLU of its input: what the convolution itself moves counts too."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.suites import traffic_batch_norm
from benchmarks.suites.traffic_batch_norm import LAYOUTS, SHAPES, ties
from fusedres import functional

WORKLOAD = "batch_norm_act_conv2d"
CONVOLUTION = {"forward": 2.0, "backward": 3.0, "eval": 2.0}  # y in and out; dout and y in, dy out
AGAIN = 2.0  # x in and y out, in the backward


class Case(traffic_batch_norm.Case):
    """A depthwise convolution, whose weight is no activation."""

    def budget(self, phase: str) -> float:
        normalised = traffic_batch_norm.BUDGET["batch_norm_act"][phase][self.on_chip]
        return normalised + CONVOLUTION[phase] + (AGAIN if phase == "backward" else 0)

    def launches(self, phase: str) -> int:
        return super().launches(phase) + (phase == "backward")

    def inputs(self) -> dict[str, Tensor]:
        """No value next to the ReLU's kink: a cotangent behind a convolution cannot leave it out."""
        x = self._activation()
        x += x.sign()
        return traffic_batch_norm.Case("batch_norm_act", self.shape, self.layout).inputs() | {
            "input": x.to(traffic_batch_norm.DTYPE).requires_grad_(),
            "bias": (0.2 * torch.rand(self.shape[1]) - 0.1).requires_grad_(),
            "conv_weight": torch.randn(self.shape[1], 1, 3, 3).to(traffic_batch_norm.DTYPE).requires_grad_(),
        }

    def cotangents(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        assert not ties(tensors["input"], None, tensors["weight"], tensors["bias"]).any()
        return [self._activation()]

    def fused(self, tensors: dict[str, Tensor], training: bool) -> tuple[Tensor, ...]:
        running = {name: tensors[name].clone() for name in ("running_mean", "running_var")}
        options: dict[str, Any] = {**tensors, **running, "training": training}
        return (functional.batch_norm_act_conv2d(**options, padding=1, groups=self.shape[1]),)

    def eager(self, tensors: dict[str, Tensor], training: bool) -> tuple[Tensor, ...]:
        (y,) = super().eager(tensors, training)
        return (F.conv2d(y, tensors["conv_weight"], padding=1, groups=self.shape[1]),)


# Without the shapes that take longest to interpret: the kernels are those of batch_norm_act.
CASES = [Case(WORKLOAD, shape, layout) for shape in SHAPES[2:] for layout in LAYOUTS]
