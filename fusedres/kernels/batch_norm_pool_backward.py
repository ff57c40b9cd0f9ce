"""Backward kernels of max_pool2d(act(batch_norm(x))), and their launchers.

An element of x gathers: its g is the sum of the gradients of the windows that it won. The tiles' rows are *cells* of
stride_h by stride_w elements, so that which windows lie over an element of a cell, and where the element is in them,
is known when a kernel is compiled. From g on it is the backward of ``batch_norm_backward``.
"""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false
# (the device language only looks like Python)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels import tiling
from fusedres.kernels._common import _arrive, _sum_partials, _sum_rows
from fusedres.kernels.batch_norm_backward import Gradients, _store_parameter_gradients
from fusedres.kernels.batch_norm_pool import CLOSED, _place_offsets, _places, _pooled, _step, constants
from fusedres.kernels.layout import Window, planes
from fusedres.kernels.workspace import counters, num_sms, on_device


@triton.jit
def _cells(
    row0, offs_c, mask_c, N, C, H, W,
    WINDOW: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """(row, column, offsets of the output there, offsets of the first element, mask) of the cells from ``row0`` on."""
    OH, OW = _pooled(H, W, WINDOW)
    n, i, j = _places(row0, tl.cdiv(H, WINDOW[2]), tl.cdiv(W, WINDOW[3]), BLOCK_M)
    offsets_o = _place_offsets(n, i, j, offs_c, C, OH, OW, CHANNELS_LAST)
    offsets_x = _place_offsets(n, i * WINDOW[2], j * WINDOW[3], offs_c, C, H, W, CHANNELS_LAST)
    return i, j, offsets_o, offsets_x, (n < N)[:, None] & mask_c[None, :]


@triton.jit
def _window_gradient(
    k, r, dy_ptr, grad_fork_ptr, winner_ptr, i, j, offsets, step, mask, OH, OW, WINDOW: tl.constexpr
):  # fmt: skip
    """What the r-th element of each cell has from the k-th window over it: its gradient, or 0 where another won."""
    SH: tl.constexpr = WINDOW[2]
    SW: tl.constexpr = WINDOW[3]
    ACROSS: tl.constexpr = (WINDOW[1] + SW - 1) // SW  # windows side by side, at most
    # The element is (e_h, e_w) behind the beginning of the window (i, j), and (t_h, t_w) behind that of the k-th.
    e_h, e_w = r // SW + WINDOW[4], r % SW + WINDOW[5]
    t_h, t_w = e_h % SH + k // ACROSS * SH, e_w % SW + k % ACROSS * SW
    d_h, d_w = (e_h - t_h) // SH, (e_w - t_w) // SW
    oh, ow = i + d_h, j + d_w
    there = (t_h < WINDOW[0]) & (t_w < WINDOW[1])
    mask = ((oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW) & there)[:, None] & mask
    offsets = offsets + (d_h * OW + d_w) * step
    winner = tl.load(winner_ptr + offsets, mask=mask, other=CLOSED)
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if grad_fork_ptr is not None:
        dy += tl.load(grad_fork_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return tl.where(winner == t_h * WINDOW[1] + t_w, dy, 0.0)


@triton.jit
def _gather(
    first, dy_ptr, grad_fork_ptr, winner_ptr, i, j, offsets, step, mask, H, W,
    COUNT: tl.constexpr, WINDOW: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The gradients of COUNT elements of each cell from ``first`` on: the sums of those of the windows they won."""
    WINDOWS: tl.constexpr = ((WINDOW[0] + WINDOW[2] - 1) // WINDOW[2]) * ((WINDOW[1] + WINDOW[3] - 1) // WINDOW[3])
    STEP: tl.constexpr = WINDOWS if UNROLL else 1
    OH, OW = _pooled(H, W, WINDOW)
    gradients = ()
    for r in tl.static_range(COUNT):
        g = tl.zeros(offsets.shape, dtype=tl.float32)
        for k0 in range(0, WINDOWS, STEP):
            for k in tl.static_range(STEP):
                g += _window_gradient(
                    k0 + k, first + r, dy_ptr, grad_fork_ptr, winner_ptr, i, j, offsets, step, mask, OH, OW, WINDOW
                )  # fmt: skip
        gradients += (g,)
    return gradients


@triton.jit
def _element(r, i, j, offsets, step, mask, H, W, WINDOW: tl.constexpr):
    """(offsets, mask) of the r-th element of each cell."""
    inside = (i * WINDOW[2] + r // WINDOW[3] < H) & (j * WINDOW[3] + r % WINDOW[3] < W)
    return offsets + (r // WINDOW[3] * W + r % WINDOW[3]) * step, inside[:, None] & mask


@triton.jit
def _load_elements(x_ptr, first, i, j, offsets, step, mask, H, W, COUNT: tl.constexpr, WINDOW: tl.constexpr):
    """x of COUNT elements of each cell from ``first`` on."""
    elements = ()
    for r in tl.static_range(COUNT):
        offsets_r, mask_r = _element(first + r, i, j, offsets, step, mask, H, W, WINDOW)
        elements += (tl.load(x_ptr + offsets_r, mask=mask_r, other=0.0),)
    return elements


@triton.jit(do_not_specialize=["N", "C", "H", "W"])
def _batch_norm_pool_bwd_reduce_kernel(
    dy_ptr, grad_fork_ptr, winner_ptr, x_ptr, stats_ptr, counters_ptr, partials_ptr, means_ptr, dweight_ptr,
    dbias_ptr, dx_ptr,
    N, C, H, W,
    SUMS: tl.constexpr, WINDOW: tl.constexpr, UNROLL: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    CELL: tl.constexpr = WINDOW[2] * WINDOW[3]
    STEP: tl.constexpr = CELL if UNROLL else 1
    COUNT: tl.constexpr = WINDOW[3] if UNROLL else 1  # a row of the cell at once
    C = C // ALIGN * ALIGN
    pid_c, pid_m, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mean = tl.load(stats_ptr + offs_c, mask=mask_c, other=0.0)
    scale = tl.load(stats_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)
    step = _step(C, CHANNELS_LAST)

    sum_g = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    sum_gx = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    cells = N.to(tl.int64) * tl.cdiv(H, WINDOW[2]) * tl.cdiv(W, WINDOW[3])
    for row0 in range(pid_m.to(tl.int64) * BLOCK_M, cells, programs * BLOCK_M):
        i, j, offsets_o, offsets_x, mask = _cells(row0, offs_c, mask_c, N, C, H, W, WINDOW, CHANNELS_LAST, BLOCK_M)
        for r0 in range(0, CELL, STEP):
            for row in tl.static_range(0, STEP, COUNT):
                gradients = _gather(
                    r0 + row, dy_ptr, grad_fork_ptr, winner_ptr, i, j, offsets_o, step, mask, H, W,
                    COUNT, WINDOW, UNROLL,
                )  # fmt: skip
                if SUMS:
                    elements = _load_elements(x_ptr, r0 + row, i, j, offsets_x, step, mask, H, W, COUNT, WINDOW)
                for r in tl.static_range(COUNT):
                    if SUMS:
                        sum_g += gradients[r]
                        sum_gx += gradients[r] * (elements[r].to(tl.float32) - mean[None, :])
                    if dx_ptr is not None:  # frozen statistics
                        dx = (gradients[r] * scale[None, :]).to(dx_ptr.dtype.element_ty)
                        offsets_r, mask_r = _element(r0 + row + r, i, j, offsets_x, step, mask, H, W, WINDOW)
                        tl.store(dx_ptr + offsets_r, dx, mask=mask_r)

    if SUMS:
        counter_ptr = counters_ptr + 1 + pid_c
        tl.store(partials_ptr + pid_m * C + offs_c, _sum_rows(sum_g), mask=mask_c)
        tl.store(partials_ptr + (programs + pid_m) * C + offs_c, _sum_rows(sum_gx), mask=mask_c)
        if _arrive(counter_ptr) == programs - 1:
            all_g = _sum_partials(partials_ptr, offs_c, mask_c, C, programs, BLOCK_C, BLOCK_P)
            all_gx = _sum_partials(partials_ptr + programs * C, offs_c, mask_c, C, programs, BLOCK_C, BLOCK_P)
            rstd = tl.load(stats_ptr + C + offs_c, mask=mask_c, other=0.0)
            _store_parameter_gradients(all_g, all_gx, rstd, dweight_ptr, dbias_ptr, offs_c, mask_c)
            if means_ptr is not None:
                rows = (N.to(tl.int64) * H * W).to(tl.float32)
                tl.store(means_ptr + offs_c, all_g / rows, mask=mask_c)
                tl.store(means_ptr + C + offs_c, rstd * rstd * (all_gx / rows), mask=mask_c)
            tl.store(counter_ptr, 0)


@triton.jit(do_not_specialize=["N", "C", "H", "W"])
def _batch_norm_pool_bwd_apply_kernel(
    dy_ptr, grad_fork_ptr, winner_ptr, x_ptr, stats_ptr, means_ptr, dx_ptr,
    N, C, H, W,
    WINDOW: tl.constexpr, UNROLL: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    CELL: tl.constexpr = WINDOW[2] * WINDOW[3]
    STEP: tl.constexpr = CELL if UNROLL else 1
    COUNT: tl.constexpr = WINDOW[3] if UNROLL else 1  # a row of the cell at once
    C = C // ALIGN * ALIGN
    channel_tiles = tl.cdiv(C, BLOCK_C)
    # Backwards through memory: what the reduction read last is still in the L2 cache.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    pid_m = pid // channel_tiles
    offs_c = pid % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mean = tl.load(stats_ptr + offs_c, mask=mask_c, other=0.0)
    scale = tl.load(stats_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)
    mean_g = tl.load(means_ptr + offs_c, mask=mask_c, other=0.0)
    mean_gx = tl.load(means_ptr + C + offs_c, mask=mask_c, other=0.0)
    step = _step(C, CHANNELS_LAST)

    cells = N.to(tl.int64) * tl.cdiv(H, WINDOW[2]) * tl.cdiv(W, WINDOW[3])
    start = pid_m.to(tl.int64) * (TILES * BLOCK_M)
    for row0 in range(start, tl.minimum(start + TILES * BLOCK_M, cells), BLOCK_M):
        i, j, offsets_o, offsets_x, mask = _cells(row0, offs_c, mask_c, N, C, H, W, WINDOW, CHANNELS_LAST, BLOCK_M)
        for r0 in range(0, CELL, STEP):
            for row in tl.static_range(0, STEP, COUNT):
                gradients = _gather(
                    r0 + row, dy_ptr, grad_fork_ptr, winner_ptr, i, j, offsets_o, step, mask, H, W,
                    COUNT, WINDOW, UNROLL,
                )  # fmt: skip
                elements = _load_elements(x_ptr, r0 + row, i, j, offsets_x, step, mask, H, W, COUNT, WINDOW)
                for r in tl.static_range(COUNT):
                    x_centred = elements[r].to(tl.float32) - mean[None, :]
                    dx = scale[None, :] * (gradients[r] - mean_g[None, :] - x_centred * mean_gx[None, :])
                    offsets_r, mask_r = _element(r0 + row + r, i, j, offsets_x, step, mask, H, W, WINDOW)
                    tl.store(dx_ptr + offsets_r, dx.to(dx_ptr.dtype.element_ty), mask=mask_r)


def batch_norm_pool_bwd_reduce(
    dy: Tensor, grad_fork: Tensor | None, x: Tensor, stats: Tensor, winner: Tensor, window: Window,
    means: Tensor | None, out: Gradients,
) -> None:  # fmt: skip
    """Fill the parameter gradients of ``out``, and ``means`` [2, C] for the apply kernel.

    ``out.x`` given: the statistics were frozen, and this launch writes it too. Reads the gradients and ``winner``,
    and x unless nothing but dx is wanted; one launch.
    """
    view = planes(x, window)
    shared = constants(view)
    config = tiling.pool_reduction(view.cells, x.itemsize, num_sms(x.device), shared["UNROLL"])
    sums = means is not None or out.weight is not None or out.bias is not None
    partials = x.new_empty((2, config.programs, view.C), dtype=torch.float32) if sums else None
    with on_device(x.device):
        _batch_norm_pool_bwd_reduce_kernel[config.channel_tiles, config.programs](
            dy, grad_fork, winner, x, stats, counters(x.device) if sums else None, partials, means, out.weight,
            out.bias, out.x,
            *view[:4],
            SUMS=sums, **shared,
            BLOCK_M=config.block_m, BLOCK_C=config.block_c, BLOCK_P=16, num_warps=config.num_warps,
        )  # fmt: skip


def batch_norm_pool_bwd_apply(
    dy: Tensor, grad_fork: Tensor | None, x: Tensor, stats: Tensor, winner: Tensor, window: Window, means: Tensor,
    dx: Tensor,
) -> None:  # fmt: skip
    """Fill dx. Reads the gradients, ``winner`` and x, writes dx; one launch."""
    view = planes(x, window)
    config = tiling.pool_elementwise(view.cells, x.itemsize)
    with on_device(x.device):
        _batch_norm_pool_bwd_apply_kernel[config.grid](
            dy, grad_fork, winner, x, stats, means, dx,
            *view[:4],
            **constants(view),
            TILES=config.tiles, BLOCK_M=config.block_m, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip


def batch_norm_act_max_pool2d_backward(
    dy: Tensor, grad_fork: Tensor | None, x: Tensor, stats: Tensor, winner: Tensor, window: Window, frozen: bool,
    out: Gradients,
) -> None:  # fmt: skip
    """Fill the tensors of ``out``; one launch with frozen statistics, else two.

    dy, ``grad_fork`` and ``winner`` have the strides of the output, x and ``out.x`` those of the input.
    """
    if frozen or out.x is None:
        batch_norm_pool_bwd_reduce(dy, grad_fork, x, stats, winner, window, None, out)
        return
    means = x.new_empty((2, x.shape[1]), dtype=torch.float32)
    batch_norm_pool_bwd_reduce(dy, grad_fork, x, stats, winner, window, means, out._replace(x=None))
    batch_norm_pool_bwd_apply(dy, grad_fork, x, stats, winner, window, means, out.x)
