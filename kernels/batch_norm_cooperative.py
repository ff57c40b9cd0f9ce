"""Forward of act(batch_norm(x) + residual) in one launch for activations that fit the registers of a whole GPU.

Every program keeps its tile of x, publishes its moments, waits for the other programs of its channel tile, merges what
all have published, and writes its tile of y: x is read once. The programs wait for each other, so all of them have to
be resident, which a cooperative launch guarantees or refuses. Nothing here can be interpreted.
"""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false
# (the device language only looks like Python)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels._common import _aligned_extents, _arrive, _load_sum, _moments, _tile_offsets
from fusedres.kernels.batch_norm_forward import _affine, _finish_tile, _merge_partials, _outputs, _update_running
from fusedres.kernels.layout import Rows
from fusedres.kernels.tiling import RESIDENT_REGISTERS, Tiling
from fusedres.kernels.workspace import counters, on_device

# Where a variant would take more, it spills rather than fails to launch.
_BOUND = {} if torch.version.hip else {"maxnreg": RESIDENT_REGISTERS}


@triton.jit
def _await(counter_ptr, programs):
    """Return when ``programs`` have arrived, with what they stored before that visible to every thread of this one.

    To add 0 is an acquiring load in the generated code: the last one orders what follows behind the arrivals, which
    released, and the barrier hands that order on to the threads that issued none. A volatile load in its place was
    hoisted out of the loop on gfx942.
    """
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < programs:
        pass
    tl.debug_barrier()


@triton.jit(do_not_specialize=["M", "C", "S"])
def _batch_norm_fwd_cooperative_kernel(
    x_ptr, residual_ptr, counters_ptr, partials_ptr, stats_ptr, norm, y_ptr, saved_ptr,
    M, C, S,
    EPS: tl.constexpr, ADD: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    M, C, S = _aligned_extents(M, C, S, CHANNELS_LAST, ALIGN)
    pid_c, pid_m, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    row0 = pid_m.to(tl.int64) * BLOCK_M
    mask_m = (row0 + tl.arange(0, BLOCK_M) < M)[:, None]
    mask = mask_m & mask_c[None, :]
    base, offsets = _tile_offsets(row0, offs_c, C, S, BLOCK_M, CHANNELS_LAST)
    x = _load_sum(x_ptr, residual_ptr, saved_ptr, base, offsets, mask, ADD)
    mean, var = _moments(mask_m.to(tl.float32), x, 0.0)
    tl.store(partials_ptr + pid_m * C + offs_c, mean, mask=mask_c)
    tl.store(partials_ptr + (programs + pid_m) * C + offs_c, var, mask=mask_c)

    # Two counters a channel tile. Whoever leaves last has seen everyone leave the wait, and zeroes both.
    arrivals_ptr, departures_ptr = counters_ptr + 1 + 2 * pid_c, counters_ptr + 2 + 2 * pid_c
    _arrive(arrivals_ptr)
    _await(arrivals_ptr, programs)
    if tl.atomic_add(departures_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1:
        tl.store(arrivals_ptr, 0)
        tl.store(departures_ptr, 0)

    mean, var = _merge_partials(partials_ptr, offs_c, mask_c, M, C, programs, BLOCK_M, BLOCK_C, BLOCK_P)
    scale, shift = _affine(mean, var, norm[0], norm[1], stats_ptr, offs_c, mask_c, pid_m == 0, C, EPS)
    _finish_tile(
        x - mean[None, :], scale, shift, residual_ptr, y_ptr, saved_ptr, base, offsets, mask, row0, offs_c, M, C,
        ADD, RELU, CHANNELS_LAST, BLOCK_M, BLOCK_C,
    )  # fmt: skip
    if pid_m == 0:
        _update_running(
            mean, var, M, norm[2], norm[3], norm[4], counters_ptr, tl.num_programs(0), norm[5], offs_c, mask_c
        )  # fmt: skip


def batch_norm_fwd_cooperative(
    x: Tensor,
    residual: Tensor | None,
    view: Rows,
    config: Tiling,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    act: str | None,
    save_mask: bool,
    s: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, stats, mask) in one cooperative launch: reads x and the residual once, writes y and the mask.

    With ``s`` the residual is added before the normalisation, and the sum fills ``s``.

    Raises:
        RuntimeError: of the driver, where the programs of ``config`` are not resident at once.
    """
    y, mask = _outputs(x, residual, view, save_mask)
    stats = torch.empty((4, view.C), dtype=torch.float32, device=x.device)
    partials = torch.empty((2, config.programs, view.C), dtype=torch.float32, device=x.device)
    # More at once where addresses leave registers for them: every program waits for these loads.
    wide = view.channels_last and view.align * (x if s is None else s).itemsize >= 16
    block_p = 32 if wide else 16
    with on_device(x.device):
        _batch_norm_fwd_cooperative_kernel[config.channel_tiles, config.programs](
            x, residual, counters(x.device), partials, stats,
            (weight, bias, running_mean, running_var, num_batches_tracked, momentum), y, mask if save_mask else s,
            view.M, view.C, view.S,
            EPS=eps, ADD=s is not None, RELU=act == "relu", CHANNELS_LAST=view.channels_last, ALIGN=view.align,
            BLOCK_M=config.block_m, BLOCK_C=config.block_c, BLOCK_P=block_p, num_warps=config.num_warps,
            launch_cooperative_grid=True, **_BOUND,
        )  # fmt: skip
    return y, stats, mask
