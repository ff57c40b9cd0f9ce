"""Forward kernel of max_pool2d(act(batch_norm(x))), its launcher, and what its backward shares with it.

Beside the pooled output it writes, for the backward, one byte an output: ``winner``, the place in its window of the
element that is the maximum, or CLOSED where the ReLU let nothing through.
"""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false
# (the device language only looks like Python)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels import tiling
from fusedres.kernels._common import _normalise
from fusedres.kernels.batch_norm_statistics import UNUSED, _load_affine, batch_norm_fwd_stats
from fusedres.kernels.layout import MAX_WINDOW, Planes, Window, alignment, planes, rows
from fusedres.kernels.workspace import on_device
from fusedres.norm import Norm

CLOSED = tl.constexpr(MAX_WINDOW)
UNROLLED = 32  # elements of a window or a cell, at most


@triton.jit
def _pooled(H, W, WINDOW: tl.constexpr):
    """``Window.pooled``."""
    OH = (H + 2 * WINDOW[4] - WINDOW[0]) // WINDOW[2] + 1
    OW = (W + 2 * WINDOW[5] - WINDOW[1]) // WINDOW[3] + 1
    return OH, OW


@triton.jit
def _places(row0, H, W, BLOCK_M: tl.constexpr):
    """Image (int64), row and column of the BLOCK_M places from ``row0`` (int64) on in planes of H by W."""
    n0 = row0 // (H * W)
    s = (row0 - n0 * (H * W)).to(tl.int32) + tl.arange(0, BLOCK_M)
    place = s % (H * W)
    return n0 + s // (H * W), place // W, place % W


@triton.jit
def _place_offsets(n, h, w, offs_c, C, H, W, CHANNELS_LAST: tl.constexpr):
    """Where the places (n, h, w) are, for the channels ``offs_c``: [BLOCK_M, BLOCK_C]."""
    if CHANNELS_LAST:
        offsets = (((n * H + h) * W + w) * C)[:, None] + offs_c[None, :]
    else:
        offsets = ((n * C * H + h) * W + w)[:, None] + (offs_c.to(tl.int64) * (H * W))[None, :]
    return offsets


@triton.jit
def _step(C, CHANNELS_LAST: tl.constexpr):
    """From one place of a row to the next."""
    step = tl.full([], 1, tl.int64)
    if CHANNELS_LAST:
        step = C.to(tl.int64)
    return step


