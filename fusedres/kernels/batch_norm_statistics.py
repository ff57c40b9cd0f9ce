"""The statistics of a batch and what is made of them: device functions, the reduction and its launcher.

Statistics travel as one float32 tensor ``stats`` [4, C] of rows mean, rstd, scale = rstd·γ and shift = β. It is
all that the apply kernels and the backward need of the parameters.
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
from fusedres.kernels._common import _aligned_extents, _arrive, _chan_merge, _load_sum, _moments, _tile_offsets
from fusedres.kernels.layout import Rows
from fusedres.kernels.workspace import counters, num_sms, on_device
from fusedres.norm import Norm

UNUSED = Norm(None, None)  # by kernels that are given the statistics


@triton.jit
def _affine(mean, var, weight_ptr, bias_ptr, stats_ptr, offs_c, mask_c, store, C, EPS: tl.constexpr):
    """(scale, shift) of the channels; writes the four rows of ``stats`` where ``store``."""
    rstd = tl.div_rn(1.0, tl.sqrt_rn(var + EPS))
    scale = rstd
    if weight_ptr is not None:
        scale = rstd * tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    shift = tl.zeros_like(rstd)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    if stats_ptr is not None:
        mask_c = mask_c & store
        tl.store(stats_ptr + offs_c, mean, mask=mask_c)
        tl.store(stats_ptr + C + offs_c, rstd, mask=mask_c)
        tl.store(stats_ptr + 2 * C + offs_c, scale, mask=mask_c)
        tl.store(stats_ptr + 3 * C + offs_c, shift, mask=mask_c)
    return scale, shift


@triton.jit
def _load_affine(
    stats_ptr, running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr, offs_c, mask_c, store, C, EPS: tl.constexpr
):
    """(mean, scale, shift) from ``stats``, or from the running statistics, which then fill it where ``store``."""
    if running_mean_ptr is not None:
        mean = tl.load(running_mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        var = tl.load(running_var_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        scale, shift = _affine(mean, var, weight_ptr, bias_ptr, stats_ptr, offs_c, mask_c, store, C, EPS)
    else:
        mean = tl.load(stats_ptr + offs_c, mask=mask_c, other=0.0)
        scale = tl.load(stats_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)
        shift = tl.load(stats_ptr + 3 * C + offs_c, mask=mask_c, other=0.0)
    return mean, scale, shift


@triton.jit
def _update_running(
    mean, var, M, running_mean_ptr, running_var_ptr, num_batches_ptr, counter_ptr, channel_tiles, momentum,
    offs_c, mask_c,
):  # fmt: skip
    """Running statistics (the variance with Bessel's correction) and the batch counter.

    Every channel tile reads the batch counter, and the last one to have done so increments it.
    """
    if num_batches_ptr is not None:
        batches = tl.load(num_batches_ptr)
    if running_mean_ptr is not None:
        if momentum is None:
            factor = tl.div_rn(1.0, (batches + 1).to(tl.float32))
        else:
            factor = momentum
        old_mean = tl.load(running_mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        old_var = tl.load(running_var_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        unbiased = var * (M.to(tl.float32) / (M - 1).to(tl.float32))
        tl.store(running_mean_ptr + offs_c, factor * mean + (1 - factor) * old_mean, mask=mask_c)
        tl.store(running_var_ptr + offs_c, factor * unbiased + (1 - factor) * old_var, mask=mask_c)
    if num_batches_ptr is not None:
        if _arrive(counter_ptr) == channel_tiles - 1:
            tl.store(num_batches_ptr, batches + 1)
            tl.store(counter_ptr, 0)


@triton.jit
def _merge_partials(
    partials_ptr, offs_c, mask_c, M, C, programs,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """(mean, variance) of the channels from the partials of all programs, always in the same order."""
    row_tiles = tl.cdiv(M, BLOCK_M)
    count = tl.zeros([BLOCK_P, 1], dtype=tl.float32)
    mean = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    m2 = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for start in range(0, programs, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        # Rows dealt to each program: its tiles, less what the last tile lacks.
        tiles = (row_tiles - offs_p + programs - 1) // programs
        lacking = tl.where(offs_p == (row_tiles - 1) % programs, row_tiles * BLOCK_M - M, 0)
        count_p = tl.where(offs_p < programs, tiles * BLOCK_M - lacking, 0).to(tl.float32)[:, None]
        mask_p = (offs_p < programs)[:, None] & mask_c[None, :]
        offsets = offs_p[:, None] * C + offs_c[None, :]
        # .cg: other multiprocessors wrote these; not from this one's L1
        mean_p = tl.load(partials_ptr + offsets, mask=mask_p, other=0.0, cache_modifier=".cg")
        var_p = tl.load(partials_ptr + programs * C + offsets, mask=mask_p, other=0.0, cache_modifier=".cg")
        count, mean, m2 = _chan_merge(count, mean, m2, count_p, mean_p, count_p * var_p)
    return _moments(count, mean, m2)


@triton.jit
def _value(x_ptr, residual_ptr, row, offs_c, mask_c, C, S, CHANNELS_LAST: tl.constexpr):
    """x + residual [BLOCK_C] of one row."""
    base, offsets = _tile_offsets(row, offs_c, C, S, 1, CHANNELS_LAST)
    offsets = base + tl.reshape(offsets, [offs_c.shape[0]])
    value = tl.load(x_ptr + offsets, mask=mask_c, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        value += tl.load(residual_ptr + offsets, mask=mask_c, other=0.0).to(tl.float32)
    return value


@triton.jit
def _origin(x_ptr, residual_ptr, offs_c, mask_c, M, C, S, CHANNELS_LAST: tl.constexpr):
    """The first value of every channel, if another one is very like it; else 0.

    Moments of differences to it are not rounded like a mean far larger than they are. Where the deviations are not far
    smaller, differences to a value that is not the mean would only be rounded more.
    """
    row = tl.full([], 0, dtype=tl.int64)
    first = _value(x_ptr, residual_ptr, row, offs_c, mask_c, C, S, CHANNELS_LAST)
    second = _value(x_ptr, residual_ptr, row + M // 2, offs_c, mask_c, C, S, CHANNELS_LAST)
    return tl.where(tl.abs(second - first) * 128 < tl.abs(first), first, 0.0)


@triton.jit(do_not_specialize=["M", "C", "S"])
def _batch_norm_fwd_stats_kernel(
    x_ptr, residual_ptr, s_ptr, counters_ptr, partials_ptr, stats_ptr, weight_ptr, bias_ptr, running_mean_ptr,
    running_var_ptr, num_batches_ptr,
    M, C, S, momentum,
    EPS: tl.constexpr, MERGE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    M, C, S = _aligned_extents(M, C, S, CHANNELS_LAST, ALIGN)
    pid_c, pid_m, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C

    # Moments of every (row of the tile, channel) on its own: no exchange between threads inside the loop.
    origin = _origin(x_ptr, residual_ptr, offs_c, mask_c, M, C, S, CHANNELS_LAST)
    count = tl.zeros([BLOCK_M, 1], dtype=tl.float32)
    mean = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    m2 = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    for row0 in range(pid_m.to(tl.int64) * BLOCK_M, M, programs * BLOCK_M):
        mask_m = (row0 + tl.arange(0, BLOCK_M) < M)[:, None]
        base, offsets = _tile_offsets(row0, offs_c, C, S, BLOCK_M, CHANNELS_LAST)
        x = _load_sum(
            x_ptr, residual_ptr, s_ptr, base, offsets, mask_m & mask_c[None, :], residual_ptr is not None
        )  # fmt: skip
        count, mean, m2 = _chan_merge(count, mean, m2, mask_m.to(tl.float32), x - origin[None, :], 0.0)
    mean_c, var_c = _moments(count, mean, m2)

    tl.store(partials_ptr + pid_m * C + offs_c, mean_c, mask=mask_c)
    tl.store(partials_ptr + (programs + pid_m) * C + offs_c, var_c, mask=mask_c)
    if _arrive(counters_ptr + 1 + pid_c) == programs - 1:
        mean_c, var_c = _merge_partials(partials_ptr, offs_c, mask_c, M, C, programs, BLOCK_M, BLOCK_C, BLOCK_P)
        mean_c += _origin(x_ptr, residual_ptr, offs_c, mask_c, M, C, S, CHANNELS_LAST)  # in no register until here
        if MERGE:  # with the samples of other ranks, before anything is made of them
            rows = M.to(tl.float32)
            tl.store(stats_ptr + offs_c, mean_c, mask=mask_c)
            tl.store(stats_ptr + C + offs_c, var_c * rows, mask=mask_c)
            tl.store(stats_ptr + 2 * C, rows)
        else:
            _affine(mean_c, var_c, weight_ptr, bias_ptr, stats_ptr, offs_c, mask_c, True, C, EPS)
            _update_running(
                mean_c, var_c, M, running_mean_ptr, running_var_ptr, num_batches_ptr, counters_ptr,
                tl.num_programs(0), momentum, offs_c, mask_c,
            )  # fmt: skip
        tl.store(counters_ptr + 1 + pid_c, 0)


def batch_norm_fwd_stats(
    x: Tensor,
    view: Rows,
    norm: Norm,
    residual: Tensor | None = None,
    s: Tensor | None = None,
) -> Tensor:
    """``stats`` [4, C] of a dense x; updates the running statistics. Reads x; one launch.

    With ``residual`` the statistics are those of x + residual, rounded to the dtype of ``s``: reads both, fills ``s``.
    """
    mean, var, weight, bias, _, momentum, eps, count = norm
    config = tiling.statistics(view, (x if s is None else s).itemsize, num_sms(x.device))
    stats = x.new_empty((4, view.C), dtype=torch.float32)
    partials = x.new_empty((2, config.programs, view.C), dtype=torch.float32)
    with on_device(x.device):
        _batch_norm_fwd_stats_kernel[config.channel_tiles, config.programs](
            x, residual, s, counters(x.device), partials, stats, weight, bias, mean, var, count,
            view.M, view.C, view.S, momentum,
            EPS=eps, MERGE=False, CHANNELS_LAST=view.channels_last, ALIGN=view.align,
            BLOCK_M=config.block_m, BLOCK_C=config.block_c, BLOCK_P=16, num_warps=config.num_warps,
        )  # fmt: skip
    return stats
