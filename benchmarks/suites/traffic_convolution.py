"""Traffic of a convolution with the BatchNorm and ReLU of its input: what the convolution itself moves counts too."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.suites import traffic_batch_norm
from benchmarks.suites.traffic_batch_norm import LAYOUTS, SHAPES
from fusedres import functional

# What is called, and the function that does without the convolution.
WITHOUT = {"batch_norm_act_conv2d": "batch_norm_act", "add_batch_norm_act_conv2d": "add_batch_norm_act"}
CONVOLUTION = {"forward": 2.0, "backward": 3.0, "eval": 2.0}  # y in and out; dout and y in, dy out
AGAIN = 2.0  # x in and y out, in the backward


class Case(traffic_batch_norm.Case):
    """A depthwise convolution, whose weight is no activation; the workload is a key of ``WITHOUT``."""

    @property
    def without(self) -> traffic_batch_norm.Case:
        return traffic_batch_norm.Case(WITHOUT[self.workload], self.shape, self.layout)

    def budget(self, phase: str) -> float:
        return self.without.budget(phase) + CONVOLUTION[phase] + (AGAIN if phase == "backward" else 0)

    def launches(self, phase: str) -> int:
        return self.without.launches(phase) + (phase == "backward")

    def inputs(self) -> dict[str, Tensor]:
        """No value next to the ReLU's kink: a cotangent behind a convolution cannot leave it out."""
        tensors = self.without.inputs()
        with torch.no_grad():
            tensors["input"] += (tensors["input"] + tensors.get("residual", 0)).sign()
            tensors["bias"].clamp_(-0.1, 0.1)
        conv_weight = torch.randn(self.shape[1], 1, 3, 3).to(traffic_batch_norm.DTYPE).requires_grad_()
        return tensors | {"conv_weight": conv_weight}

    def cotangents(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        plain = {name: tensor for name, tensor in tensors.items() if name != "conv_weight"}
        *sums, last = self.without.cotangents(plain)
        assert last.all(), "a value next to the kink"
        return [*sums, last]

    def fused(self, tensors: dict[str, Tensor], training: bool) -> tuple[Tensor, ...]:
        running = {name: tensors[name].clone() for name in ("running_mean", "running_var")}
        options: dict[str, Any] = {**tensors, **running, "training": training, "padding": 1, "groups": self.shape[1]}
        outputs = getattr(functional, self.workload)(**options)
        return (outputs,) if isinstance(outputs, Tensor) else outputs

    def eager(self, tensors: dict[str, Tensor], training: bool) -> tuple[Tensor, ...]:
        plain = {name: tensor for name, tensor in tensors.items() if name != "conv_weight"}
        *sums, y = self.without.eager(plain, training)
        return *sums, F.conv2d(y, tensors["conv_weight"], padding=1, groups=self.shape[1])


# Without the shapes that take longest to interpret: the kernels are those of the functions without.
CASES = [Case(workload, shape, layout) for shape in SHAPES[2:] for workload in WITHOUT for layout in LAYOUTS]
