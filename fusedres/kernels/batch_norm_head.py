"""The head of a network: act(batch_norm(x) + residual), averaged over the pixels of every image.

The activation is never written. A program owns whole images of a channel tile, so that no partial averages meet; tiles
are [BLOCK_N images · BLOCK_S pixels, BLOCK_C channels]. Masks have a byte for eight pixels of one image.
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
from fusedres.kernels._common import _aligned_extents, _moments, _normalise, _pack_bits, _positive
from fusedres.kernels.batch_norm_statistics import UNUSED, _affine, _load_affine, _update_running, batch_norm_fwd_stats
from fusedres.kernels.layout import Rows, pooled_like, rows
from fusedres.kernels.tiling import ImageTiling
from fusedres.kernels.workspace import counters, on_device
from fusedres.norm import Norm


@triton.jit
def _image_offsets(
    n0, s0, c0, N, C, S,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Where the pixels from s0 on of the images from n0 (int64) on are: a scalar base, offsets, and which exist.

    The offsets are those inside of one tile, which fit 32 bits; 64-bit ones would take twice the registers.
    """
    offs_m, c = tl.arange(0, BLOCK_N * BLOCK_S), tl.arange(0, BLOCK_C)
    n, s = offs_m // BLOCK_S, offs_m % BLOCK_S
    mask = ((n < (N - n0).to(tl.int32)) & (s < S - s0))[:, None] & (c < C - c0)[None, :]
    if CHANNELS_LAST:
        base = (n0 * S + s0) * C + c0
        offsets = (n * S + s)[:, None] * C + c[None, :]
    else:
        base = (n0 * C + c0) * S + s0
        offsets = (n * C)[:, None] * S + (c[None, :] * S + s[:, None])
    return base, offsets, mask


