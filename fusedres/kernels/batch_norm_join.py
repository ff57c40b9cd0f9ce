"""Forward kernels of act(bn_a(a) + bn_b(b)), the join of a projection block, and their launchers.

Statistics are those of ``batch_norm_statistics``: one ``stats`` [4, C] for each input. Nothing is saved for the ReLU:
the backward has both inputs to read in any case, and finds the sign again from them.
"""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false
# (the device language only looks like Python)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels import tiling
from fusedres.kernels._common import (
    _aligned_extents,
    _moments,
    _normalise,
    _positive,
    _tile_offsets,
)
from fusedres.kernels.batch_norm_statistics import UNUSED, _affine, _update_running, batch_norm_fwd_stats
from fusedres.kernels.layout import Rows, rows
from fusedres.kernels.tiling import Tiling
from fusedres.kernels.workspace import counters, on_device
from fusedres.norm import Norm

# In the kernels norm[0] is the weight, [1] the bias, [2] and [3] the running mean and variance, [4] the batch counter
# and [5] the momentum, each None where there is none.


@triton.jit
def _load_map(stats_ptr, offs_c, mask_c, C):
    """(mean, scale, shift) of the channels."""
    mean = tl.load(stats_ptr + offs_c, mask=mask_c, other=0.0)
    scale = tl.load(stats_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)
    shift = tl.load(stats_ptr + 3 * C + offs_c, mask=mask_c, other=0.0)
    return mean, scale, shift


@triton.jit
def _running_map(norm, stats_ptr, offs_c, mask_c, store, C, EPS: tl.constexpr):
    """The same from the running statistics; fills ``stats`` where it is given."""
    mean = tl.load(norm[2] + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    var = tl.load(norm[3] + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    scale, shift = _affine(mean, var, norm[0], norm[1], stats_ptr, offs_c, mask_c, store, C, EPS)
    return mean, scale, shift


@triton.jit
def _batch_map(
    x, mask_m, norm, stats_ptr, counters_ptr, offs_c, mask_c, M, C, PLACE: tl.constexpr, EPS: tl.constexpr
):  # fmt: skip
    """The same from all values x of the channels; fills ``stats``, updates the running statistics.

    PLACE: of the counter that is the norm's own. There are none where no norm counts batches.
    """
    counter_ptr = counters_ptr
    if norm[4] is not None:
        counter_ptr = counters_ptr + PLACE
    mean, var = _moments(mask_m.to(tl.float32), x, 0.0)
    scale, shift = _affine(mean, var, norm[0], norm[1], stats_ptr, offs_c, mask_c, True, C, EPS)
    _update_running(
        mean, var, M, norm[2], norm[3], norm[4], counter_ptr, tl.num_programs(0), norm[5], offs_c, mask_c
    )  # fmt: skip
    return mean, scale, shift


@triton.jit
def _centred(x_ptr, mean, base, offsets, mask):
    return tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32) - mean[None, :]


@triton.jit
def _join(a_centred, b_centred, map_a, map_b):
    """The sum of both normalisations, in one order, so that the backward finds the forward's sign."""
    return _normalise(a_centred, map_a[1], map_a[2]) + _normalise(b_centred, map_b[1], map_b[2])


@triton.jit
def _store_activation(z, y_ptr, base, offsets, mask, RELU: tl.constexpr):
    if RELU:
        z = tl.where(_positive(z, y_ptr.dtype.element_ty), z, 0.0)
    tl.store(y_ptr + base + offsets, z.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "C", "S"])
