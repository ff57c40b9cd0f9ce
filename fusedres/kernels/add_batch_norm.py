"""Forward of s = x + residual and act(batch_norm(s)); the kernels are those of ``batch_norm_forward``.

Its backward is ``batch_norm_act_backward`` of s with the gradient ``ds`` that s receives as an output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels import tiling
from fusedres.kernels.batch_norm_forward import batch_norm_fwd_apply, batch_norm_fwd_on_chip
from fusedres.kernels.batch_norm_statistics import batch_norm_fwd_stats
from fusedres.kernels.layout import rows
from fusedres.norm import Norm


def add_batch_norm_act_forward(
    x: Tensor,
    residual: Tensor,
    norm: Norm,
    act: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(s, y, stats) with the statistics of the batch: one launch where a channel tile fits on-chip, else two.

    The first of two reads x and the residual and writes s, the second reads s and writes y.
    """
    view, s = rows(x), _sum(x, residual)
    # Tiles of two dtypes have two thread layouts; converting between them spilled, on every architecture.
    one_layout = x.dtype == residual.dtype
    config = tiling.on_chip(view, s.itemsize) if one_layout else None
    if config is not None:
        y, stats, _ = batch_norm_fwd_on_chip(x, residual, view, config, norm, act, False, s)
        return s, y, stats
    stats = batch_norm_fwd_stats(x, view, norm, residual, s)
    y, _ = batch_norm_fwd_apply(s, None, view, stats, None, act, False)
    return s, y, stats


def add_batch_norm_act_inference_forward(
    x: Tensor,
    residual: Tensor,
    norm: Norm,
    act: str | None,
    save_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(s, y, stats) with the running statistics, in one launch; ``stats`` is empty unless ``save_stats``."""
    view, s = rows(x), _sum(x, residual)
    stats = x.new_empty((4, view.C) if save_stats else 0, dtype=torch.float32)
    y, _ = batch_norm_fwd_apply(x, residual, view, stats if save_stats else None, norm, act, False, s)
    return s, y, stats


def _sum(x: Tensor, residual: Tensor) -> Tensor:
    """Where s goes: in x's format, of the dtype that ``+`` gives."""
    return torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
