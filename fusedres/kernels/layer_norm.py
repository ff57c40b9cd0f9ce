"""Row kernels of layer normalisation: act(layer_norm(z)) + residual, its backward, and their launchers.

A program holds whole rows, so each is read once. ``stats`` [2, M] in float32 has the rows mean and rstd; with them
the backward finds the normalised row, and the sign of the ReLU's input, again from z.
"""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportArgumentType=false
# (the device language only looks like Python)
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels import tiling
from fusedres.kernels._common import _load_vector, _normalise, _positive, _row_moments, _sum_partials, _sum_rows
from fusedres.kernels.layout import alignment
from fusedres.kernels.workspace import num_sms, on_device, warp_size


class ColumnSums(NamedTuple):
    """What the backward sums over the rows; ``None`` where it was not asked for."""

    weight: Tensor | None
    bias: Tensor | None
    dz: Tensor | None


@triton.jit(do_not_specialize=["M", "N"])
def _layer_norm_fwd_kernel(
    z_ptr, residual_ptr, weight_ptr, bias_ptr, stats_ptr, y_ptr,
    M, N,
    EPS: tl.constexpr, RELU: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    N = N // ALIGN * ALIGN
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M - row0
    mask_n = offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    base = row0 * N  # the offsets from it fit 32 bits, which halves their registers
    offsets = offs_m[:, None] * N + offs_n[None, :]
    z = tl.load(z_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    mean, rstd = _row_moments(z, mask_n, N, EPS)
    if stats_ptr is not None:
        tl.store(stats_ptr + row0 + offs_m, mean, mask=mask_m)
        tl.store(stats_ptr + M + row0 + offs_m, rstd, mask=mask_m)
    gamma = _load_vector(weight_ptr, offs_n, mask_n, 1.0)
    beta = _load_vector(bias_ptr, offs_n, mask_n, 0.0)
    y = _normalise((z - mean[:, None]) * rstd[:, None], gamma, beta)
    if RELU:
        y = tl.where(_positive(y, y_ptr.dtype.element_ty), y, 0.0)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + base + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "N", "programs"])