@triton.jit
def _take(
    tap, best, winner, x_ptr, offsets, step, h0, w0, mask, mean, scale, shift, H, W,
    dtype: tl.constexpr, RELU: tl.constexpr, KW: tl.constexpr,
):  # fmt: skip
    """(best, winner) when the element ``tap`` of the windows, which begin at (h0, w0), has been looked at.

    The first of equal ones wins, and over all the last NaN, as in PyTorch; what is compared has been rounded, as there.
    With ReLU ``best`` begins at 0, so that only what is positive wins. In the padding the nearest element of the window
    is looked at again, which changes neither maximum nor order and needs no mask.
    """
    d_h = tl.minimum(tl.maximum(h0 + tap // KW, 0), H - 1) - h0
    d_w = tl.minimum(tl.maximum(w0 + tap % KW, 0), W - 1) - w0
    offsets += (d_h.to(tl.int64) * (W * step) + d_w * step)[:, None]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    z = _normalise(x - mean[None, :], scale, shift).to(dtype).to(tl.float32)
    better = (z > best) | (z != z)
    if not RELU:
        better |= winner == CLOSED  # the first, be it -inf
    return tl.where(better, z, best), tl.where(better, (d_h * KW + d_w)[:, None], winner)


@triton.jit(do_not_specialize=["N", "C", "H", "W"])
def _batch_norm_pool_fwd_kernel(
    x_ptr, stats_ptr, running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr, y_ptr, winner_ptr,
    N, C, H, W,
    EPS: tl.constexpr, RELU: tl.constexpr, WINDOW: tl.constexpr, UNROLL: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = WINDOW[0] * WINDOW[1]
    STEP: tl.constexpr = TAPS if UNROLL else WINDOW[1]  # a loop of one round costs nothing
    C = C // ALIGN * ALIGN
    channel_tiles = tl.cdiv(C, BLOCK_C)
    # Backwards through memory: what the statistics read last is still in the L2 cache.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    pid_m = pid // channel_tiles
    offs_c = pid % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mean, scale, shift = _load_affine(
        stats_ptr, running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr, offs_c, mask_c, pid_m == 0, C, EPS
    )  # fmt: skip
    OH, OW = _pooled(H, W, WINDOW)
    step = _step(C, CHANNELS_LAST)
    dtype: tl.constexpr = y_ptr.dtype.element_ty

    first, last = pid_m.to(tl.int64) * (TILES * BLOCK_M), N.to(tl.int64) * OH * OW
    for row0 in range(first, tl.minimum(first + TILES * BLOCK_M, last), BLOCK_M):
        n, oh, ow = _places(row0, OH, OW, BLOCK_M)
        mask = (n < N)[:, None] & mask_c[None, :]
        h0, w0 = oh * WINDOW[2] - WINDOW[4], ow * WINDOW[3] - WINDOW[5]
        offsets = _place_offsets(n, h0, w0, offs_c, C, H, W, CHANNELS_LAST)
        best = tl.full([BLOCK_M, BLOCK_C], 0.0 if RELU else float("-inf"), dtype=tl.float32)
        winner = tl.full([BLOCK_M, BLOCK_C], CLOSED, dtype=tl.int32)
        for tap in range(0, TAPS, STEP):
            for t in tl.static_range(STEP):
                best, winner = _take(
                    tap + t, best, winner, x_ptr, offsets, step, h0, w0, mask, mean, scale, shift, H, W,
                    dtype, RELU, WINDOW[1],
                )  # fmt: skip
        offsets_o = _place_offsets(n, oh, ow, offs_c, C, OH, OW, CHANNELS_LAST)
        tl.store(y_ptr + offsets_o, best.to(dtype), mask=mask)
        if winner_ptr is not None:
            tl.store(winner_ptr + offsets_o, winner.to(tl.uint8), mask=mask)


def constants(view: Planes) -> dict[str, Any]:
    """What all kernels are compiled for.

    Large windows are walked through row by row: unrolled they take long to compile. In NCHW neighbours in a row are a
    stride apart, and accesses one element wide whatever the alignment.
    """
    window = view.window
    largest = max(window.kernel_h * window.kernel_w, window.stride_h * window.stride_w)
    return {
        "WINDOW": tuple(window), "UNROLL": largest <= UNROLLED, "CHANNELS_LAST": view.channels_last,
        "ALIGN": alignment(view.C) if view.channels_last else 1,
    }  # fmt: skip


def batch_norm_pool_fwd(
    x: Tensor,
    window: Window,
    stats: Tensor | None,
    running: Norm | None,
    act: str | None,
    save_winner: bool,
) -> tuple[Tensor, Tensor]:
    """(y, winner) from ``stats``, or from the statistics of ``running``, which then fill ``stats`` where it is given.

    Reads x, of which overlapping windows find what others have read in the caches; writes y and, if ``save_winner``,
    one byte an output; one launch.
    """
    view = planes(x, window)
    config = tiling.pool_elementwise(view.outputs, x.itemsize)
    y = view.pooled(x, x.dtype)
    winner = view.pooled(x, torch.uint8) if save_winner else x.new_empty(0, dtype=torch.uint8)
    mean, var, weight, bias, _, _, eps, _ = running or UNUSED
    with on_device(x.device):
        _batch_norm_pool_fwd_kernel[config.grid](
            x, stats, mean, var, weight, bias, y, winner if save_winner else None,
            *view[:4],
            EPS=eps, RELU=act == "relu", **constants(view),
            TILES=config.tiles, BLOCK_M=config.block_m, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip
    return y, winner


def batch_norm_act_max_pool2d_forward(
    x: Tensor,
    window: Window,
    norm: Norm,
    act: str | None,
    save_winner: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, stats, winner) with the statistics of the batch, in two launches."""
    stats = batch_norm_fwd_stats(x, rows(x), norm)
    y, winner = batch_norm_pool_fwd(x, window, stats, None, act, save_winner)
    return y, stats, winner


def batch_norm_act_max_pool2d_inference_forward(
    x: Tensor,
    window: Window,
    norm: Norm,
    act: str | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, stats, winner) with the running statistics, in one launch; the last two are empty unless ``save``."""
    stats = x.new_empty((4, x.shape[1]) if save else 0, dtype=torch.float32)
    y, winner = batch_norm_pool_fwd(x, window, stats if save else None, norm, act, save)
    return y, stats, winner
