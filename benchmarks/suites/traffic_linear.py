"""Traffic of the functions of LayerNorm and Linear: what is called, and the bytes it may move.

A product reads its operands many times, all but the first time from a cache, so budgets are of distinct bytes: every
byte once a tensor, a launch and a direction. The products of the vendor library are counted beside the kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.errors import undecided
from benchmarks.instruments.meter import TrafficMeter
from fusedres import functional

DTYPE = torch.bfloat16
NORM_FIRST, LINEAR_FIRST = "layer_norm_linear_act", "linear_layer_norm_act"
WIDE = (128, 256, 1100)  # the vendor library multiplies in the forward too
MARGIN = 0.05
SHAPES = ((10240, 128, 64), (64, 512, 512), (175, 300, 200), WIDE)


class Budget(NamedTuple):
    """Bytes that the kernels may move, bytes that the vendor's products move, and launches."""

    kernels: int
    vendor: int
    launches: int


class Case(NamedTuple):
    """One of the functions, and M, K, N: rows of K features in, of N out."""

    workload: str
    shape: tuple[int, ...]
    layout: str = "contiguous"

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def extents(self) -> tuple[int, ...]:
        return self.shape[1:]

    def budget(self, phase: str) -> Budget:
        M, K, N = self.shape
        itemsize = DTYPE.itemsize
        x, weight, y = M * K * itemsize, N * K * itemsize, M * N * itemsize
        product = x + weight + y  # two of them read, one written, in the forward and for either gradient
        residual = y if "residual" in self.workload else 0
        if phase == "backward":  # dy and y in, g out; g·W and x in, dx and the normalised x out
            return Budget(3 * y + 4 * x, 2 * product, 3) if self._norm_first else Budget(3 * y, 2 * product, 2)
        if self.shape == WIDE:  # a row kernel before or after the product
            # The vendor has no ReLU that is known to keep NaN: one more pass.
            return Budget(2 * x, product + 2 * y, 1) if self._norm_first else Budget(2 * y + residual, product, 1)
        saved = 0 if self._norm_first or phase == "eval" else y
        return Budget(product + residual + saved, 0, 1)

    @property
    def _norm_first(self) -> bool:
        return self.workload == NORM_FIRST

    def inputs(self) -> dict[str, Tensor]:
        M, K, N = self.shape
        normalised = K if self._norm_first else N
        tensors = {
            "input": torch.randn(M, K),
            "ln_weight": torch.rand(normalised) + 0.5,
            "ln_bias": torch.randn(normalised),
            "weight": torch.randn(N, K) / K**0.5,
            "bias": torch.randn(N),
        }
        if "residual" in self.workload:
            tensors["residual"] = torch.randn(M, N)
        return {name: tensor.to(DTYPE).requires_grad_() for name, tensor in tensors.items()}

    def cotangents(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        z = self._before_act(tensors)
        return [torch.randn(z.shape).masked_fill(undecided(z, DTYPE), 0)]

    def fused(self, tensors: dict[str, Tensor], training: bool) -> tuple[Tensor, ...]:
        del training  # the backward's needs are known from the gradients that are wanted
        function = getattr(functional, self.workload.split()[0])
        return (function(**tensors, act="relu"),)

    def eager(self, tensors: dict[str, Tensor], training: bool) -> tuple[Tensor, ...]:
        del training
        out = torch.relu(self._before_act(tensors))
        return (out + tensors["residual"] if "residual" in tensors else out,)

    def _before_act(self, tensors: dict[str, Tensor]) -> Tensor:
        x = self._norm(tensors["input"], tensors) if self._norm_first else tensors["input"]
        z = F.linear(x, tensors["weight"], tensors["bias"])
        return z if self._norm_first else self._norm(z, tensors)

    @staticmethod
    def _norm(x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors["ln_weight"], tensors["ln_bias"])

    def meter(self, tensors: dict[str, Tensor]) -> TrafficMeter:
        M, K, N = self.shape
        return TrafficMeter(tensors["input"], sizes=(M * K, N * K, M * N))

    def complaints(self, phase: str, meter: TrafficMeter) -> list[str]:
        """More than the budget, and less: then it is no longer what the kernels move."""
        budget, found = self.budget(phase), []
        for who, there, wanted in (
            ("kernels", meter.distinct_bytes, budget.kernels),
            ("the vendor's products", meter.aten_bytes, budget.vendor),
        ):
            if abs(there - wanted) > MARGIN * wanted:
                found.append(f"{there} bytes moved by {who}, not {wanted}")
        if len(meter.launches) != budget.launches:
            found.append(f"{len(meter.launches)} launches, not {budget.launches}")
        return found

    def figures(self, phase: str, meter: TrafficMeter, eager: TrafficMeter) -> dict[str, float | None]:
        del eager
        budget = self.budget(phase)
        return {
            "distinct_bytes": float(meter.distinct_bytes),
            "budget_bytes": float(budget.kernels),
            "aten_bytes": float(meter.aten_bytes),
            "aten_budget_bytes": float(budget.vendor),
            "vector_share": round(meter.vector_bytes / (meter.distinct_bytes + meter.aten_bytes), 5),
        }


CASES = [
    Case(workload, shape) for shape in SHAPES for workload in (NORM_FIRST, LINEAR_FIRST, f"{LINEAR_FIRST} + residual")
]
