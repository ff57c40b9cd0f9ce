"""Backward kernels of act(bn_a(a) + bn_b(b)), and their launchers.

With g = dy where the ReLU was open, both inputs have the gradient of their own normalisation at g:
dx = scale·(g − Σg/M − (x − mean)·rstd²·Σg·(x − mean)/M), or scale·g with frozen statistics. One reduction serves both.
"""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false
# (the device language only looks like Python)
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels import tiling
from fusedres.kernels._common import (
    _aligned_extents,
    _arrive,
    _positive,
    _sum_partials,
    _sum_rows,
    _tile_offsets,
)
from fusedres.kernels.batch_norm_join import _centred, _join, _load_map
from fusedres.kernels.layout import Rows, rows
from fusedres.kernels.tiling import Tiling
from fusedres.kernels.workspace import counters, num_sms, on_device


class Gradients(NamedTuple):
    """What the backward returns; ``None`` where it was not asked for.

    ``parameters`` [4, C] in float32 are those of a's weight and bias and of b's.
    """

    a: Tensor | None
    b: Tensor | None
    parameters: Tensor | None


@triton.jit
def _gradient_tile(
    dy_ptr, dfork_ptr, a_ptr, b_ptr, map_a, map_b, base, offsets, mask,
    RELU: tl.constexpr, NEEDS_INPUTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(g, a − mean, b − mean) of one tile; the last two are not loaded, and 0, unless NEEDS_INPUTS.

    A sum of two gradients is rounded to their dtype, as it may be stored, and as eager rounds it.
    """
    g = tl.load(dy_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    if dfork_ptr is not None:
        g += tl.load(dfork_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        g = g.to(dy_ptr.dtype.element_ty).to(tl.float32)
    a_centred = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    b_centred = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    if NEEDS_INPUTS:
        a_centred = _centred(a_ptr, map_a[0], base, offsets, mask)
        b_centred = _centred(b_ptr, map_b[0], base, offsets, mask)
    if RELU:
        g = tl.where(_positive(_join(a_centred, b_centred, map_a, map_b), dy_ptr.dtype.element_ty), g, 0.0)
    return g, a_centred, b_centred


@triton.jit
def _store_frozen(dx_ptr, g, scale, base, offsets, mask):
    if dx_ptr is not None:
        tl.store(dx_ptr + base + offsets, (g * scale[None, :]).to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_gradient(dx_ptr, g_centred, x_centred, scale, mean_gx, base, offsets, mask):
    if dx_ptr is not None:
        dx = scale[None, :] * (g_centred - x_centred * mean_gx[None, :])
        tl.store(dx_ptr + base + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_sums(sums_ptr, sum_g, dweight_a, dweight_b, offs_c, mask_c, C):
    """The gradients of the parameters; both biases have the same."""
    tl.store(sums_ptr + offs_c, dweight_a, mask=mask_c)
    tl.store(sums_ptr + C + offs_c, sum_g, mask=mask_c)
    tl.store(sums_ptr + 2 * C + offs_c, dweight_b, mask=mask_c)
    tl.store(sums_ptr + 3 * C + offs_c, sum_g, mask=mask_c)


@triton.jit(do_not_specialize=["M", "C", "S"])
def _batch_norm_join_bwd_reduce_kernel(
    dy_ptr, dfork_ptr, a_ptr, b_ptr, stats_a_ptr, stats_b_ptr, counters_ptr, partials_ptr, sums_ptr, dsum_ptr,
    da_ptr, db_ptr,
    M, C, S,
    RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    M, C, S = _aligned_extents(M, C, S, CHANNELS_LAST, ALIGN)
    pid_c, pid_m, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    map_a = _load_map(stats_a_ptr, offs_c, mask_c, C)
    map_b = _load_map(stats_b_ptr, offs_c, mask_c, C)

    sum_g = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    sum_ga = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    sum_gb = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    for row0 in range(pid_m.to(tl.int64) * BLOCK_M, M, programs * BLOCK_M):
        mask = (row0 + tl.arange(0, BLOCK_M) < M)[:, None] & mask_c[None, :]
        base, offsets = _tile_offsets(row0, offs_c, C, S, BLOCK_M, CHANNELS_LAST)
        g, a_centred, b_centred = _gradient_tile(
            dy_ptr, dfork_ptr, a_ptr, b_ptr, map_a, map_b, base, offsets, mask,
            RELU, RELU or sums_ptr is not None, BLOCK_M, BLOCK_C,
        )  # fmt: skip
        if dsum_ptr is not None:
            tl.store(dsum_ptr + base + offsets, g.to(dsum_ptr.dtype.element_ty), mask=mask)
        sum_g += g
        sum_ga += g * a_centred
        sum_gb += g * b_centred
        _store_frozen(da_ptr, g, map_a[1], base, offsets, mask)
        _store_frozen(db_ptr, g, map_b[1], base, offsets, mask)

    if sums_ptr is not None:
        counter_ptr, plane = counters_ptr + 1 + pid_c, programs * C
        partial_ptr = partials_ptr + pid_m * C + offs_c
        tl.store(partial_ptr, _sum_rows(sum_g), mask=mask_c)
        tl.store(partial_ptr + plane, _sum_rows(sum_ga), mask=mask_c)
        tl.store(partial_ptr + 2 * plane, _sum_rows(sum_gb), mask=mask_c)
        if _arrive(counter_ptr) == programs - 1:
            all_g = _sum_partials(partials_ptr, offs_c, mask_c, C, programs, BLOCK_C, BLOCK_P)
            all_ga = _sum_partials(partials_ptr + plane, offs_c, mask_c, C, programs, BLOCK_C, BLOCK_P)
            all_gb = _sum_partials(partials_ptr + 2 * plane, offs_c, mask_c, C, programs, BLOCK_C, BLOCK_P)
            rstd_a = tl.load(stats_a_ptr + C + offs_c, mask=mask_c, other=0.0)
            rstd_b = tl.load(stats_b_ptr + C + offs_c, mask=mask_c, other=0.0)
            _store_sums(sums_ptr, all_g, all_ga * rstd_a, all_gb * rstd_b, offs_c, mask_c, C)
            tl.store(counter_ptr, 0)


@triton.jit(do_not_specialize=["M", "C", "S"])
def _batch_norm_join_bwd_apply_kernel(
    g_ptr, a_ptr, b_ptr, stats_a_ptr, stats_b_ptr, sums_ptr, da_ptr, db_ptr,
    M, C, S,
    RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    M, C, S = _aligned_extents(M, C, S, CHANNELS_LAST, ALIGN)
    channel_tiles = tl.cdiv(C, BLOCK_C)
    # Backwards through memory: what the reduction read last is still in the L2 cache.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    pid_m = pid // channel_tiles
    offs_c = pid % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    map_a = _load_map(stats_a_ptr, offs_c, mask_c, C)
    map_b = _load_map(stats_b_ptr, offs_c, mask_c, C)
    rstd_a = tl.load(stats_a_ptr + C + offs_c, mask=mask_c, other=0.0)
    rstd_b = tl.load(stats_b_ptr + C + offs_c, mask=mask_c, other=0.0)
    count = M.to(tl.float32)
    mean_ga = rstd_a * (tl.load(sums_ptr + offs_c, mask=mask_c, other=0.0) / count)
    mean_g = tl.load(sums_ptr + C + offs_c, mask=mask_c, other=0.0) / count
    mean_gb = rstd_b * (tl.load(sums_ptr + 2 * C + offs_c, mask=mask_c, other=0.0) / count)

    first = pid_m.to(tl.int64) * (TILES * BLOCK_M)
    for row0 in range(first, tl.minimum(first + TILES * BLOCK_M, M), BLOCK_M):
        mask = (row0 + tl.arange(0, BLOCK_M) < M)[:, None] & mask_c[None, :]
        base, offsets = _tile_offsets(row0, offs_c, C, S, BLOCK_M, CHANNELS_LAST)
        g, a_centred, b_centred = _gradient_tile(
            g_ptr, None, a_ptr, b_ptr, map_a, map_b, base, offsets, mask, RELU, True, BLOCK_M, BLOCK_C
        )  # fmt: skip
        g -= mean_g[None, :]
        _store_gradient(da_ptr, g, a_centred, map_a[1], mean_ga, base, offsets, mask)
        _store_gradient(db_ptr, g, b_centred, map_b[1], mean_gb, base, offsets, mask)


@triton.jit(do_not_specialize=["M", "C", "S"])
def _batch_norm_join_bwd_on_chip_kernel(
    dy_ptr, dfork_ptr, a_ptr, b_ptr, stats_a_ptr, stats_b_ptr, sums_ptr, da_ptr, db_ptr,
    M, C, S,
    RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    M, C, S = _aligned_extents(M, C, S, CHANNELS_LAST, ALIGN)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    map_a = _load_map(stats_a_ptr, offs_c, mask_c, C)
    map_b = _load_map(stats_b_ptr, offs_c, mask_c, C)
    rstd_a = tl.load(stats_a_ptr + C + offs_c, mask=mask_c, other=0.0)
    rstd_b = tl.load(stats_b_ptr + C + offs_c, mask=mask_c, other=0.0)

    row0 = tl.full([], 0, dtype=tl.int64)
    mask = (tl.arange(0, BLOCK_M) < M)[:, None] & mask_c[None, :]
    base, offsets = _tile_offsets(row0, offs_c, C, S, BLOCK_M, CHANNELS_LAST)
    g, a_centred, b_centred = _gradient_tile(
        dy_ptr, dfork_ptr, a_ptr, b_ptr, map_a, map_b, base, offsets, mask, RELU, True, BLOCK_M, BLOCK_C
    )  # fmt: skip
    sum_g = _sum_rows(g)
    dweight_a = _sum_rows(g * a_centred) * rstd_a
    dweight_b = _sum_rows(g * b_centred) * rstd_b
    if sums_ptr is not None:
        _store_sums(sums_ptr, sum_g, dweight_a, dweight_b, offs_c, mask_c, C)
    count = M.to(tl.float32)
    mean_g, mean_ga, mean_gb = sum_g / count, rstd_a * (dweight_a / count), rstd_b * (dweight_b / count)
    g -= mean_g[None, :]
    _store_gradient(da_ptr, g, a_centred, map_a[1], mean_ga, base, offsets, mask)
    _store_gradient(db_ptr, g, b_centred, map_b[1], mean_gb, base, offsets, mask)


def batch_norm_join_bwd_reduce(
    dy: Tensor, dfork: Tensor | None, a: Tensor, b: Tensor, stats_a: Tensor, stats_b: Tensor, view: Rows,
    act: str | None, out: Gradients, dsum: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill the parameter gradients of ``out``, which the apply kernel needs too, and ``dsum`` with g.

    ``out.a`` or ``out.b`` given: the statistics were frozen, and this launch writes them too. Reads dy and dfork, and
    a and b unless nothing needs them; one launch.
    """
    config = tiling.reduction(view, a.itemsize, num_sms(a.device), tensors=2)
    sums, partials = out.parameters, None
    if sums is not None:
        partials = torch.empty((3, config.programs, view.C), dtype=torch.float32, device=a.device)
    with on_device(a.device):
        _batch_norm_join_bwd_reduce_kernel[config.channel_tiles, config.programs](
            dy, dfork, a, b, stats_a, stats_b, None if sums is None else counters(a.device), partials, sums, dsum,
            out.a, out.b,
            view.M, view.C, view.S,
            RELU=act == "relu", CHANNELS_LAST=view.channels_last, ALIGN=view.align,
            BLOCK_M=config.block_m, BLOCK_C=config.block_c, BLOCK_P=16, num_warps=config.num_warps,
        )  # fmt: skip


def batch_norm_join_bwd_apply(
    g: Tensor, a: Tensor, b: Tensor, stats_a: Tensor, stats_b: Tensor, view: Rows, act: str | None, out: Gradients
) -> None:
    """Fill ``out.a`` and ``out.b`` from ``out.parameters``; either may be g, of which every element is read once.

    Reads g (or dy, with ``act``), a and b, writes both gradients; one launch.
    """
    config = tiling.elementwise(view, a.itemsize, tensors=2)
    with on_device(a.device):
        _batch_norm_join_bwd_apply_kernel[config.grid](
            g, a, b, stats_a, stats_b, out.parameters, out.a, out.b,
            view.M, view.C, view.S,
            RELU=act == "relu", CHANNELS_LAST=view.channels_last, ALIGN=view.align,
            TILES=config.tiles, BLOCK_M=config.block_m, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip


def batch_norm_join_bwd_on_chip(
    dy: Tensor, dfork: Tensor | None, a: Tensor, b: Tensor, stats_a: Tensor, stats_b: Tensor, view: Rows,
    config: Tiling, act: str | None, out: Gradients,
) -> None:  # fmt: skip
    """Fill ``out`` in one launch: reads dy, dfork, a and b once, writes both gradients."""
    with on_device(a.device):
        _batch_norm_join_bwd_on_chip_kernel[config.grid](
            dy, dfork, a, b, stats_a, stats_b, out.parameters, out.a, out.b,
            view.M, view.C, view.S,
            RELU=act == "relu", CHANNELS_LAST=view.channels_last, ALIGN=view.align,
            BLOCK_M=config.block_m, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip


def batch_norm_join_backward(
    dy: Tensor, dfork: Tensor | None, a: Tensor, b: Tensor, stats_a: Tensor, stats_b: Tensor, act: str | None,
    frozen: bool, out: Gradients,
) -> None:  # fmt: skip
    """Fill the tensors of ``out``; dy, dfork, b and the gradients of a and b have a's dtype and strides.

    ``dfork`` is the gradient of the output's second name, added to dy. One launch with frozen statistics or where a
    channel tile of both inputs fits on-chip, else two, between which ``out.parameters`` must be given.
    """
    view = rows(a)
    given = (dy, dfork, a, b, stats_a, stats_b, view)
    if frozen:
        batch_norm_join_bwd_reduce(*given, act, out)
        return
    config = tiling.on_chip(view, a.itemsize, tensors=2)
    if config is not None:
        batch_norm_join_bwd_on_chip(*given, config, act, out)
        return
    dx = out.a if out.a is not None else out.b
    # Two gradients are read once: their sum goes where the gradient of an input will be.
    dsum = None if dfork is None else dx
    batch_norm_join_bwd_reduce(*given, act, out._replace(a=None, b=None), dsum)
    if dx is not None:
        g, masking = (dy, act) if dsum is None else (dsum, None)
        batch_norm_join_bwd_apply(g, *given[2:], masking, out)
