"""Traffic of BatchNorm, ReLU and max pooling: what is called, and how often the activation may be read and written.

Overlapping windows read an element again, from a cache, so budgets are of distinct bytes: every byte once a tensor, a
launch and a direction, in passes over the input.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.instruments.meter import TrafficMeter
from fusedres import functional

DTYPE = torch.bfloat16
WORKLOAD = "batch_norm_act_max_pool2d"
SHAPES = ((1, 16, 112, 112), (2, 24, 23, 21))  # the planes of a ResNet's stem, and odd ones
LAYOUTS = ("channels-last", "NCHW")
LAUNCHES = {"forward": 2, "backward": 2, "eval": 1}
MARGIN = 0.05


class Case(NamedTuple):
    """The stem of a residual network at one shape of its input."""

    workload: str
    shape: tuple[int, ...]
    layout: str

    @property
    def rows(self) -> int:
        return self.shape[0] * math.prod(self.shape[2:])

    @property
    def pooled(self) -> tuple[int, ...]:
        return (*self.shape[:2], *((size - 1) // 2 + 1 for size in self.shape[2:]))

    @property
    def extents(self) -> tuple[int, ...]:
        return (self.shape[1] if self.layout == "channels-last" else self.pooled[3],)

    @property
    def stride(self) -> int:
        """In NCHW an access has every second element of a row; what is between them, another finds in a cache."""
        return 1 if self.layout == "channels-last" else 2

    def budget(self, phase: str) -> float:
        """Passes over the input: of an output's bytes a gradient has as many, and its winner one."""
        y = math.prod(self.pooled) / math.prod(self.shape)
        winner = y / DTYPE.itemsize
        statistics_and_apply = 2 + y + winner
        reduction_and_apply = (1 + y + winner) + (2 + y + winner)
        return {"forward": statistics_and_apply, "backward": reduction_and_apply, "eval": 1 + y}[phase]

    def inputs(self) -> dict[str, Tensor]:
        channels = self.shape[1]
        memory_format = torch.channels_last if self.layout == "channels-last" else torch.contiguous_format
        return {
            "input": torch.randn(self.shape).to(DTYPE).to(memory_format=memory_format).requires_grad_(),
            "weight": (torch.rand(channels) + 0.5).requires_grad_(),
            "bias": torch.randn(channels).requires_grad_(),
            "running_mean": torch.zeros(channels),
            "running_var": torch.ones(channels),
        }

    def cotangents(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        """In the output's memory format; 0 where rounding decides on the maximum."""
        grad = torch.randn(self.pooled).masked_fill(_undecided(tensors), 0)
        return [grad.to(memory_format=torch.channels_last) if self.layout == "channels-last" else grad]

    def fused(self, tensors: dict[str, Tensor], training: bool) -> tuple[Tensor, ...]:
        running = {name: tensors[name].clone() for name in ("running_mean", "running_var")}
        return (getattr(functional, self.workload)(**(tensors | running), training=training),)

    def eager(self, tensors: dict[str, Tensor], training: bool) -> tuple[Tensor, ...]:
        mean, var = tensors["running_mean"].clone(), tensors["running_var"].clone()
        z = F.batch_norm(tensors["input"], mean, var, tensors["weight"], tensors["bias"], training)
        return (F.max_pool2d(torch.relu(z), 3, 2, 1),)

    def meter(self, tensors: dict[str, Tensor]) -> TrafficMeter:
        return TrafficMeter(tensors["input"], sizes=(math.prod(self.shape), math.prod(self.pooled)))

    def complaints(self, phase: str, meter: TrafficMeter) -> list[str]:
        """More than the budget, and less: then it is no longer what the kernels move."""
        budget, total, found = self.budget(phase), meter.distinct_passes + meter.aten_passes, []
        if abs(total - budget) > MARGIN * budget:
            found.append(f"{total:.2f} passes over an activation, not {budget:.2f}")
        if len(meter.launches) != LAUNCHES[phase]:
            found.append(f"{len(meter.launches)} launches, not {LAUNCHES[phase]}")
        return found

    def figures(self, phase: str, meter: TrafficMeter, eager: TrafficMeter) -> dict[str, float | None]:
        return {
            "passes": round(meter.distinct_passes, 4),
            "distinct_passes": round(meter.distinct_passes, 4),
            "aten_passes": round(meter.aten_passes, 4),
            "budget_passes": round(self.budget(phase), 4),
            "eager_passes": round(eager.aten_passes, 4),
            "vector_share": round(meter.vector_bytes / meter.distinct_bytes, 5),
        }


CASES = [Case(WORKLOAD, shape, layout) for shape in SHAPES for layout in LAYOUTS]


def _undecided(tensors: dict[str, Tensor]) -> Tensor:
    """Where the two largest of a window and 0 are within 8 eps of the magnitudes they are the sums of."""
    x, weight, bias = (tensors[name].detach() for name in ("input", "weight", "bias"))
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    scale = weight.view(1, -1, 1, 1) * torch.rsqrt(var + 1e-5)
    shift = bias.view(1, -1, 1, 1) - mean * scale
    z, size = x * scale + shift, (x * scale).abs() + shift.abs()
    windows = F.pad(z, (1, 1, 1, 1), value=-math.inf).unfold(2, 3, 2).unfold(3, 3, 2).flatten(4)
    best, second = windows.topk(2).values.unbind(-1)
    slack = 8 * torch.finfo(x.dtype if x.dtype == DTYPE else DTYPE).eps * F.max_pool2d(size, 3, 2, 1)
    return (best - second.clamp_min(0) <= 2 * slack) | (best.abs() <= slack)
