"""How the probe measures: the two routes of a 1x1 convolution, their check and their times."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from benchmarks import timing
from benchmarks.errors import allowed, errors
from benchmarks.instruments.probe_kernels import EPS, TILES, Prologue, Tile, conv1x1
from benchmarks.results import Row
from benchmarks.suites.probe import CUDNN, TRITON, Probed
from benchmarks.timing import Step
from fusedres.functional import batch_norm_act
from fusedres.kernels.batch_norm_statistics import batch_norm_fwd_stats
from fusedres.kernels.layout import rows
from fusedres.norm import Norm

ROUNDS, TRIAL_ROUNDS = 50, 7
Outcome = tuple[Tensor, Tensor | None]  # the output; mean and 1 / standard deviation of its channels
Route = Callable[[Tensor], Outcome]


class Operands:
    """The tensors of a case: inputs in rotation, so that the L2 cache holds none of them, and what is done to them."""

    def __init__(self, case: Probed, device: torch.device) -> None:
        torch.manual_seed(0)
        of, dtype = case.of, getattr(torch, case.dtype)
        shape = (case.batch, of.inputs, of.size, of.size)
        size = dtype.itemsize * (case.batch * of.inputs * of.size**2)
        self.device, self.stride = device, of.stride
        self.xs = [
            torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
            for _ in range(timing.input_sets(size, device))
        ]
        self.weight = (torch.randn(of.outputs, of.inputs, device=device) / of.inputs**0.5).to(dtype)
        self.mean, self.shift = (torch.randn(of.inputs, device=device) for _ in range(2))
        self.var, self.gamma = (torch.rand(of.inputs, device=device) + 0.5 for _ in range(2))
        self.prologue = Prologue(self.mean, self.gamma * (self.var + EPS).rsqrt(), self.shift)

    def separate(self, x: Tensor, *, mode: str) -> Outcome:
        """The vendor's convolution between kernels of the package."""
        if mode in ("prologue", "both"):
            x = batch_norm_act(x, self.mean, self.var, self.gamma, self.shift, eps=EPS, act="relu")
        y = F.conv2d(x, self.weight[:, :, None, None], stride=self.stride)
        return y, _statistics(y) if mode in ("statistics", "both") else None

    def exact(self, x: Tensor, mode: str) -> Tensor:
        """The output in float64; the normalised input is rounded to the dtype, as both routes round it."""
        double = x.double()
        if mode in ("prologue", "both"):
            mean, var, gamma, shift = (t.double() for t in (self.mean, self.var, self.gamma, self.shift))
            double = F.batch_norm(double, mean, var, gamma, shift, eps=EPS).relu().to(x.dtype).double()
        pixels = double.permute(0, 2, 3, 1)[:, :: self.stride, :: self.stride]
        return (pixels @ self.weight.double().t()).permute(0, 3, 1, 2)

    def fused(self, x: Tensor, *, mode: str, tile: Tile) -> Outcome:
        prologue = self.prologue if mode in ("prologue", "both") else None
        return conv1x1(
            x, self.weight, self.stride, tile, prologue=prologue, statistics=mode in ("statistics", "both")
        )  # fmt: skip

    def step(self, route: Route) -> Step:
        return lambda turn, mark: route(self.xs[turn % len(self.xs)])


def _statistics(y: Tensor) -> Tensor:
    return batch_norm_fwd_stats(y, rows(y), Norm(None, None, training=True, eps=EPS))[:2]


def measure(case: Probed, device: torch.device) -> list[Row]:
    """All rows of a case: a check of every route, then all of them in turn."""
    operands = Operands(case, device)
    routes: dict[tuple[str, str], Route] = {}
    notes: dict[tuple[str, str], str] = {}
    for mode in case.of.modes:
        tile = best_tile(operands, mode, case.of.outputs)
        routes[mode, CUDNN] = partial(operands.separate, mode=mode)
        routes[mode, TRITON] = partial(operands.fused, mode=mode, tile=tile)
        notes[mode, TRITON] = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
    verdicts = {mode: check(operands, mode, routes[mode, CUDNN], routes[mode, TRITON]) for mode in case.of.modes}
    steps = {f"{mode}/{provider}": operands.step(route) for (mode, provider), route in routes.items()}
    samples = timing.interleave(steps, device, ROUNDS, queued=True)
    rows = []
    for mode, provider in routes:
        row = case.row(mode, provider, note=notes.get((mode, provider), ""))
        taken = samples[f"{mode}/{provider}"]
        row.figures = timing.summary(taken) | {"count": case.of.count} | _rates(case, taken)
        if provider == TRITON:
            row.check = verdicts[mode]
            row.status = "ok" if row.check["ok"] else "WRONG"
            if row.check["ok"]:
                row.figures |= timing.speedup(samples[f"{mode}/{CUDNN}"], taken)
        rows.append(row)
    return rows


def best_tile(operands: Operands, mode: str, outputs: int) -> Tile:
    """The fastest candidate for this shape and mode; those that do not fit the device, or twice the row, drop out."""
    trials: dict[str, Step] = {}
    tiles = {str(tuple(tile)): tile for tile in TILES if tile.block_n < 2 * outputs}
    for name, tile in tiles.items():
        step = operands.step(partial(operands.fused, mode=mode, tile=tile))
        try:
            timing.seconds(step, operands.device)
        except triton.OutOfResources:
            continue
        trials[name] = step
    samples = timing.interleave(trials, operands.device, TRIAL_ROUNDS, queued=True)
    return tiles[min(samples, key=lambda name: median(sum(parts) for parts in samples[name]))]


def check(operands: Operands, mode: str, separate: Route, fused: Route) -> dict[str, Any]:
    """The fused output against float64, its statistics against those of what it wrote; errors as cuDNN's route's."""
    x = operands.xs[0]
    exact = operands.exact(x, mode)
    verdict: dict[str, Any] = {"ok": True}
    (theirs, their_stats), (ours, our_stats) = separate(x), fused(x)
    compared = [("output", errors(ours, exact), errors(theirs, exact), x.dtype)]
    if our_stats is not None and their_stats is not None:
        wanted, reference = _moments(ours), _moments(theirs)
        for i, name in enumerate(("mean", "rstd")):
            found = errors(our_stats[i], wanted[i]), errors(their_stats[i], reference[i])
            compared.append((name, *found, torch.float32))
    for name, errors_found, errors_theirs, dtype in compared:
        for norm, error, peer in zip(("l2", "max"), errors_found, errors_theirs, strict=True):
            limit = allowed(peer, dtype)
            verdict["ok"] &= error <= limit < math.inf
            verdict[f"{name}_{norm}"] = [float(f"{error:.3g}"), float(f"{limit:.3g}")]
    return verdict


def _moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of the channels in float64."""
    var, mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    return mean, (var + EPS).rsqrt()


def _rates(case: Probed, samples: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """What the convolution alone must move and compute, over the time of the whole route."""
    of, pixels = case.of, case.batch * (case.of.size // case.of.stride) ** 2
    ms = median(sum(parts) for parts in samples)
    moved = getattr(torch, case.dtype).itemsize * (pixels * (of.inputs + of.outputs) + of.inputs * of.outputs)
    return {
        "gb_s": round(moved / ms / 1e6, 1),
        "tflop_s": round(2 * pixels * of.inputs * of.outputs / ms / 1e9, 2),
    }
