"""Traffic of the BatchNorm functions: what is called, and how often an activation may be read and written."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.instruments.meter import TrafficMeter
from fusedres import functional

DTYPE = torch.bfloat16
ON_CHIP = (2, 256, 14, 14)
SHAPES = ((8, 64, 56, 56), (4, 256, 14, 14), (4, 67, 14, 14), ON_CHIP)
LAYOUTS = ("channels-last", "NCHW")
BIT = 1 / 16  # passes, in 16 bits, of a mask of one bit an element
# Passes over one activation: where the statistics take a launch of their own, and where a channel tile fits on-chip.
BUDGET = {
    "batch_norm_act": {"forward": (3.0, 2.0), "backward": (5.0, 3.0), "eval": (2.0, 2.0)},
    "batch_norm_act + residual": {"forward": (4 + BIT, 3 + BIT), "backward": (6 + BIT, 4 + BIT), "eval": (3.0, 3.0)},
    "forked_batch_norm_act + residual": {
        "forward": (4 + BIT, 3 + BIT), "backward": (7 + BIT, 5 + BIT), "eval": (3.0, 3.0),
    },
    "add_batch_norm_act": {"forward": (5.0, 4.0), "backward": (6.0, 4.0), "eval": (4.0, 4.0)},
}  # fmt: skip
# The same of others, not counted here: what attorch's kernels and Inductor's generated code were read to move (of a
# range, the least), and the floor: statistics from the convolution or on-chip, and in evaluation folded into the
# convolution. None: not known.
PEERS = ("attorch_passes", "inductor_passes", "floor_passes")
OTHERS: dict[str, dict[str, tuple[float | None, ...]]] = {
    "batch_norm_act": {"forward": (4, 3, 2), "backward": (8, 5, 3), "eval": (2, 2, 0)},
    "batch_norm_act + residual": {"forward": (5, 4, 3), "backward": (8, 7, 4), "eval": (3, 3, 0)},
}
UNKNOWN: dict[str, tuple[float | None, ...]] = dict.fromkeys(("forward", "backward", "eval"), (None, None, None))
VECTORS = ("running_mean", "running_var", "weight", "bias")
MARGIN = 1.05  # over the budget
LAUNCHES = {"forward": 2, "backward": 2, "eval": 1}


class Case(NamedTuple):
    """A key of ``BUDGET``, and what it is called with."""

    workload: str
    shape: tuple[int, ...]
    layout: str

    @property
    def on_chip(self) -> bool:
        return self.shape == ON_CHIP

    @property
    def forked(self) -> bool:
        """Two readers, of which each has a gradient."""
        return self.workload.startswith("forked")

    @property
    def rows(self) -> int:
        return self.shape[0] * math.prod(self.shape[2:])

    @property
    def extents(self) -> tuple[int, ...]:
        return (self.shape[1] if self.layout == "channels-last" else math.prod(self.shape[2:]),)

    def budget(self, phase: str) -> float:
        return BUDGET[self.workload][phase][self.on_chip]

    def launches(self, phase: str) -> int:
        return 1 if self.on_chip else LAUNCHES[phase]

    def inputs(self) -> dict[str, Tensor]:
        channels = self.shape[1]
        activations = {"input": self._activation().to(DTYPE).requires_grad_()}
        if self.workload != "batch_norm_act":
            activations["residual"] = self._activation().to(DTYPE).requires_grad_()
        return activations | {
            "weight": (torch.rand(channels) + 0.5).requires_grad_(),
            "bias": torch.randn(channels).requires_grad_(),
            "running_mean": torch.zeros(channels),
            "running_var": torch.ones(channels),
        }

    def _activation(self) -> Tensor:
        memory_format = torch.channels_last if self.layout == "channels-last" else torch.contiguous_format
        return torch.randn(self.shape).to(memory_format=memory_format)

    def cotangents(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        total, added = self._summands(tensors)
        ties = _ties(total, added, tensors["weight"], tensors["bias"])
        last = self._activation().masked_fill_(ties, 0)  # in place, which keeps the layout
        if self.forked:
            return [self._activation().masked_fill_(ties, 0), last]
        return [last] if total is tensors["input"] else [self._activation(), last]

    def fused(self, tensors: dict[str, Tensor], training: bool) -> tuple[Tensor, ...]:
        given = tensors | {name: tensors[name].clone() for name in ("running_mean", "running_var")}
        if self.forked:
            norm = functional.Norm(*(given[name] for name in VECTORS), training=training)
            return functional.forked_batch_norm_act(given["input"], norm, residual=given["residual"], act="relu")
        outputs = getattr(functional, self.workload.split()[0])(**given, training=training, act="relu")
        return (outputs,) if isinstance(outputs, Tensor) else outputs

    def eager(self, tensors: dict[str, Tensor], training: bool) -> tuple[Tensor, ...]:
        total, added = self._summands(tensors)
        mean, var = tensors["running_mean"].clone(), tensors["running_var"].clone()
        z = F.batch_norm(total, mean, var, tensors["weight"], tensors["bias"], training)
        out = torch.relu(z if added is None else z + added)
        if self.forked:
            return out, out
        return (out,) if total is tensors["input"] else (total, out)

    def _summands(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """What is normalised, and what is added to that."""
        input, residual = tensors["input"], tensors.get("residual")
        if self.workload == "add_batch_norm_act":
            return input + tensors["residual"], None
        return input, residual

    def meter(self, tensors: dict[str, Tensor]) -> TrafficMeter:
        return TrafficMeter(tensors["input"])

    def complaints(self, phase: str, meter: TrafficMeter) -> list[str]:
        return over_budget(meter, self.budget(phase), self.launches(phase))

    def figures(self, phase: str, meter: TrafficMeter, eager: TrafficMeter) -> dict[str, float | None]:
        others = dict(zip(PEERS, OTHERS.get(self.workload, UNKNOWN)[phase], strict=True))
        return passes(meter, eager, self.budget(phase)) | others


# Workers take every other case: neighbours differ in layout, which costs little, and not in shape or workload.
CASES = [Case(workload, shape, layout) for shape in SHAPES for workload in BUDGET for layout in LAYOUTS]


def over_budget(meter: TrafficMeter, budget: float, launches: int) -> list[str]:
    """What is more than so many passes over an activation and so many launches."""
    found, total = [], meter.passes + meter.aten_passes
    if total > MARGIN * budget:
        found.append(f"{total:.2f} passes over an activation, more than {budget:.2f}")
    if len(meter.launches) > launches:
        found.append(f"{len(meter.launches)} launches, more than {launches}")
    return found


def passes(meter: TrafficMeter, eager: TrafficMeter, budget: float) -> dict[str, float | None]:
    """What was moved, in passes over an activation."""
    return {
        "passes": round(meter.passes, 4),
        "distinct_passes": round(meter.distinct_passes, 4),
        "aten_passes": round(meter.aten_passes, 4),
        "budget_passes": budget,
        "eager_passes": round(eager.aten_passes, 4),
        "vector_share": round(meter.vector_bytes / meter.issued_bytes, 5),
    }


def _ties(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """Where |z| is within 8 eps of the magnitudes it is the sum of."""
    z, size = normalised(x, weight, bias)
    if residual is not None:
        z, size = z + residual, size + residual.abs()
    return z.abs() <= 8 * torch.finfo(DTYPE).eps * size


def normalised(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """x normalised over its batch, and the magnitudes that the result is the sum of."""
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    scale = weight.view(1, -1, 1, 1) * torch.rsqrt(var + 1e-5)
    shift = bias.view(1, -1, 1, 1) - mean * scale
    return x * scale + shift, (x * scale).abs() + shift.abs()
