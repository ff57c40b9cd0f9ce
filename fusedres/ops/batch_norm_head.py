"""``fusedres::batch_norm_act_global_avg_pool2d``: the activation is averaged, and neither written nor saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedres.kernels.layout import pooled_like
from fusedres.norm import Norm
from fusedres.ops.batch_norm import is_masked
from fusedres.ops.batch_norm_family import Dtypes, Family, Saved, register_backward, register_family, statistics


def _forward(
    x: Tensor, residual: Tensor | None, norm: Norm, act: str | None, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from fusedres.kernels.batch_norm_head import batch_norm_head_forward, batch_norm_head_inference_forward

    masked = save and is_masked(residual, act)
    if norm.training:
        return batch_norm_head_forward(x, residual, norm, act, masked)
    return batch_norm_head_inference_forward(x, residual, norm, act, save, masked)


def _fake(x: Tensor, residual: Tensor | None, norm: Norm, act: str | None, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    N, C, H, W = x.shape
    mask_bytes = N * ((H * W + 7) // 8) * C if save and is_masked(residual, act) else 0
    return pooled_like(x, dtype), statistics(x, norm.training or save), x.new_empty(mask_bytes, dtype=torch.uint8)


def _backward(ctx: Any, saved: Saved, grad: Tensor, _: None, dtypes: Dtypes) -> Sequence[Tensor | None]:
    return batch_norm_act_global_avg_pool2d_backward(grad, None, *saved, ctx.options[0], ctx.frozen, *dtypes)


def _launch_backward(
    wanted: Any, grad: Tensor, _: None, x: Tensor, stats: Tensor, mask: Tensor, act: str | None, frozen: bool
) -> None:
    from fusedres.kernels.batch_norm_head_backward import batch_norm_head_backward

    saved = mask if mask.numel() else None
    batch_norm_head_backward(grad.flatten(1).contiguous(), x, saved, stats, act, frozen, wanted)


batch_norm_act_global_avg_pool2d = register_family(
    Family(
        "batch_norm_act_global_avg_pool2d", "Tensor input, Tensor? residual", "str? act",
        "Tensor out, Tensor stats, Tensor mask", _forward, _fake,
        lambda inputs, outputs, needs: (inputs[0], *outputs[1:]), _backward, activations=2,
    )
)  # fmt: skip
batch_norm_act_global_avg_pool2d_backward = register_backward(
    "batch_norm_act_global_avg_pool2d_backward", "Tensor stats, Tensor mask", "str? act, bool frozen", _launch_backward
)