def _layer_norm_bwd_kernel(
    dy_ptr, z_ptr, stats_ptr, weight_ptr, bias_ptr, dz_ptr, normalised_ptr, partials_ptr,
    M, N, programs,
    RELU: tl.constexpr, SUM_AFFINE: tl.constexpr, SUM_DZ: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    N = N // ALIGN * ALIGN
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    gamma = _load_vector(weight_ptr, offs_n, mask_n, 1.0)
    beta = _load_vector(bias_ptr, offs_n, mask_n, 0.0)
    sum_gx = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    sum_g = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    sum_dz = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for row0 in range(tl.program_id(0).to(tl.int64) * BLOCK_M, M, programs * BLOCK_M):
        offs_m = row0 + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & mask_n[None, :]
        base = row0 * N
        offsets = tl.arange(0, BLOCK_M)[:, None] * N + offs_n[None, :]
        mean = tl.load(stats_ptr + offs_m, mask=offs_m < M, other=0.0)
        rstd = tl.load(stats_ptr + M + offs_m, mask=offs_m < M, other=0.0)
        z = tl.load(z_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        x_hat = (z - mean[:, None]) * rstd[:, None]
        if RELU or normalised_ptr is not None:
            normalised = _normalise(x_hat, gamma, beta)
        if normalised_ptr is not None:
            if BLOCK_N > 4096:  # no registers to keep it in
                normalised = _normalise(x_hat, gamma, _load_vector(bias_ptr, offs_n, mask_n, 0.0))
            tl.store(normalised_ptr + base + offsets, normalised.to(normalised_ptr.dtype.element_ty), mask=mask)
        if dy_ptr is not None:
            g = tl.load(dy_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
            if RELU:
                g = tl.where(_positive(normalised, dy_ptr.dtype.element_ty), g, 0.0)
            if SUM_AFFINE:
                sum_gx += g * x_hat
                sum_g += g
            if dz_ptr is not None:
                g *= gamma[None, :]
                mean_g = tl.sum(g, axis=1) / N
                mean_gx = tl.sum(g * x_hat, axis=1) / N
                dz = rstd[:, None] * (g - mean_g[:, None] - x_hat * mean_gx[:, None])
                tl.store(dz_ptr + base + offsets, dz.to(dz_ptr.dtype.element_ty), mask=mask)
                if SUM_DZ:
                    sum_dz += dz
    offs_p = tl.program_id(0) * N + offs_n
    if SUM_AFFINE:
        tl.store(partials_ptr + offs_p, _sum_rows(sum_gx), mask=mask_n)
        tl.store(partials_ptr + programs * N + offs_p, _sum_rows(sum_g), mask=mask_n)
    if SUM_DZ:
        tl.store(partials_ptr + 2 * programs * N + offs_p, _sum_rows(sum_dz), mask=mask_n)


@triton.jit(do_not_specialize=["N", "programs"])
def _column_sums_kernel(
    partials_ptr, dweight_ptr, dbias_ptr, sum_dz_ptr, N, programs, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if dweight_ptr is not None:
        total = _sum_partials(partials_ptr, offs_n, mask_n, N, programs, BLOCK_N, BLOCK_P)
        tl.store(dweight_ptr + offs_n, total.to(dweight_ptr.dtype.element_ty), mask=mask_n)
    if dbias_ptr is not None:
        total = _sum_partials(partials_ptr + programs * N, offs_n, mask_n, N, programs, BLOCK_N, BLOCK_P)
        tl.store(dbias_ptr + offs_n, total.to(dbias_ptr.dtype.element_ty), mask=mask_n)
    if sum_dz_ptr is not None:
        total = _sum_partials(partials_ptr + 2 * programs * N, offs_n, mask_n, N, programs, BLOCK_N, BLOCK_P)
        tl.store(sum_dz_ptr + offs_n, total.to(sum_dz_ptr.dtype.element_ty), mask=mask_n)


def layer_norm_fwd(
    z: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, stats: Tensor | None,
    eps: float, act: str | None, y: Tensor,
) -> None:  # fmt: skip
    """Fill y [M, N] and, where given, ``stats``. Reads z and the residual, writes y; one launch."""
    M, N = z.shape
    config = tiling.rows(M, N, z.itemsize, warp_size(z.device), backward=False)
    with on_device(z.device):
        _layer_norm_fwd_kernel[(tiling.cdiv(M, config.block_m),)](
            z, residual, weight, bias, stats, y,
            M, N,
            EPS=eps, RELU=act == "relu", ALIGN=alignment(N), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            num_warps=config.num_warps,
        )  # fmt: skip


def layer_norm_bwd(
    dy: Tensor | None, z: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None, act: str | None,
    dz: Tensor | None, normalised: Tensor | None, sums: ColumnSums,
) -> None:  # fmt: skip
    """Fill dz [M, N], the normalised rows and the column sums, each where it is given.

    ``sums.weight`` and ``sums.bias`` are the gradients of γ and β, ``sums.dz`` the sum of dz before it is rounded,
    which needs dz. Reads z and, unless only the normalised rows are asked for, dy; one launch, and a small one
    where there are sums.
    """
    M, N = z.shape
    config = tiling.rows(M, N, z.itemsize, warp_size(z.device), backward=True)
    programs = tiling.row_programs(M, config, num_sms(z.device))
    wanted = any(tensor is not None for tensor in sums)
    partials = torch.empty((3, programs, N), dtype=torch.float32, device=z.device) if wanted else None
    with on_device(z.device):
        _layer_norm_bwd_kernel[(programs,)](
            dy, z, stats, weight, bias, dz, normalised, partials,
            M, N, programs,
            RELU=act == "relu", SUM_AFFINE=sums.weight is not None or sums.bias is not None,
            SUM_DZ=sums.dz is not None, ALIGN=alignment(N), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            num_warps=config.num_warps,
        )  # fmt: skip
        if wanted:
            _column_sums_kernel[(tiling.cdiv(N, 64),)](partials, *sums, N, programs, BLOCK_N=64, BLOCK_P=32)
