"""Traffic of the projection join: what is called, and how often an activation may be read and written."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.instruments.meter import TrafficMeter
from benchmarks.suites import traffic_batch_norm
from benchmarks.suites.traffic_batch_norm import DTYPE, LAYOUTS, ON_CHIP, SHAPES
from fusedres import functional

FORKED = "batch_norm_add_batch_norm_act, forked"
# Passes over one activation: where the statistics take launches of their own, and where a channel tile fits on-chip.
BUDGET = {
    "batch_norm_add_batch_norm_act": {"forward": (5.0, 3.0), "backward": (8.0, 5.0), "eval": (3.0, 3.0)},
    FORKED: {"forward": (5.0, 3.0), "backward": (10.0, 6.0), "eval": (3.0, 3.0)},
}
LAUNCHES = {"forward": (3, 1), "backward": (2, 1), "eval": (1, 1)}
NORM = ("running_mean", "running_var", "weight", "bias")


class Case(NamedTuple):
    """A key of ``BUDGET``, and what it is called with."""

    workload: str
    shape: tuple[int, ...]
    layout: str

    @property
    def on_chip(self) -> bool:
        return self.shape == ON_CHIP

    @property
    def rows(self) -> int:
        return self._plain.rows

    @property
    def extents(self) -> tuple[int, ...]:
        return self._plain.extents

    @property
    def _plain(self) -> traffic_batch_norm.Case:
        """The same activation in a function of one norm."""
        return traffic_batch_norm.Case("batch_norm_act", self.shape, self.layout)

    def budget(self, phase: str) -> float:
        return BUDGET[self.workload][phase][self.on_chip]

    def inputs(self) -> dict[str, Tensor]:
        mine, others = self._plain.inputs(), self._plain.inputs()
        return mine | {"other": others.pop("input")} | {f"other_{name}": t for name, t in others.items()}

    def cotangents(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        z, size = torch.zeros_like(tensors["input"]), torch.zeros_like(tensors["input"])
        for x, prefix in ((tensors["input"], ""), (tensors["other"], "other_")):
            normalised, magnitude = traffic_batch_norm.normalised(
                x, tensors[f"{prefix}weight"], tensors[f"{prefix}bias"]
            )
            z, size = z + normalised, size + magnitude
        ties = z.abs() <= 8 * torch.finfo(DTYPE).eps * size
        return [torch.randn_like(z).masked_fill_(ties, 0) for _ in range(1 + (self.workload == FORKED))]

    def fused(self, tensors: dict[str, Tensor], training: bool) -> tuple[Tensor, ...]:
        norms = [
            functional.Norm(
                *(tensors[prefix + name].clone() if "running" in name else tensors[prefix + name] for name in NORM),
                training=training,
            )
            for prefix in ("", "other_")
        ]
        operands = tensors["input"], tensors["other"], *norms
        if self.workload == FORKED:
            return functional.forked_batch_norm_add_batch_norm_act(*operands, act="relu")
        return (functional.batch_norm_add_batch_norm_act(*operands, act="relu"),)

    def eager(self, tensors: dict[str, Tensor], training: bool) -> tuple[Tensor, ...]:
        terms = []
        for x, prefix in ((tensors["input"], ""), (tensors["other"], "other_")):
            mean, var, weight, bias = (tensors[prefix + name] for name in NORM)
            terms.append(F.batch_norm(x, mean.clone(), var.clone(), weight, bias, training))
        out = torch.relu(terms[0] + terms[1])
        return (out, out) if self.workload == FORKED else (out,)

    def meter(self, tensors: dict[str, Tensor]) -> TrafficMeter:
        return TrafficMeter(tensors["input"])

    def complaints(self, phase: str, meter: TrafficMeter) -> list[str]:
        return traffic_batch_norm.over_budget(meter, self.budget(phase), LAUNCHES[phase][self.on_chip])

    def figures(self, phase: str, meter: TrafficMeter, eager: TrafficMeter) -> dict[str, float | None]:
        return traffic_batch_norm.passes(meter, eager, self.budget(phase))


# The largest shape takes longest to interpret: once is enough.
CASES = [
    Case(workload, shape, layout)
    for shape in SHAPES
    for workload in BUDGET
    for layout in LAYOUTS
    if shape != SHAPES[0] or (workload, layout) == (next(iter(BUDGET)), LAYOUTS[0])
]