@triton.jit
def _image_mask_offsets(
    n0, s0, c0, N, C, S,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """The same of the bytes [BLOCK_N · BLOCK_S / 8, BLOCK_C] of the 1-bit mask."""
    bytes_s = (S + 7) // 8
    offs_b, c = tl.arange(0, BLOCK_N * BLOCK_S // 8), tl.arange(0, BLOCK_C)
    n, b = offs_b // (BLOCK_S // 8), offs_b % (BLOCK_S // 8)
    valid = ((n < (N - n0).to(tl.int32)) & (8 * b < S - s0))[:, None] & (c < C - c0)[None, :]
    if CHANNELS_LAST:
        base = (n0 * bytes_s + s0 // 8) * C + c0
        offsets = (n * bytes_s + b)[:, None] * C + c[None, :]
    else:
        base = (n0 * C + c0) * bytes_s + s0 // 8
        offsets = (n * C)[:, None] * bytes_s + (c[None, :] * bytes_s + b[:, None])
    return base, offsets, valid


@triton.jit
def _activation_tile(
    x_centred, scale, shift, residual_ptr, saved_ptr, base, offsets, mask, n0, s0, c0, N, C, S,
    DTYPE: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of the activation, rounded to ``DTYPE`` as if it were stored; 0 where there is no pixel."""
    z = _normalise(x_centred, scale, shift)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        keep = _positive(z, DTYPE) & mask  # so that the backward need not look where there is a pixel
        z = tl.where(keep, z, 0.0)
        if saved_ptr is not None:
            base_b, offs_b, valid_b = _image_mask_offsets(n0, s0, c0, N, C, S, BLOCK_N, BLOCK_S, BLOCK_C, CHANNELS_LAST)
            tl.store(saved_ptr + base_b + offs_b, _pack_bits(keep, BLOCK_N * BLOCK_S, BLOCK_C), mask=valid_b)
    else:
        z = tl.where(mask, z, 0.0)
    return z.to(DTYPE).to(tl.float32)


@triton.jit
def _store_averages(
    y, pooled_ptr, n0, c0, N, C, S, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Σ over the pixels of y [BLOCK_N · BLOCK_S, BLOCK_C], over S, rounded once."""
    if BLOCK_S > 128:  # in groups, as in _sum_rows
        groups = tl.reshape(y, [BLOCK_N * BLOCK_S // 16, 16, BLOCK_C])
        total = tl.sum(tl.reshape(tl.sum(groups, axis=1), [BLOCK_N, BLOCK_S // 16, BLOCK_C]), axis=1)
    else:
        total = tl.sum(tl.reshape(y, [BLOCK_N, BLOCK_S, BLOCK_C]), axis=1)
    base, offsets, mask = _image_offsets(n0, 0, c0, N, C, 1, BLOCK_N, 1, BLOCK_C, True)
    average = (total / S.to(tl.float32)).to(pooled_ptr.dtype.element_ty)
    tl.store(pooled_ptr + base + offsets, average, mask=mask)


@triton.jit(do_not_specialize=["N", "C", "S"])
def _batch_norm_head_fwd_apply_kernel(
    x_ptr, residual_ptr, stats_ptr, running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr, pooled_ptr, saved_ptr,
    N, C, S,
    EPS: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    TILES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    _, C, S = _aligned_extents(S, C, S, CHANNELS_LAST, ALIGN)
    channel_tiles = tl.cdiv(C, BLOCK_C)
    # Backwards through memory: what the statistics read last is still in the L2 cache.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    pid_n = pid // channel_tiles
    c0 = pid % channel_tiles * BLOCK_C
    offs_c = c0 + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mean, scale, shift = _load_affine(
        stats_ptr, running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr, offs_c, mask_c, pid_n == 0, C, EPS
    )  # fmt: skip

    first = pid_n * (TILES * BLOCK_N)
    for n in range(first, tl.minimum(first + TILES * BLOCK_N, N), BLOCK_N):
        n0 = tl.full([], 0, dtype=tl.int64) + n
        y = tl.zeros([BLOCK_N * BLOCK_S, BLOCK_C], dtype=tl.float32)
        for s0 in range(0, S, BLOCK_S):
            base, offsets, mask = _image_offsets(n0, s0, c0, N, C, S, BLOCK_N, BLOCK_S, BLOCK_C, CHANNELS_LAST)
            x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
            y += _activation_tile(
                x - mean[None, :], scale, shift, residual_ptr, saved_ptr, base, offsets, mask, n0, s0, c0, N, C, S,
                pooled_ptr.dtype.element_ty, RELU, CHANNELS_LAST, BLOCK_N, BLOCK_S, BLOCK_C,
            )  # fmt: skip
        _store_averages(y, pooled_ptr, n0, c0, N, C, S, BLOCK_N, BLOCK_S, BLOCK_C)


@triton.jit(do_not_specialize=["N", "C", "S"])
def _batch_norm_head_fwd_on_chip_kernel(
    x_ptr, residual_ptr, counters_ptr, stats_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr,
    num_batches_ptr, pooled_ptr, saved_ptr,
    N, C, S, momentum,
    EPS: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    _, C, S = _aligned_extents(S, C, S, CHANNELS_LAST, ALIGN)
    c0 = tl.program_id(0) * BLOCK_C
    offs_c = c0 + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    n0 = tl.full([], 0, dtype=tl.int64)
    base, offsets, mask = _image_offsets(n0, 0, c0, N, C, S, BLOCK_N, BLOCK_S, BLOCK_C, CHANNELS_LAST)
    x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    offs_m = tl.arange(0, BLOCK_N * BLOCK_S)
    count = ((offs_m // BLOCK_S < N) & (offs_m % BLOCK_S < S))[:, None].to(tl.float32)
    mean, var = _moments(count, x, 0.0)
    scale, shift = _affine(mean, var, weight_ptr, bias_ptr, stats_ptr, offs_c, mask_c, True, C, EPS)
    _update_running(
        mean, var, N * S, running_mean_ptr, running_var_ptr, num_batches_ptr, counters_ptr,
        tl.num_programs(0), momentum, offs_c, mask_c,
    )  # fmt: skip
    y = _activation_tile(
        x - mean[None, :], scale, shift, residual_ptr, saved_ptr, base, offsets, mask, n0, 0, c0, N, C, S,
        pooled_ptr.dtype.element_ty, RELU, CHANNELS_LAST, BLOCK_N, BLOCK_S, BLOCK_C,
    )  # fmt: skip
    _store_averages(y, pooled_ptr, n0, c0, N, C, S, BLOCK_N, BLOCK_S, BLOCK_C)


def batch_norm_head_fwd_apply(
    x: Tensor, residual: Tensor | None, view: Rows, stats: Tensor | None, running: Norm | None, act: str | None,
    save_mask: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(averages, mask) from ``stats``, or from those of ``running``, which then fill ``stats`` where it is given.

    Reads x and the residual, writes [N, C] and, if ``save_mask``, one bit an element; one launch.
    """
    config = tiling.images(view, x.itemsize)
    pooled, mask = _outputs(x, residual, view, save_mask)
    mean, var, weight, bias, _, _, eps, _ = running or UNUSED
    with on_device(x.device):
        _batch_norm_head_fwd_apply_kernel[config.grid](
            x, residual, stats, mean, var, weight, bias, pooled, mask if save_mask else None,
            view.images, view.C, view.S,
            EPS=eps, RELU=act == "relu", CHANNELS_LAST=view.channels_last, ALIGN=view.align,
            TILES=config.tiles, BLOCK_N=config.block_n, BLOCK_S=config.block_s, BLOCK_C=config.block_c,
            num_warps=config.num_warps,
        )  # fmt: skip
    return pooled, mask


def batch_norm_head_fwd_on_chip(
    x: Tensor, residual: Tensor | None, view: Rows, config: ImageTiling, norm: Norm, act: str | None, save_mask: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(averages, stats, mask) in one launch: reads x and the residual once, writes [N, C] and the mask."""
    mean, var, weight, bias, _, momentum, eps, count = norm
    pooled, mask = _outputs(x, residual, view, save_mask)
    stats = x.new_empty((4, view.C), dtype=torch.float32)
    with on_device(x.device):
        _batch_norm_head_fwd_on_chip_kernel[config.grid](
            x, residual, None if count is None else counters(x.device), stats, weight, bias, mean, var, count,
            pooled, mask if save_mask else None,
            view.images, view.C, view.S, momentum,
            EPS=eps, RELU=act == "relu", CHANNELS_LAST=view.channels_last, ALIGN=view.align,
            BLOCK_N=config.block_n, BLOCK_S=config.block_s, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip
    return pooled, stats, mask


def _outputs(x: Tensor, residual: Tensor | None, view: Rows, save_mask: bool) -> tuple[Tensor, Tensor]:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    mask = x.new_empty(view.image_mask_bytes if save_mask else 0, dtype=torch.uint8)
    return pooled_like(x, dtype), mask


def batch_norm_head_forward(
    x: Tensor, residual: Tensor | None, norm: Norm, act: str | None, save_mask: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(averages, stats, mask) with the statistics of the batch: one launch where a channel tile fits on-chip."""
    view = rows(x)
    config = tiling.images_on_chip(view, x.itemsize)
    if config is not None:
        return batch_norm_head_fwd_on_chip(x, residual, view, config, norm, act, save_mask)
    stats = batch_norm_fwd_stats(x, view, norm)
    pooled, mask = batch_norm_head_fwd_apply(x, residual, view, stats, None, act, save_mask)
    return pooled, stats, mask


def batch_norm_head_inference_forward(
    x: Tensor, residual: Tensor | None, norm: Norm, act: str | None, save_stats: bool, save_mask: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(averages, stats, mask) with the running statistics, in one launch; no ``stats`` unless ``save_stats``."""
    view = rows(x)
    stats = x.new_empty((4, view.C) if save_stats else 0, dtype=torch.float32)
    pooled, mask = batch_norm_head_fwd_apply(x, residual, view, stats if save_stats else None, norm, act, save_mask)
    return pooled, stats, mask
