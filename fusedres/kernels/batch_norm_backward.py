"""Backward kernels of act(batch_norm(x) + residual), and their launchers.

With g = dy where the ReLU was open, the sums Σg and Σg·(x − mean) give dβ and dγ and, when the statistics were
those of the batch, dx = scale·(g − Σg/M − (x − mean)·rstd²·Σg·(x − mean)/M). Frozen statistics: dx = scale·g.

Where x was a sum s that is an output too, the gradient ds that it receives as such is added to dx. Where y went to two
readers, dfork is the gradient of the second, and g = dy + dfork where the ReLU was open. The two never meet, and share
an argument of the kernels, ``other_ptr``; FORK says which it is.
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
    _arrive,
    _mask_offsets,
    _normalise,
    _positive,
    _sum_rows,
    _tile_offsets,
    _unpack_bits,
)
from fusedres.kernels.layout import Rows, rows
from fusedres.kernels.tiling import Tiling
from fusedres.kernels.workspace import counters, num_sms, on_device
from fusedres.norm import Gradients


@triton.jit
def _gradient_tile(
    dy_ptr, other_ptr, x_ptr, mask_ptr, mean, scale, shift, base, offsets, mask, row0, offs_c, M, C,
    RELU: tl.constexpr, FORK: tl.constexpr, NEEDS_X: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(g, x − mean) of one tile; the second is not loaded, and 0, unless NEEDS_X."""
    g = tl.load(dy_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    if FORK:
        g += tl.load(other_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    x_centred = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    if NEEDS_X:
        x_centred = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
    if RELU:
        if mask_ptr is not None:
            offs_b, valid_b = _mask_offsets(row0, offs_c, M, C, BLOCK_M, CHANNELS_LAST)
            packed = tl.load(mask_ptr + offs_b, mask=valid_b, other=0)
            keep = _unpack_bits(packed, BLOCK_M, BLOCK_C)
        else:
            keep = _positive(_normalise(x_centred, scale, shift), dy_ptr.dtype.element_ty)
        g = tl.where(keep, g, 0.0)
    return g, x_centred


@triton.jit
def _store_parameter_gradients(sum_g, sum_gx, rstd, dweight_ptr, dbias_ptr, offs_c, mask_c):
    if dweight_ptr is not None:
        tl.store(dweight_ptr + offs_c, sum_gx * rstd, mask=mask_c)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + offs_c, sum_g, mask=mask_c)


@triton.jit
def _finish_sums(
    sum_g, sum_gx, stats_ptr, counters_ptr, partials_ptr, means_ptr, dweight_ptr, dbias_ptr, offs_c, mask_c, M, C,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Add up the sums of all programs of a channel tile, in their order, and store what is made of them."""
    pid_c, pid_m, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    counter_ptr = counters_ptr + 1 + pid_c
    tl.store(partials_ptr + pid_m * C + offs_c, _sum_rows(sum_g), mask=mask_c)
    tl.store(partials_ptr + (programs + pid_m) * C + offs_c, _sum_rows(sum_gx), mask=mask_c)
    if _arrive(counter_ptr) == programs - 1:
        total_g = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
        total_gx = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
        for start in range(0, programs, BLOCK_P):
            offs_p = start + tl.arange(0, BLOCK_P)
            mask_p = (offs_p < programs)[:, None] & mask_c[None, :]
            offsets_p = partials_ptr + offs_p[:, None] * C + offs_c[None, :]
            # .cg: other multiprocessors wrote these; not from this one's L1
            total_g += tl.load(offsets_p, mask=mask_p, other=0.0, cache_modifier=".cg")
            total_gx += tl.load(offsets_p + programs * C, mask=mask_p, other=0.0, cache_modifier=".cg")
        rstd = tl.load(stats_ptr + C + offs_c, mask=mask_c, other=0.0)
        all_g = _sum_rows(total_g)
        all_gx = _sum_rows(total_gx)
        _store_parameter_gradients(all_g, all_gx, rstd, dweight_ptr, dbias_ptr, offs_c, mask_c)
        if means_ptr is not None:
            rows = M.to(tl.float32)
            tl.store(means_ptr + offs_c, all_g / rows, mask=mask_c)
            tl.store(means_ptr + C + offs_c, rstd * rstd * (all_gx / rows), mask=mask_c)
        tl.store(counter_ptr, 0)


@triton.jit(do_not_specialize=["M", "C", "S"])
def _batch_norm_bwd_reduce_kernel(
    dy_ptr, other_ptr, x_ptr, mask_ptr, stats_ptr, counters_ptr, partials_ptr, means_ptr, dweight_ptr, dbias_ptr,
    dresidual_ptr, dx_ptr,
    M, C, S,
    RELU: tl.constexpr, FORK: tl.constexpr, SUMS: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    M, C, S = _aligned_extents(M, C, S, CHANNELS_LAST, ALIGN)
    pid_c, pid_m, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mean = tl.load(stats_ptr + offs_c, mask=mask_c, other=0.0)
    scale = tl.load(stats_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)
    shift = tl.load(stats_ptr + 3 * C + offs_c, mask=mask_c, other=0.0)

    sum_g = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    sum_gx = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    for row0 in range(pid_m.to(tl.int64) * BLOCK_M, M, programs * BLOCK_M):
        mask = (row0 + tl.arange(0, BLOCK_M) < M)[:, None] & mask_c[None, :]
        base, offsets = _tile_offsets(row0, offs_c, C, S, BLOCK_M, CHANNELS_LAST)
        g, x_centred = _gradient_tile(
            dy_ptr, other_ptr, x_ptr, mask_ptr, mean, scale, shift, base, offsets, mask, row0, offs_c, M, C,
            RELU, FORK, SUMS or (RELU and mask_ptr is None), CHANNELS_LAST, BLOCK_M, BLOCK_C,
        )  # fmt: skip
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + base + offsets, g.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if dx_ptr is not None:  # frozen statistics
            dx = g * scale[None, :]
            if other_ptr is not None and not FORK:
                dx += tl.load(other_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + base + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        sum_g += g
        sum_gx += g * x_centred

    if SUMS:
        _finish_sums(
            sum_g, sum_gx, stats_ptr, counters_ptr, partials_ptr, means_ptr, dweight_ptr, dbias_ptr,
            offs_c, mask_c, M, C, BLOCK_C, BLOCK_P,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "C", "S"])
def _batch_norm_bwd_apply_kernel(
    g_ptr, other_ptr, x_ptr, mask_ptr, stats_ptr, means_ptr, dx_ptr,
    M, C, S,
    RELU: tl.constexpr, FORK: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    M, C, S = _aligned_extents(M, C, S, CHANNELS_LAST, ALIGN)
    channel_tiles = tl.cdiv(C, BLOCK_C)
    # Backwards through memory: what the reduction read last is still in the L2 cache.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    pid_m = pid // channel_tiles
    offs_c = pid % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mean = tl.load(stats_ptr + offs_c, mask=mask_c, other=0.0)
    scale = tl.load(stats_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)
    shift = tl.load(stats_ptr + 3 * C + offs_c, mask=mask_c, other=0.0)
    mean_g = tl.load(means_ptr + offs_c, mask=mask_c, other=0.0)
    mean_gx = tl.load(means_ptr + C + offs_c, mask=mask_c, other=0.0)

    first = pid_m.to(tl.int64) * (TILES * BLOCK_M)
    for row0 in range(first, tl.minimum(first + TILES * BLOCK_M, M), BLOCK_M):
        mask = (row0 + tl.arange(0, BLOCK_M) < M)[:, None] & mask_c[None, :]
        base, offsets = _tile_offsets(row0, offs_c, C, S, BLOCK_M, CHANNELS_LAST)
        g, x_centred = _gradient_tile(
            g_ptr, other_ptr, x_ptr, mask_ptr, mean, scale, shift, base, offsets, mask, row0, offs_c, M, C,
            RELU, FORK, True, CHANNELS_LAST, BLOCK_M, BLOCK_C,
        )  # fmt: skip
        dx = scale[None, :] * (g - mean_g[None, :] - x_centred * mean_gx[None, :])
        if other_ptr is not None and not FORK:
            dx += tl.load(other_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + base + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "C", "S"])
def _batch_norm_bwd_on_chip_kernel(
    dy_ptr, other_ptr, x_ptr, mask_ptr, stats_ptr, dweight_ptr, dbias_ptr, dresidual_ptr, dx_ptr,
    M, C, S,
    RELU: tl.constexpr, FORK: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    M, C, S = _aligned_extents(M, C, S, CHANNELS_LAST, ALIGN)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mean = tl.load(stats_ptr + offs_c, mask=mask_c, other=0.0)
    rstd = tl.load(stats_ptr + C + offs_c, mask=mask_c, other=0.0)
    scale = tl.load(stats_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)
    shift = tl.load(stats_ptr + 3 * C + offs_c, mask=mask_c, other=0.0)

    row0 = tl.full([], 0, dtype=tl.int64)
    mask = (tl.arange(0, BLOCK_M) < M)[:, None] & mask_c[None, :]
    base, offsets = _tile_offsets(row0, offs_c, C, S, BLOCK_M, CHANNELS_LAST)
    g, x_centred = _gradient_tile(
        dy_ptr, other_ptr, x_ptr, mask_ptr, mean, scale, shift, base, offsets, mask, row0, offs_c, M, C,
        RELU, FORK, True, CHANNELS_LAST, BLOCK_M, BLOCK_C,
    )  # fmt: skip
    if other_ptr is not None and not FORK:
        ds = tl.load(other_ptr + base + offsets, mask=mask, other=0.0)  # with the others, not behind the sums
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + base + offsets, g.to(dresidual_ptr.dtype.element_ty), mask=mask)
    sum_g = _sum_rows(g)
    sum_gx = _sum_rows(g * x_centred)
    _store_parameter_gradients(sum_g, sum_gx, rstd, dweight_ptr, dbias_ptr, offs_c, mask_c)
    if dx_ptr is not None:
        mean_g = sum_g / M.to(tl.float32)
        mean_gx = rstd * rstd * (sum_gx / M.to(tl.float32))
        dx = scale[None, :] * (g - mean_g[None, :] - x_centred * mean_gx[None, :])
        if other_ptr is not None and not FORK:
            dx += ds.to(tl.float32)
        tl.store(dx_ptr + base + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def batch_norm_bwd_reduce(
    dy: Tensor, x: Tensor, mask: Tensor | None, stats: Tensor, view: Rows, act: str | None, out: Gradients,
    means: Tensor | None, other: Tensor | None = None, *, fork: bool = False,
) -> None:  # fmt: skip
    """Fill the parameter gradients and dresidual of ``out``, and ``means`` [2, C] for the apply kernel.

    ``out.x`` given: the statistics were frozen, and this launch writes it too, with ds added. Reads dy, x (unless
    nothing needs it), the mask and ``other`` (dfork with ``fork``, else ds), writes dresidual; one launch.
    """
    config = tiling.reduction(view, dy.itemsize, num_sms(x.device))
    sums = means is not None or out.weight is not None or out.bias is not None
    partials = x.new_empty((2, config.programs, view.C), dtype=torch.float32) if sums else None
    with on_device(x.device):
        _batch_norm_bwd_reduce_kernel[config.channel_tiles, config.programs](
            dy, other, x, mask, stats, counters(x.device) if sums else None, partials, means, out.weight, out.bias,
            out.residual, out.x,
            view.M, view.C, view.S,
            RELU=act == "relu", FORK=fork, SUMS=sums, CHANNELS_LAST=view.channels_last, ALIGN=view.align,
            BLOCK_M=config.block_m, BLOCK_C=config.block_c, BLOCK_P=16, num_warps=config.num_warps,
        )  # fmt: skip


def batch_norm_bwd_apply(
    g: Tensor, x: Tensor, mask: Tensor | None, stats: Tensor, means: Tensor, view: Rows, act: str | None, dx: Tensor,
    other: Tensor | None = None, *, fork: bool = False,
) -> None:  # fmt: skip
    """Fill dx. Reads g (or dy, with the mask or ``act``), x and ``other``, writes dx; one launch."""
    config = tiling.elementwise(view, g.itemsize)
    with on_device(x.device):
        _batch_norm_bwd_apply_kernel[config.grid](
            g, other, x, mask, stats, means, dx,
            view.M, view.C, view.S,
            RELU=act == "relu", FORK=fork, CHANNELS_LAST=view.channels_last, ALIGN=view.align,
            TILES=config.tiles, BLOCK_M=config.block_m, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip


def batch_norm_bwd_on_chip(
    dy: Tensor, x: Tensor, mask: Tensor | None, stats: Tensor, view: Rows, config: Tiling, act: str | None,
    out: Gradients, other: Tensor | None = None, *, fork: bool = False,
) -> None:  # fmt: skip
    """Fill ``out`` in one launch: reads dy, x, the mask and ``other`` once, writes dx and dresidual."""
    with on_device(x.device):
        _batch_norm_bwd_on_chip_kernel[config.grid](
            dy, other, x, mask, stats, out.weight, out.bias, out.residual, out.x,
            view.M, view.C, view.S,
            RELU=act == "relu", FORK=fork, CHANNELS_LAST=view.channels_last, ALIGN=view.align,
            BLOCK_M=config.block_m, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip


def batch_norm_act_backward(
    dy: Tensor, x: Tensor, mask: Tensor | None, stats: Tensor, act: str | None, frozen: bool, out: Gradients,
    other: Tensor | None = None, *, fork: bool = False,
) -> None:  # fmt: skip
    """Fill the tensors of ``out``; dy, x, ``other`` and all of ``out`` have x's strides.

    ``other`` is ds, which ``out.x`` then includes, or with ``fork`` dfork, of dy's dtype. One launch with frozen
    statistics or where a channel tile fits on-chip, else two. ``out.residual`` is for a gradient that is not there
    yet: without an activation and a fork it is dy itself, and there is nothing to write.
    """
    view = rows(x)
    if out.x is None and not fork:
        other = None
    if frozen:
        batch_norm_bwd_reduce(dy, x, mask, stats, view, act, out, None, other, fork=fork)
        return
    config = tiling.on_chip(view, max(x.itemsize, dy.itemsize))
    if config is not None:
        batch_norm_bwd_on_chip(dy, x, mask, stats, view, config, act, out, other, fork=fork)
        return
    means = None if out.x is None else x.new_empty((2, view.C), dtype=torch.float32)
    batch_norm_bwd_reduce(
        dy, x, mask, stats, view, act, out._replace(x=None), means, other if fork else None, fork=fork
    )  # fmt: skip
    if out.x is None or means is None:
        return
    if out.residual is not None and out.residual.dtype == dy.dtype:
        # g has been written for the residual: no mask and no second gradient to read again
        batch_norm_bwd_apply(out.residual, x, None, stats, means, view, None, out.x, None if fork else other)
    else:
        batch_norm_bwd_apply(dy, x, mask, stats, means, view, act, out.x, other, fork=fork)