def _batch_norm_join_fwd_apply_kernel(
    a_ptr, b_ptr, stats_a_ptr, stats_b_ptr, norm_a, norm_b, y_ptr,
    M, C, S,
    EPS_A: tl.constexpr, EPS_B: tl.constexpr, RUNNING: tl.constexpr, RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    M, C, S = _aligned_extents(M, C, S, CHANNELS_LAST, ALIGN)
    channel_tiles = tl.cdiv(C, BLOCK_C)
    # Backwards through memory: what the statistics read last is still in the L2 cache.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    pid_m = pid // channel_tiles
    offs_c = pid % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    if RUNNING:
        map_a = _running_map(norm_a, stats_a_ptr, offs_c, mask_c, pid_m == 0, C, EPS_A)
        map_b = _running_map(norm_b, stats_b_ptr, offs_c, mask_c, pid_m == 0, C, EPS_B)
    else:
        map_a = _load_map(stats_a_ptr, offs_c, mask_c, C)
        map_b = _load_map(stats_b_ptr, offs_c, mask_c, C)

    first = pid_m.to(tl.int64) * (TILES * BLOCK_M)
    for row0 in range(first, tl.minimum(first + TILES * BLOCK_M, M), BLOCK_M):
        mask = (row0 + tl.arange(0, BLOCK_M) < M)[:, None] & mask_c[None, :]
        base, offsets = _tile_offsets(row0, offs_c, C, S, BLOCK_M, CHANNELS_LAST)
        a_centred = _centred(a_ptr, map_a[0], base, offsets, mask)
        b_centred = _centred(b_ptr, map_b[0], base, offsets, mask)
        _store_activation(_join(a_centred, b_centred, map_a, map_b), y_ptr, base, offsets, mask, RELU)


@triton.jit(do_not_specialize=["M", "C", "S"])
def _batch_norm_join_fwd_on_chip_kernel(
    a_ptr, b_ptr, counters_ptr, stats_a_ptr, stats_b_ptr, norm_a, norm_b, y_ptr,
    M, C, S,
    EPS_A: tl.constexpr, EPS_B: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    M, C, S = _aligned_extents(M, C, S, CHANNELS_LAST, ALIGN)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    row0 = tl.full([], 0, dtype=tl.int64)
    mask_m = (tl.arange(0, BLOCK_M) < M)[:, None]
    mask = mask_m & mask_c[None, :]
    base, offsets = _tile_offsets(row0, offs_c, C, S, BLOCK_M, CHANNELS_LAST)
    a = tl.load(a_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    map_a = _batch_map(a, mask_m, norm_a, stats_a_ptr, counters_ptr, offs_c, mask_c, M, C, 0, EPS_A)
    map_b = _batch_map(b, mask_m, norm_b, stats_b_ptr, counters_ptr, offs_c, mask_c, M, C, 1, EPS_B)
    z = _join(a - map_a[0][None, :], b - map_b[0][None, :], map_a, map_b)
    _store_activation(z, y_ptr, base, offsets, mask, RELU)


def _arguments(norm: Norm) -> tuple[Tensor | float | None, ...]:
    """What a kernel takes as one argument; without what only training reads, each of which is a variant of its own."""
    mean, var, weight, bias, training, momentum, _, count = norm
    return (weight, bias, mean, var, count, momentum) if training else (weight, bias, mean, var, None, None)


def batch_norm_join_fwd_apply(
    a: Tensor,
    b: Tensor,
    view: Rows,
    stats_a: Tensor | None,
    stats_b: Tensor | None,
    norms: tuple[Norm, Norm] | None,
    act: str | None,
) -> Tensor:
    """y from ``stats``, or from the running statistics of ``norms``, which then fill ``stats`` where it is given.

    Reads a and b, writes y; one launch.
    """
    config = tiling.elementwise(view, a.itemsize)
    y = torch.empty_like(a)
    norm_a, norm_b = norms or (UNUSED, UNUSED)
    with on_device(a.device):
        _batch_norm_join_fwd_apply_kernel[config.grid](
            a, b, stats_a, stats_b, _arguments(norm_a), _arguments(norm_b), y,
            view.M, view.C, view.S,
            EPS_A=norm_a.eps, EPS_B=norm_b.eps, RUNNING=norms is not None, RELU=act == "relu",
            CHANNELS_LAST=view.channels_last, ALIGN=view.align,
            TILES=config.tiles, BLOCK_M=config.block_m, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip
    return y


def batch_norm_join_fwd_on_chip(
    a: Tensor, b: Tensor, view: Rows, config: Tiling, norm_a: Norm, norm_b: Norm, act: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, stats of a, stats of b); updates the running statistics. Reads a and b, writes y; one launch."""
    y = torch.empty_like(a)
    stats_a, stats_b = (torch.empty((4, view.C), dtype=torch.float32, device=a.device) for _ in range(2))
    counted = norm_a.num_batches_tracked is not None or norm_b.num_batches_tracked is not None
    with on_device(a.device):
        _batch_norm_join_fwd_on_chip_kernel[config.grid](
            a, b, counters(a.device) if counted else None, stats_a, stats_b, _arguments(norm_a), _arguments(norm_b), y,
            view.M, view.C, view.S,
            EPS_A=norm_a.eps, EPS_B=norm_b.eps, RELU=act == "relu", CHANNELS_LAST=view.channels_last, ALIGN=view.align,
            BLOCK_M=config.block_m, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip
    return y, stats_a, stats_b


def batch_norm_join_forward(
    a: Tensor, b: Tensor, norm_a: Norm, norm_b: Norm, act: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, stats of a, stats of b) with the statistics of the batch; b has a's dtype and strides.

    One launch where a channel tile of both fits on-chip, else three: statistics of a, of b, and the sum.
    """
    view = rows(a)
    config = tiling.on_chip(view, a.itemsize, tensors=2)
    if config is not None:
        return batch_norm_join_fwd_on_chip(a, b, view, config, norm_a, norm_b, act)
    stats_a = batch_norm_fwd_stats(a, view, norm_a)
    stats_b = batch_norm_fwd_stats(b, view, norm_b)
    return batch_norm_join_fwd_apply(a, b, view, stats_a, stats_b, None, act), stats_a, stats_b


def batch_norm_join_inference_forward(
    a: Tensor, b: Tensor, norm_a: Norm, norm_b: Norm, act: str | None, save_stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the running statistics, in one launch; ``stats`` are empty unless ``save_stats``."""
    view = rows(a)
    shape = (4, view.C) if save_stats else 0
    stats_a, stats_b = (torch.empty(shape, dtype=torch.float32, device=a.device) for _ in range(2))
    filled = (stats_a, stats_b) if save_stats else (None, None)
    return batch_norm_join_fwd_apply(a, b, view, *filled, (norm_a, norm_b), act), stats_a, stats_b
