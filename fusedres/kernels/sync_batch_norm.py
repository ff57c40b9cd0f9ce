"""BatchNorm over the batches of several ranks: the launches between which the ranks exchange a few vectors.

Forward: ``moments`` of the local rows -> all-gather -> ``merge`` -> ``normalise``. Backward: ``reduce`` -> all-reduce
-> ``gradient``. But for the merge the kernels are those of one rank. A rank without rows launches the merge alone: the
others are not called for it.
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
from fusedres.kernels._common import _chan_merge, _moments, _rstd
from fusedres.kernels.batch_norm_backward import batch_norm_bwd_apply, batch_norm_bwd_reduce
from fusedres.kernels.batch_norm_forward import batch_norm_fwd_apply
from fusedres.kernels.batch_norm_statistics import _affine, _batch_norm_fwd_stats_kernel, _update_running
from fusedres.kernels.layout import rows
from fusedres.kernels.workspace import counters, num_sms, on_device
from fusedres.norm import Gradients, Norm


@triton.jit(do_not_specialize=["C", "ranks"])
def _batch_norm_merge_kernel(
    messages_ptr, counters_ptr, stats_ptr, inverse_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr,
    num_batches_ptr,
    C, ranks, momentum,
    EPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    count = tl.zeros([BLOCK_P, 1], dtype=tl.float32)
    mean = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    m2 = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for start in range(0, ranks, BLOCK_P):  # in the order of the ranks, on every rank
        offs_p = start + tl.arange(0, BLOCK_P)
        messages = messages_ptr + offs_p[:, None] * (2 * C + 1)
        mask_p = (offs_p < ranks)[:, None]
        mask = mask_p & mask_c[None, :]
        count_p = tl.load(messages + 2 * C, mask=mask_p, other=0.0)
        mean_p = tl.load(messages + offs_c[None, :], mask=mask, other=0.0)
        m2_p = tl.load(messages + C + offs_c[None, :], mask=mask, other=0.0)
        count, mean, m2 = _chan_merge(count, mean, m2, count_p, mean_p, m2_p)
    mean_c, var_c = _moments(count, mean, m2)
    total = tl.sum(count, axis=0)
    _affine(mean_c, var_c, weight_ptr, bias_ptr, stats_ptr, offs_c, mask_c, True, C, EPS)
    _update_running(
        mean_c, var_c, total.to(tl.int64), running_mean_ptr, running_var_ptr, num_batches_ptr, counters_ptr,
        tl.num_programs(0), momentum, offs_c, mask_c & (total > 0),  # nothing is learnt from empty batches
    )  # fmt: skip
    tl.store(inverse_ptr + offs_c, tl.div_rn(1.0, tl.zeros_like(mean_c) + total), mask=mask_c)
    tl.store(inverse_ptr + C + offs_c, tl.div_rn(_rstd(var_c, EPS), tl.zeros_like(mean_c) + total), mask=mask_c)


def moments(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """(message, s) of a dense x: [2C + 1] of mean, M2 and count, and s = x + residual, empty without one.

    Reads x; with a residual also that, and writes s. One launch.
    """
    s = None if residual is None else torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    view = rows(x)
    config = tiling.statistics(view, (x if s is None else s).itemsize, num_sms(x.device))
    message = x.new_empty(2 * view.C + 1, dtype=torch.float32)
    partials = x.new_empty((2, config.programs, view.C), dtype=torch.float32)
    with on_device(x.device):
        _batch_norm_fwd_stats_kernel[config.channel_tiles, config.programs](
            x, residual, s, counters(x.device), partials, message, None, None, None, None, None,
            view.M, view.C, view.S, None,
            EPS=0.0, MERGE=True, CHANNELS_LAST=view.channels_last, ALIGN=view.align,
            BLOCK_M=config.block_m, BLOCK_C=config.block_c, BLOCK_P=16, num_warps=config.num_warps,
        )  # fmt: skip
    return message, x.new_empty(0) if s is None else s


def merge(messages: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """(stats, inverse) of ``messages`` [ranks, 2C + 1]; updates the running statistics. One launch.

    ``inverse`` [2, C] is 1/count and rstd/count, with the count over all ranks.
    """
    mean, var, weight, bias, _, momentum, eps, count = norm
    ranks, C = messages.shape[0], messages.shape[1] // 2
    stats = messages.new_empty(4, C)
    inverse = messages.new_empty(2, C)
    block_c = max(64, tiling.next_power_of_2(tiling.cdiv(C, tiling.MAX_CHANNEL_TILES)))
    with on_device(messages.device):
        _batch_norm_merge_kernel[(tiling.cdiv(C, block_c),)](
            messages, None if count is None else counters(messages.device), stats, inverse,
            weight, bias, mean, var, count,
            C, ranks, momentum,
            EPS=eps, BLOCK_C=block_c, BLOCK_P=16, num_warps=4,
        )  # fmt: skip
    return stats, inverse


def normalise(
    x: Tensor, residual: Tensor | None, stats: Tensor, act: str | None, save_mask: bool
) -> tuple[Tensor, Tensor]:
    """(act(bn(x) + residual), mask) of a dense x; reads x and the residual, writes both outputs. One launch."""
    save_mask = save_mask and residual is not None and act is not None  # else the sign is found again from x
    return batch_norm_fwd_apply(x, residual, rows(x), stats, None, act, save_mask)


def reduce(
    dy: Tensor, x: Tensor, stats: Tensor, mask: Tensor, act: str | None, residual_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """(sums, g): [2, C] of Σg and rstd·Σg·(x − mean), and g = dy where the ReLU was open, empty without a dtype.

    Reads dy, x and the mask, writes g. One launch.
    """
    g = x.new_empty(0) if residual_dtype is None else torch.empty_like(x, dtype=residual_dtype)
    sums = x.new_empty((2, x.shape[1]), dtype=torch.float32)
    out = Gradients(None, None if residual_dtype is None else g, weight=sums[1], bias=sums[0])
    batch_norm_bwd_reduce(dy, x, mask if mask.numel() else None, stats, rows(x), act, out, None)
    return sums, g


def gradient(
    dy: Tensor,
    ds: Tensor | None,
    x: Tensor,
    stats: Tensor,
    means: Tensor,
    mask: Tensor,
    act: str | None,
) -> Tensor:
    """dx, with ds added, from the means of g and of rstd²·g·(x − mean) over all ranks.

    Reads dy, x, the mask and ds, writes dx. One launch.
    """
    dx = torch.empty_like(x)
    saved = mask if act is not None and mask.numel() else None
    batch_norm_bwd_apply(dy, x, saved, stats, means, rows(x), act, dx, ds)
    return dx
