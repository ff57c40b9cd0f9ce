"""One-kernel forwards of act(linear(layer_norm(x))) and of act(layer_norm(linear(x))) + residual, and the masking
pass of the former's backward. The large products of the backward are the vendor library's.
"""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false
# (the device language only looks like Python)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from fusedres.kernels import tiling
from fusedres.kernels._common import (
    _arrive,
    _load_vector,
    _normalise,
    _positive,
    _row_moments,
    _rstd,
    _sum_partials,
    _sum_rows,
)
from fusedres.kernels.layout import Rows, alignment
from fusedres.kernels.tiling import GemmTiling
from fusedres.kernels.workspace import counters, num_sms, on_device

_INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """total + a·b in float32; the interpreter multiplies the raw bits of bfloat16."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _streamed_moments(x_ptr, offsets, mask_m, K, EPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """(mean, rstd) of rows of K, read BLOCK_K columns at a time; every lane has moments of its own until the end."""
    lanes = tl.arange(0, BLOCK_K)
    mean = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    m2 = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    for k0 in tl.range(0, K, BLOCK_K, num_stages=3):  # as loads for a product are by themselves
        mask_k = lanes < K - k0
        x = tl.load(x_ptr + k0 + offsets, mask=mask_m[:, None] & mask_k[None, :], other=0.0).to(tl.float32)
        delta = tl.where(mask_k[None, :], x - mean, 0.0)
        mean += delta * (BLOCK_K / (k0 + BLOCK_K))
        m2 += delta * (x - mean)
    count = ((K - lanes + BLOCK_K - 1) // BLOCK_K).to(tl.float32)[None, :]
    total = K.to(tl.float32)
    average = tl.sum(count * mean, axis=1) / total
    average += tl.sum(count * (mean - average[:, None]), axis=1) / total  # refined, as in _average
    spread = mean - average[:, None]
    return average, _rstd(tl.sum(m2 + count * spread * spread, axis=1) / total, EPS)


@triton.jit(do_not_specialize=["M", "N", "K"])
def _layer_norm_linear_fwd_kernel(
    x_ptr, ln_weight_ptr, ln_bias_ptr, weight_ptr, bias_ptr, stats_ptr, y_ptr,
    M, N, K,
    EPS: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, ALIGN_N: tl.constexpr, ALIGN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    N = N // ALIGN_N * ALIGN_N
    K = K // ALIGN_K * ALIGN_K
    # Programs of one row tile follow each other: x comes from memory once, then from the L2 cache.
    tiles_n = tl.cdiv(N, BLOCK_N)
    row0 = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M
    n0 = (tl.program_id(0) % tiles_n).to(tl.int64) * BLOCK_N
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M - row0
    mask_n = offs_n < N - n0
    x_ptr += row0 * K
    x_offsets = offs_m[:, None] * K + offs_k[None, :]
    weight_ptr += n0 * K
    w_offsets = offs_n[None, :] * K + offs_k[:, None]
    mean, rstd = _streamed_moments(x_ptr, x_offsets, mask_m, K, EPS, BLOCK_M, BLOCK_K)
    if stats_ptr is not None:
        first = mask_m & (n0 == 0)
        tl.store(stats_ptr + row0 + offs_m, mean, mask=first)
        tl.store(stats_ptr + M + row0 + offs_m, rstd, mask=first)

    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k0
        x = tl.load(x_ptr + k0 + x_offsets, mask=mask_m[:, None] & mask_k[None, :], other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + k0 + w_offsets, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        gamma = _load_vector(ln_weight_ptr, k0 + offs_k, mask_k, 1.0)
        beta = _load_vector(ln_bias_ptr, k0 + offs_k, mask_k, 0.0)
        normalised = _normalise((x - mean[:, None]) * rstd[:, None], gamma, beta)
        # Columns that do not exist: (0 − mean)·rstd may overflow, and infinity times 0 is NaN.
        normalised = tl.where(mask_k[None, :], normalised, 0.0)
        total = _dot(normalised.to(w.dtype), w, total, PRECISION)
    y = total + _load_vector(bias_ptr, n0 + offs_n, mask_n, 0.0)[None, :]
    if RELU:
        y = tl.where(_positive(y, y_ptr.dtype.element_ty), y, 0.0)
    y_ptr += row0 * N + n0
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "N", "K"])
def _linear_layer_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, ln_weight_ptr, ln_bias_ptr, residual_ptr, product_ptr, stats_ptr, y_ptr,
    M, N, K,
    EPS: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, ALIGN_N: tl.constexpr, ALIGN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    N = N // ALIGN_N * ALIGN_N
    K = K // ALIGN_K * ALIGN_K
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M - row0
    mask_n = offs_n < N
    x_ptr += row0 * K
    x_offsets = offs_m[:, None] * K + offs_k[None, :]
    w_offsets = offs_n[None, :].to(tl.int64) * K + offs_k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k0
        x = tl.load(x_ptr + k0 + x_offsets, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(weight_ptr + k0 + w_offsets, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        total = _dot(x, w, total, PRECISION)
    # Rounded as it is saved, so that the backward finds the same sign of the ReLU's input.
    z = (total + _load_vector(bias_ptr, offs_n, mask_n, 0.0)[None, :]).to(x_ptr.dtype.element_ty)
    offsets = offs_m[:, None] * N + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if product_ptr is not None:
        tl.store(product_ptr + row0 * N + offsets, z, mask=mask)
    z = z.to(tl.float32)
    mean, rstd = _row_moments(z, mask_n, N, EPS)
    if stats_ptr is not None:
        tl.store(stats_ptr + row0 + offs_m, mean, mask=mask_m)
        tl.store(stats_ptr + M + row0 + offs_m, rstd, mask=mask_m)
    gamma = _load_vector(ln_weight_ptr, offs_n, mask_n, 1.0)
    beta = _load_vector(ln_bias_ptr, offs_n, mask_n, 0.0)
    y = _normalise((z - mean[:, None]) * rstd[:, None], gamma, beta)
    if RELU:
        y = tl.where(_positive(y, y_ptr.dtype.element_ty), y, 0.0)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + row0 * N + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row0 * N + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "N", "programs"])
def _relu_bias_bwd_kernel(
    dy_ptr, y_ptr, g_ptr, counters_ptr, partials_ptr, dbias_ptr,
    M, N, programs,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    N = N // ALIGN * ALIGN
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid_n = tl.program_id(0) % tiles_n
    pid_m = tl.program_id(0) // tiles_n
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    sum_g = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for row0 in range(pid_m.to(tl.int64) * BLOCK_M, M, programs * BLOCK_M):
        mask = (row0 + tl.arange(0, BLOCK_M) < M)[:, None] & mask_n[None, :]
        base = row0 * N
        offsets = tl.arange(0, BLOCK_M)[:, None] * N + offs_n[None, :]
        g = tl.load(dy_ptr + base + offsets, mask=mask, other=0.0)
        if y_ptr is not None:
            y = tl.load(y_ptr + base + offsets, mask=mask, other=0.0)
            g = tl.where(_positive(y, y_ptr.dtype.element_ty), g, 0.0)
        if g_ptr is not None:
            tl.store(g_ptr + base + offsets, g, mask=mask)
        sum_g += g.to(tl.float32)
    if dbias_ptr is not None:
        tl.store(partials_ptr + pid_m * N + offs_n, _sum_rows(sum_g), mask=mask_n)
        if _arrive(counters_ptr + 1 + pid_n) == programs - 1:
            total = _sum_partials(partials_ptr, offs_n, mask_n, N, programs, BLOCK_N, BLOCK_P)
            tl.store(dbias_ptr + offs_n, total.to(dbias_ptr.dtype.element_ty), mask=mask_n)
            tl.store(counters_ptr + 1 + pid_n, 0)


def layer_norm_linear_fwd(
    x: Tensor, ln_weight: Tensor | None, ln_bias: Tensor | None, weight: Tensor, bias: Tensor | None,
    stats: Tensor | None, config: GemmTiling, eps: float, act: str | None, tf32: bool, y: Tensor,
) -> None:  # fmt: skip
    """Fill y [M, N] and, where given, ``stats``. Reads x [M, K] and the weight [N, K], writes y; one launch.

    Every program reads its rows of x twice, for their moments and for the product. Programs of one row tile follow
    each other, so that the L2 cache can serve all but the first read.
    """
    (M, K), N = x.shape, weight.shape[0]
    with on_device(x.device):
        _layer_norm_linear_fwd_kernel[(tiling.cdiv(M, config.block_m) * tiling.cdiv(N, config.block_n),)](
            x, ln_weight, ln_bias, weight, bias, stats, y,
            M, N, K,
            EPS=eps, RELU=act == "relu", PRECISION="tf32" if tf32 else "ieee",
            ALIGN_N=alignment(N), ALIGN_K=alignment(K),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip


def linear_layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, ln_weight: Tensor | None, ln_bias: Tensor | None,
    residual: Tensor | None, product: Tensor | None, stats: Tensor | None, config: GemmTiling,
    eps: float, act: str | None, tf32: bool, y: Tensor,
) -> None:  # fmt: skip
    """Fill y [M, N] and, where given, the product [M, N] and ``stats``; ``config.block_n`` covers a row.

    Reads x [M, K], the weight [N, K] and the residual, writes y and the product; one launch.
    """
    (M, K), N = x.shape, weight.shape[0]
    with on_device(x.device):
        _linear_layer_norm_fwd_kernel[(tiling.cdiv(M, config.block_m),)](
            x, weight, bias, ln_weight, ln_bias, residual, product, stats, y,
            M, N, K,
            EPS=eps, RELU=act == "relu", PRECISION="tf32" if tf32 else "ieee",
            ALIGN_N=alignment(N), ALIGN_K=alignment(K),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip


def relu_bias_bwd(dy: Tensor, y: Tensor | None, g: Tensor | None, dbias: Tensor | None) -> None:
    """Fill g [M, N], which is dy where y (if given) is positive, and its column sums; each where it is given.

    Reads dy and y, writes g; one launch.
    """
    M, N = dy.shape
    view = Rows(M, N, 1, True)
    config = tiling.reduction(view, dy.itemsize, num_sms(dy.device))
    partials = None if dbias is None else torch.empty((config.programs, N), dtype=torch.float32, device=dy.device)
    with on_device(dy.device):
        _relu_bias_bwd_kernel[config.grid](
            dy, y, g, None if dbias is None else counters(dy.device), partials, dbias,
            M, N, config.programs,
            ALIGN=view.align, BLOCK_M=config.block_m, BLOCK_N=config.block_c, BLOCK_P=16, num_warps=config.num_warps,
        )  # fmt: skip
