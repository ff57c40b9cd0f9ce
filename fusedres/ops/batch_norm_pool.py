"""``fusedres::batch_norm_act_max_pool2d``, which keeps ``winner`` of pooling and activation, a byte an output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedres.kernels.layout import Window, dense_like, planes
from fusedres.norm import Norm
from fusedres.ops.batch_norm_family import Dtypes, Family, Saved, register_backward, register_family, statistics

_WINDOW = "int[2] kernel_size, int[2] stride, int[2] padding"
Extents = Sequence[int]


def _forward(
    x: Tensor, norm: Norm, act: str | None, kernel_size: Extents, stride: Extents, padding: Extents, fork: bool,
    save: bool,
) -> tuple[Tensor, None, Tensor, Tensor]:  # fmt: skip
    from fusedres.kernels import batch_norm_pool

    window = Window.of(kernel_size, stride, padding)
    if norm.training:
        out, stats, winner = batch_norm_pool.batch_norm_act_max_pool2d_forward(x, window, norm, act, save)
    else:
        out, stats, winner = batch_norm_pool.batch_norm_act_max_pool2d_inference_forward(x, window, norm, act, save)
    return out, None, stats, winner


def _fake(
    x: Tensor, norm: Norm, act: str | None, kernel_size: Extents, stride: Extents, padding: Extents, fork: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    view = planes(x, Window.of(kernel_size, stride, padding))
    winner = view.pooled(x, torch.uint8) if save else x.new_empty(0, dtype=torch.uint8)
    return view.pooled(x, x.dtype), x.new_empty(0), statistics(x, norm.training or save), winner


def _backward(
    ctx: Any, saved: Saved, grad: Tensor, grad_fork: Tensor | None, dtypes: Dtypes
) -> Sequence[Tensor | None]:
    _, *window, _, _ = ctx.options
    x_dtype, *parameter_dtypes = dtypes
    x, _, weight, bias = batch_norm_act_max_pool2d_backward(
        grad, grad_fork, *saved, *window, ctx.frozen, x_dtype, None, *parameter_dtypes
    )
    return x, weight, bias


def _launch_backward(
    wanted: Any, grad: Tensor, other: Tensor | None, x: Tensor, stats: Tensor, winner: Tensor, kernel_size: Extents,
    stride: Extents, padding: Extents, frozen: bool,
) -> None:  # fmt: skip
    from fusedres.kernels import batch_norm_pool_backward

    grad, fork = dense_like(grad, winner), None if other is None else dense_like(other, winner, grad.dtype)
    batch_norm_pool_backward.batch_norm_act_max_pool2d_backward(
        grad, fork, x, stats, winner, Window.of(kernel_size, stride, padding), frozen, wanted
    )


batch_norm_act_max_pool2d = register_family(
    Family(
        "batch_norm_act_max_pool2d", "Tensor input", f"str? act, {_WINDOW}, bool fork",
        "Tensor out, Tensor fork, Tensor stats, Tensor winner", _forward, _fake,
        lambda inputs, outputs, needs: (inputs[0], *outputs[2:]), _backward, forks=True,
    )
)  # fmt: skip
batch_norm_act_max_pool2d_backward = register_backward(
    "batch_norm_act_max_pool2d_backward", "Tensor stats, Tensor winner", f"{_WINDOW}, bool frozen", _launch_backward
)
