"""The probe's 1x1 convolution: a Triton GEMM over channels-last rows, with the prologue and the epilogue that a fused
network would want. Not part of the package: whether it should be is what the probe measures.
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
from triton import knobs

from fusedres.kernels._common import _arrive, _chan_merge, _normalise, _positive, _rstd
from fusedres.kernels.batch_norm_statistics import _merge_partials
from fusedres.kernels.layout import alignment
from fusedres.kernels.tiling import cdiv
from fusedres.kernels.workspace import counters, num_sms

EPS = 1e-5
_INTERPRETED = tl.constexpr(knobs.runtime.interpret)


class Tile(NamedTuple):
    """A candidate: the tile of a program, and how many programs a multiprocessor is given at most."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    per_sm: int


# Little shared memory and many programs for the memory-bound layers; large tiles for the others.
TILES = (
    Tile(128, 64, 64, 4, 2, 3),
    Tile(128, 128, 64, 8, 3, 1),
    Tile(64, 64, 64, 4, 4, 3),
    Tile(128, 256, 64, 8, 3, 1),
)


class Prologue(NamedTuple):
    """Vectors [C_in] in float32: the input becomes ReLU((x - mean) * scale + shift)."""

    mean: Tensor
    scale: Tensor
    shift: Tensor


@triton.jit
def _pixels(rows, H, W, STRIDE: tl.constexpr):
    """The pixels of the input that the output rows (int64) of a convolution with STRIDE read."""
    if STRIDE == 1:
        return rows
    out_w = (W + STRIDE - 1) // STRIDE
    out_h = (H + STRIDE - 1) // STRIDE
    inside = rows % (out_h * out_w)
    return (rows // (out_h * out_w) * H + inside // out_w * STRIDE) * W + inside % out_w * STRIDE


@triton.jit(do_not_specialize=["M", "N", "K", "H", "W", "programs"])
def _conv1x1_kernel(
    x_ptr, weight_ptr, y_ptr, mean_ptr, scale_ptr, shift_ptr, counters_ptr, partials_ptr, stats_ptr,
    M, N, K, H, W, programs,
    EPS: tl.constexpr, STRIDE: tl.constexpr, EVEN_K: tl.constexpr, ALIGN_N: tl.constexpr, ALIGN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    N = N // ALIGN_N * ALIGN_N
    K = K // ALIGN_K * ALIGN_K
    # Programs that run at once share rows: x comes from memory once, then from the L2 cache.
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid_n = tl.program_id(0) % tiles_n
    pid_m = tl.program_id(0) // tiles_n
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    weights = weight_ptr + offs_n[None, :] * K + offs_k[:, None]
    count_n = 0.0
    mean_n = tl.zeros([BLOCK_N], dtype=tl.float32)
    m2_n = tl.zeros([BLOCK_N], dtype=tl.float32)
    for row0 in range(pid_m.to(tl.int64) * BLOCK_M, M, programs * BLOCK_M):
        rows = row0 + tl.arange(0, BLOCK_M)
        mask_m = rows < M
        inputs = x_ptr + (_pixels(rows, H, W, STRIDE) * K)[:, None] + offs_k[None, :]
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k0 in range(0, K, BLOCK_K):
            mask_x, mask_w = mask_m[:, None], mask_n[None, :]
            if not EVEN_K:
                mask_x = mask_x & (offs_k < K - k0)[None, :]
                mask_w = mask_w & (offs_k < K - k0)[:, None]
            x = tl.load(inputs + k0, mask=mask_x, other=0.0)
            w = tl.load(weights + k0, mask=mask_w, other=0.0)
            if mean_ptr is not None:
                mask_k = offs_k < K - k0
                mean = tl.load(mean_ptr + k0 + offs_k, mask=mask_k, other=0.0)
                scale = tl.load(scale_ptr + k0 + offs_k, mask=mask_k, other=0.0)
                shift = tl.load(shift_ptr + k0 + offs_k, mask=mask_k, other=0.0)
                z = _normalise(x.to(tl.float32) - mean[None, :], scale, shift)
                z = tl.where(_positive(z, x.dtype) & mask_x, z, 0.0)  # rows that do not exist have a shift too
                x = z.to(x.dtype)
            if _INTERPRETED:  # it multiplies the raw bits of bfloat16
                x, w = x.to(tl.float32), w.to(tl.float32)
            total = tl.dot(x, w, total)
        y = total.to(y_ptr.dtype.element_ty)
        mask = mask_m[:, None] & mask_n[None, :]
        tl.store(y_ptr + row0 * N + (tl.arange(0, BLOCK_M)[:, None] * N + offs_n[None, :]), y, mask=mask)
        if partials_ptr is not None:
            y = y.to(tl.float32)  # as it is stored; rows that do not exist are zero
            count = tl.minimum(M - row0, BLOCK_M).to(tl.float32)
            mean = tl.sum(y, axis=0) / count
            centred = tl.where(mask_m[:, None], y - mean[None, :], 0.0)
            count_n, mean_n, m2_n = _chan_merge(count_n, mean_n, m2_n, count, mean, tl.sum(centred * centred, axis=0))
    if partials_ptr is not None:
        tl.store(partials_ptr + pid_m * N + offs_n, mean_n, mask=mask_n)
        tl.store(partials_ptr + (programs + pid_m) * N + offs_n, m2_n / tl.maximum(count_n, 1.0), mask=mask_n)
        if _arrive(counters_ptr + 1 + pid_n) == programs - 1:
            mean, var = _merge_partials(partials_ptr, offs_n, mask_n, M, N, programs, BLOCK_M, BLOCK_N, BLOCK_P)
            tl.store(stats_ptr + offs_n, mean, mask=mask_n)
            tl.store(stats_ptr + N + offs_n, _rstd(var, EPS), mask=mask_n)
            tl.store(counters_ptr + 1 + pid_n, 0)


def conv1x1(
    x: Tensor, weight: Tensor, stride: int, tile: Tile, *, prologue: Prologue | None = None, statistics: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The convolution of a channels-last x with ``weight`` [C_out, C_in], in one launch.

    Reads x (of every ``stride``-th pixel) and the weight, writes y: the bytes of cuDNN's, and no others.

    Returns:
        y, channels-last, and with ``statistics`` the mean and 1 / sqrt(variance + EPS) of its channels, [2, C_out].
    """
    batch, K, H, W = x.shape
    N = weight.shape[0]
    size = (batch, N, (H - 1) // stride + 1, (W - 1) // stride + 1)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    M = y.numel() // N
    tiles_n = cdiv(N, tile.block_n)
    programs = max(1, min(cdiv(M, tile.block_m), num_sms(x.device) * tile.per_sm // tiles_n))
    stats = x.new_empty((2, N), dtype=torch.float32) if statistics else None
    partials = x.new_empty((2, programs, N), dtype=torch.float32) if statistics else None
    _conv1x1_kernel[(programs * tiles_n,)](
        x, weight, y, *(prologue or (None, None, None)), counters(x.device) if statistics else None, partials, stats,
        M, N, K, H, W, programs,
        EPS=EPS, STRIDE=stride, EVEN_K=K % tile.block_k == 0, ALIGN_N=alignment(N), ALIGN_K=alignment(K),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_P=16,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return y, stats
