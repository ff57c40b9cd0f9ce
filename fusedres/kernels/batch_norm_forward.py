"""Forward kernels of act(batch_norm(x) + residual) and of act(batch_norm(x + residual)), and their launchers.

The statistics are those of ``batch_norm_statistics``, or of the tile that a program of the single launch holds.
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
    _load_sum,
    _mask_offsets,
    _moments,
    _normalise,
    _pack_bits,
    _positive,
    _tile_offsets,
)
from fusedres.kernels.batch_norm_statistics import UNUSED, _affine, _load_affine, _update_running, batch_norm_fwd_stats
from fusedres.kernels.layout import Rows, rows
from fusedres.kernels.tiling import Tiling
from fusedres.kernels.workspace import counters, on_device
from fusedres.norm import Norm


@triton.jit
def _finish_tile(
    x_centred, scale, shift, residual_ptr, y_ptr, saved_ptr, base, offsets, mask, row0, offs_c, M, C,
    ADD: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Affine map, residual unless ADD, ReLU and stores of one tile."""
    z = _normalise(x_centred, scale, shift)
    if residual_ptr is not None and not ADD:
        z += tl.load(residual_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        keep = _positive(z, y_ptr.dtype.element_ty)
        z = tl.where(keep, z, 0.0)
        if saved_ptr is not None and not ADD:
            offs_b, valid_b = _mask_offsets(row0, offs_c, M, C, BLOCK_M, CHANNELS_LAST)
            tl.store(saved_ptr + offs_b, _pack_bits(keep, BLOCK_M, BLOCK_C), mask=valid_b)
    tl.store(y_ptr + base + offsets, z.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "C", "S"])
def _batch_norm_fwd_apply_kernel(
    x_ptr, residual_ptr, stats_ptr, running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr, y_ptr, saved_ptr,
    M, C, S,
    EPS: tl.constexpr, ADD: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    M, C, S = _aligned_extents(M, C, S, CHANNELS_LAST, ALIGN)
    channel_tiles = tl.cdiv(C, BLOCK_C)
    # Backwards through memory: what the statistics read last is still in the L2 cache.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    pid_m = pid // channel_tiles
    offs_c = pid % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mean, scale, shift = _load_affine(
        stats_ptr, running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr, offs_c, mask_c, pid_m == 0, C, EPS
    )  # fmt: skip

    first = pid_m.to(tl.int64) * (TILES * BLOCK_M)
    for row0 in range(first, tl.minimum(first + TILES * BLOCK_M, M), BLOCK_M):
        mask = (row0 + tl.arange(0, BLOCK_M) < M)[:, None] & mask_c[None, :]
        base, offsets = _tile_offsets(row0, offs_c, C, S, BLOCK_M, CHANNELS_LAST)
        x = _load_sum(x_ptr, residual_ptr, saved_ptr, base, offsets, mask, ADD)
        _finish_tile(
            x - mean[None, :], scale, shift, residual_ptr, y_ptr, saved_ptr, base, offsets, mask, row0, offs_c, M, C,
            ADD, RELU, CHANNELS_LAST, BLOCK_M, BLOCK_C,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "C", "S"])
