"""Backward of act(batch_norm(x) + residual) averaged over the pixels of every image; tiles as in ``batch_norm_head``.

Every pixel of an image is handed dy / S, so g is that where the ReLU was open, and never read: both passes make it of
[N, C] and the mask, or of x. The sums and dx are those of ``batch_norm_backward``.
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
from fusedres.kernels._common import _aligned_extents, _normalise, _positive, _sum_rows, _unpack_bits
from fusedres.kernels.batch_norm_backward import Gradients, _finish_sums, _store_parameter_gradients
from fusedres.kernels.batch_norm_head import _image_mask_offsets, _image_offsets
from fusedres.kernels.layout import Rows, rows
from fusedres.kernels.tiling import ImageTiling
from fusedres.kernels.workspace import counters, num_sms, on_device


@triton.jit
def _average_gradient(dpooled_ptr, n0, c0, N, C, S, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """dy / S [BLOCK_N, BLOCK_C]: what every pixel of an image is handed."""
    base, offsets, mask = _image_offsets(n0, 0, c0, N, C, 1, BLOCK_N, 1, BLOCK_C, True)
    dy = tl.load(dpooled_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    return dy / S.to(tl.float32)


@triton.jit
def _centred_tile(x_ptr, mean, base, offsets, mask):
    return tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32) - mean[None, :]


@triton.jit
def _head_gradient_tile(
    dy, x_centred, mask_ptr, scale, shift, mask, n0, s0, c0, N, C, S,
    DTYPE: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """g of one tile, 0 where there is no pixel; ``x_centred`` is of account only without ``mask_ptr``."""
    keep = mask
    if RELU:
        if mask_ptr is not None:
            base_b, offs_b, valid_b = _image_mask_offsets(
                n0, s0, c0, N, C, S, BLOCK_N, BLOCK_S, BLOCK_C, CHANNELS_LAST
            )  # fmt: skip
            packed = tl.load(mask_ptr + base_b + offs_b, mask=valid_b, other=0)
            keep = _unpack_bits(packed, BLOCK_N * BLOCK_S, BLOCK_C)
        else:
            keep = keep & _positive(_normalise(x_centred, scale, shift), DTYPE)
    spread = tl.broadcast_to(dy[:, None, :], [BLOCK_N, BLOCK_S, BLOCK_C])
    return tl.where(keep, tl.reshape(spread, [BLOCK_N * BLOCK_S, BLOCK_C]), 0.0)


@triton.jit
def _sum_of_eight(x):
    """[R, C] to [R / 8, C]: what pixels of an image add up is alike, and a long sum of it rounds to one side."""
    return tl.sum(tl.reshape(x, [x.shape[0] // 8, 8, x.shape[1]]), axis=1)


@triton.jit(do_not_specialize=["N", "C", "S"])
def _batch_norm_head_bwd_reduce_kernel(
    dpooled_ptr, x_ptr, mask_ptr, stats_ptr, counters_ptr, partials_ptr, means_ptr, dweight_ptr, dbias_ptr,
    dresidual_ptr, dx_ptr,
    N, C, S,
    RELU: tl.constexpr, SUMS: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    _, C, S = _aligned_extents(S, C, S, CHANNELS_LAST, ALIGN)
    c0 = tl.program_id(0) * BLOCK_C
    offs_c = c0 + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mean = tl.load(stats_ptr + offs_c, mask=mask_c, other=0.0)
    scale = tl.load(stats_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)
    shift = tl.load(stats_ptr + 3 * C + offs_c, mask=mask_c, other=0.0)

    sum_g = tl.zeros([BLOCK_N * BLOCK_S, BLOCK_C], dtype=tl.float32)
    sum_gx = tl.zeros([BLOCK_N * BLOCK_S, BLOCK_C], dtype=tl.float32)
    pixel_tiles = tl.cdiv(S, BLOCK_S)
    for tile in range(tl.program_id(1), tl.cdiv(N, BLOCK_N) * pixel_tiles, tl.num_programs(1)):
        n0, s0 = (tile // pixel_tiles).to(tl.int64) * BLOCK_N, tile % pixel_tiles * BLOCK_S
        base, offsets, mask = _image_offsets(n0, s0, c0, N, C, S, BLOCK_N, BLOCK_S, BLOCK_C, CHANNELS_LAST)
        dy = _average_gradient(dpooled_ptr, n0, c0, N, C, S, BLOCK_N, BLOCK_C)
        x_centred = tl.zeros([BLOCK_N * BLOCK_S, BLOCK_C], dtype=tl.float32)
        if RELU and mask_ptr is None:
            x_centred = _centred_tile(x_ptr, mean, base, offsets, mask)
        g = _head_gradient_tile(
            dy, x_centred, mask_ptr, scale, shift, mask, n0, s0, c0, N, C, S,
            dpooled_ptr.dtype.element_ty, RELU, CHANNELS_LAST, BLOCK_N, BLOCK_S, BLOCK_C,
        )  # fmt: skip
        if SUMS:  # ahead of the stores, whose addresses take registers too
            if not RELU or mask_ptr is not None:
                x_centred = _centred_tile(x_ptr, mean, base, offsets, mask)
            sum_g += g
            sum_gx += g * x_centred
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + base + offsets, g.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if dx_ptr is not None:  # frozen statistics
            tl.store(dx_ptr + base + offsets, (g * scale[None, :]).to(dx_ptr.dtype.element_ty), mask=mask)
    if SUMS:
        _finish_sums(
            _sum_of_eight(sum_g), _sum_of_eight(sum_gx), stats_ptr, counters_ptr, partials_ptr, means_ptr, dweight_ptr,
            dbias_ptr, offs_c, mask_c, N.to(tl.int64) * S, C, BLOCK_C, BLOCK_P,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "C", "S"])
def _batch_norm_head_bwd_apply_kernel(
    dpooled_ptr, x_ptr, mask_ptr, stats_ptr, means_ptr, dx_ptr,
    N, C, S,
    RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    TILES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    _, C, S = _aligned_extents(S, C, S, CHANNELS_LAST, ALIGN)
    channel_tiles = tl.cdiv(C, BLOCK_C)
    # Backwards through memory: what the reduction read last is still in the L2 cache.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    pid_n = pid // channel_tiles
    c0 = pid % channel_tiles * BLOCK_C
    offs_c = c0 + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mean = tl.load(stats_ptr + offs_c, mask=mask_c, other=0.0)
    scale = tl.load(stats_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)
    shift = tl.load(stats_ptr + 3 * C + offs_c, mask=mask_c, other=0.0)
    mean_g = tl.load(means_ptr + offs_c, mask=mask_c, other=0.0)
    mean_gx = tl.load(means_ptr + C + offs_c, mask=mask_c, other=0.0)

    first = pid_n * (TILES * BLOCK_N)
    for n in range(first, tl.minimum(first + TILES * BLOCK_N, N), BLOCK_N):
        n0 = tl.full([], 0, dtype=tl.int64) + n
        dy = _average_gradient(dpooled_ptr, n0, c0, N, C, S, BLOCK_N, BLOCK_C)
        for s0 in range(0, S, BLOCK_S):
            base, offsets, mask = _image_offsets(n0, s0, c0, N, C, S, BLOCK_N, BLOCK_S, BLOCK_C, CHANNELS_LAST)
            x_centred = _centred_tile(x_ptr, mean, base, offsets, mask)
            g = _head_gradient_tile(
                dy, x_centred, mask_ptr, scale, shift, mask, n0, s0, c0, N, C, S,
                dpooled_ptr.dtype.element_ty, RELU, CHANNELS_LAST, BLOCK_N, BLOCK_S, BLOCK_C,
            )  # fmt: skip
            dx = scale[None, :] * (g - mean_g[None, :] - x_centred * mean_gx[None, :])
            tl.store(dx_ptr + base + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "C", "S"])
def _batch_norm_head_bwd_on_chip_kernel(
    dpooled_ptr, x_ptr, mask_ptr, stats_ptr, dweight_ptr, dbias_ptr, dresidual_ptr, dx_ptr,
    N, C, S,
    RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    _, C, S = _aligned_extents(S, C, S, CHANNELS_LAST, ALIGN)
    c0 = tl.program_id(0) * BLOCK_C
    offs_c = c0 + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mean = tl.load(stats_ptr + offs_c, mask=mask_c, other=0.0)
    rstd = tl.load(stats_ptr + C + offs_c, mask=mask_c, other=0.0)
    scale = tl.load(stats_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)
    shift = tl.load(stats_ptr + 3 * C + offs_c, mask=mask_c, other=0.0)

    n0 = tl.full([], 0, dtype=tl.int64)
    base, offsets, mask = _image_offsets(n0, 0, c0, N, C, S, BLOCK_N, BLOCK_S, BLOCK_C, CHANNELS_LAST)
    dy = _average_gradient(dpooled_ptr, n0, c0, N, C, S, BLOCK_N, BLOCK_C)
    x_centred = _centred_tile(x_ptr, mean, base, offsets, mask)
    g = _head_gradient_tile(
        dy, x_centred, mask_ptr, scale, shift, mask, n0, 0, c0, N, C, S,
        dpooled_ptr.dtype.element_ty, RELU, CHANNELS_LAST, BLOCK_N, BLOCK_S, BLOCK_C,
    )  # fmt: skip
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + base + offsets, g.to(dresidual_ptr.dtype.element_ty), mask=mask)
    sum_g = _sum_rows(g)
    sum_gx = _sum_rows(g * x_centred)
    _store_parameter_gradients(sum_g, sum_gx, rstd, dweight_ptr, dbias_ptr, offs_c, mask_c)
    if dx_ptr is not None:
        count = (N * S).to(tl.float32)
        mean_gx = rstd * rstd * (sum_gx / count)
        dx = scale[None, :] * (g - (sum_g / count)[None, :] - x_centred * mean_gx[None, :])
        tl.store(dx_ptr + base + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def batch_norm_head_bwd_reduce(
    dy: Tensor, x: Tensor, mask: Tensor | None, stats: Tensor, view: Rows, act: str | None, out: Gradients,
    means: Tensor | None,
) -> None:  # fmt: skip
    """Fill the parameter gradients and dresidual of ``out``, and ``means`` [2, C] for the apply kernel.

    ``out.x`` given: the statistics were frozen, and this launch writes it too. Reads x (unless nothing needs it) and
    the mask, writes dresidual; one launch.
    """
    config = tiling.image_reduction(view, x.itemsize, num_sms(x.device))
    sums = means is not None or out.weight is not None or out.bias is not None
    partials = x.new_empty((2, config.programs, view.C), dtype=torch.float32) if sums else None
    with on_device(x.device):
        _batch_norm_head_bwd_reduce_kernel[config.channel_tiles, config.programs](
            dy, x, mask, stats, counters(x.device) if sums else None, partials, means, out.weight, out.bias,
            out.residual, out.x,
            view.images, view.C, view.S,
            RELU=act == "relu", SUMS=sums, CHANNELS_LAST=view.channels_last, ALIGN=view.align,
            BLOCK_N=config.block_n, BLOCK_S=config.block_s, BLOCK_C=config.block_c, BLOCK_P=16,
            num_warps=config.num_warps,
        )  # fmt: skip


def batch_norm_head_bwd_apply(
    dy: Tensor, x: Tensor, mask: Tensor | None, stats: Tensor, means: Tensor, view: Rows, act: str | None, dx: Tensor
) -> None:
    """Fill dx. Reads x and the mask, writes dx; one launch."""
    config = tiling.images(view, x.itemsize)
    with on_device(x.device):
        _batch_norm_head_bwd_apply_kernel[config.grid](
            dy, x, mask, stats, means, dx,
            view.images, view.C, view.S,
            RELU=act == "relu", CHANNELS_LAST=view.channels_last, ALIGN=view.align,
            TILES=config.tiles, BLOCK_N=config.block_n, BLOCK_S=config.block_s, BLOCK_C=config.block_c,
            num_warps=config.num_warps,
        )  # fmt: skip


def batch_norm_head_bwd_on_chip(
    dy: Tensor, x: Tensor, mask: Tensor | None, stats: Tensor, view: Rows, config: ImageTiling, act: str | None,
    out: Gradients,
) -> None:  # fmt: skip
    """Fill ``out`` in one launch: reads x and the mask once, writes dx and dresidual."""
    with on_device(x.device):
        _batch_norm_head_bwd_on_chip_kernel[config.grid](
            dy, x, mask, stats, out.weight, out.bias, out.residual, out.x,
            view.images, view.C, view.S,
            RELU=act == "relu", CHANNELS_LAST=view.channels_last, ALIGN=view.align,
            BLOCK_N=config.block_n, BLOCK_S=config.block_s, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip


def batch_norm_head_backward(
    dy: Tensor, x: Tensor, mask: Tensor | None, stats: Tensor, act: str | None, frozen: bool, out: Gradients
) -> None:
    """Fill the tensors of ``out`` from dy [N, C]; those like x have its strides.

    One launch with frozen statistics or where a channel tile fits on-chip, else two.
    """
    view = rows(x)
    if frozen:
        batch_norm_head_bwd_reduce(dy, x, mask, stats, view, act, out, None)
        return
    widest = x.itemsize if out.residual is None else max(x.itemsize, out.residual.itemsize)
    config = tiling.images_on_chip(view, widest)
    if config is not None:
        batch_norm_head_bwd_on_chip(dy, x, mask, stats, view, config, act, out)
        return
    means = None if out.x is None else x.new_empty((2, view.C), dtype=torch.float32)
    batch_norm_head_bwd_reduce(dy, x, mask, stats, view, act, out._replace(x=None), means)
    if out.x is not None and means is not None:
        batch_norm_head_bwd_apply(dy, x, mask, stats, means, view, act, out.x)