def _batch_norm_fwd_on_chip_kernel(
    x_ptr, residual_ptr, counters_ptr, stats_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr,
    num_batches_ptr, y_ptr, saved_ptr,
    M, C, S, momentum,
    EPS: tl.constexpr, ADD: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    M, C, S = _aligned_extents(M, C, S, CHANNELS_LAST, ALIGN)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    row0 = tl.full([], 0, dtype=tl.int64)
    mask_m = (tl.arange(0, BLOCK_M) < M)[:, None]
    mask = mask_m & mask_c[None, :]
    base, offsets = _tile_offsets(row0, offs_c, C, S, BLOCK_M, CHANNELS_LAST)
    x = _load_sum(x_ptr, residual_ptr, saved_ptr, base, offsets, mask, ADD)
    mean, var = _moments(mask_m.to(tl.float32), x, 0.0)
    scale, shift = _affine(mean, var, weight_ptr, bias_ptr, stats_ptr, offs_c, mask_c, True, C, EPS)
    _update_running(
        mean, var, M, running_mean_ptr, running_var_ptr, num_batches_ptr, counters_ptr,
        tl.num_programs(0), momentum, offs_c, mask_c,
    )  # fmt: skip
    _finish_tile(
        x - mean[None, :], scale, shift, residual_ptr, y_ptr, saved_ptr, base, offsets, mask, row0, offs_c, M, C,
        ADD, RELU, CHANNELS_LAST, BLOCK_M, BLOCK_C,
    )  # fmt: skip


def batch_norm_fwd_apply(
    x: Tensor,
    residual: Tensor | None,
    view: Rows,
    stats: Tensor | None,
    running: Norm | None,
    act: str | None,
    save_mask: bool,
    s: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, mask) from ``stats``, or from the statistics of ``running``, which then fill ``stats`` where it is given.

    Reads x and the residual, writes y and, if ``save_mask``, one bit an element; one launch. With ``s`` the residual
    is added before the normalisation, and the sum fills ``s``.
    """
    config = tiling.elementwise(view, (x if s is None else s).itemsize)
    y, mask = _outputs(x, residual, view, save_mask)
    mean, var, weight, bias, _, _, eps, _ = running or UNUSED
    with on_device(x.device):
        _batch_norm_fwd_apply_kernel[config.grid](
            x, residual, stats, mean, var, weight, bias, y, mask if save_mask else s,
            view.M, view.C, view.S,
            EPS=eps, ADD=s is not None, RELU=act == "relu", CHANNELS_LAST=view.channels_last, ALIGN=view.align,
            TILES=config.tiles, BLOCK_M=config.block_m, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip
    return y, mask


def batch_norm_fwd_on_chip(
    x: Tensor,
    residual: Tensor | None,
    view: Rows,
    config: Tiling,
    norm: Norm,
    act: str | None,
    save_mask: bool,
    s: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, stats, mask) in one launch: reads x and the residual once, writes y and the mask.

    With ``s`` the residual is added before the normalisation, and the sum fills ``s``.
    """
    mean, var, weight, bias, _, momentum, eps, count = norm
    y, mask = _outputs(x, residual, view, save_mask)
    stats = x.new_empty((4, view.C), dtype=torch.float32)
    with on_device(x.device):
        _batch_norm_fwd_on_chip_kernel[config.grid](
            x, residual, None if count is None else counters(x.device), stats, weight, bias, mean, var, count, y,
            mask if save_mask else s,
            view.M, view.C, view.S, momentum,
            EPS=eps, ADD=s is not None, RELU=act == "relu", CHANNELS_LAST=view.channels_last, ALIGN=view.align,
            BLOCK_M=config.block_m, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip
    return y, stats, mask


def _outputs(x: Tensor, residual: Tensor | None, view: Rows, save_mask: bool) -> tuple[Tensor, Tensor]:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    mask = x.new_empty(view.mask_bytes if save_mask else 0, dtype=torch.uint8)
    return torch.empty_like(x, dtype=dtype), mask


def batch_norm_act_forward(
    x: Tensor,
    residual: Tensor | None,
    norm: Norm,
    act: str | None,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, stats, mask) with the statistics of the batch: one launch where a channel tile fits on-chip, else two."""
    view = rows(x)
    config = tiling.on_chip(view, x.itemsize)
    if config is not None:
        return batch_norm_fwd_on_chip(x, residual, view, config, norm, act, save_mask)
    stats = batch_norm_fwd_stats(x, view, norm)
    y, mask = batch_norm_fwd_apply(x, residual, view, stats, None, act, save_mask)
    return y, stats, mask


def batch_norm_act_inference_forward(
    x: Tensor,
    residual: Tensor | None,
    norm: Norm,
    act: str | None,
    save_stats: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, stats, mask) with the running statistics, in one launch; ``stats`` is empty unless ``save_stats``."""
    view = rows(x)
    stats = x.new_empty((4, view.C) if save_stats else 0, dtype=torch.float32)
    y, mask = batch_norm_fwd_apply(x, residual, view, stats if save_stats else None, norm, act, save_mask)
    return y, stats, mask
