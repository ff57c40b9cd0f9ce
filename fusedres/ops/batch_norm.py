"""``fusedres::batch_norm_act`` and ``fusedres::add_batch_norm_act``, which normalises a sum that is an output too.

They have one backward: the gradient of a fork or of the sum is the second that it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedres.kernels.layout import dense_like
from fusedres.norm import Norm
from fusedres.ops.batch_norm_family import Dtypes, Family, Saved, register_backward, register_family, statistics


def _forward(
    x: Tensor, residual: Tensor | None, norm: Norm, act: str | None, fork: bool, save: bool
) -> tuple[Tensor, None, Tensor, Tensor]:
    from fusedres.kernels.batch_norm_forward import batch_norm_act_forward, batch_norm_act_inference_forward

    masked = save and is_masked(residual, act)
    if norm.training:
        out, stats, mask = batch_norm_act_forward(x, residual, norm, act, masked)
    else:
        out, stats, mask = batch_norm_act_inference_forward(x, residual, norm, act, save, masked)
    return out, None, stats, mask


def _fake(
    x: Tensor, residual: Tensor | None, norm: Norm, act: str | None, fork: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return (
        torch.empty_like(x, dtype=dtype),
        x.new_empty(0, dtype=dtype),
        statistics(x, norm.training or save),
        mask_of(x, save and is_masked(residual, act)),
    )


def is_masked(residual: Tensor | None, act: str | None) -> bool:
    """Whether the backward needs the bit mask; without a residual it finds the sign again from the input."""
    return residual is not None and act is not None


def mask_of(x: Tensor, kept: bool) -> Tensor:
    """Uninitialised, a bit an element and eight rows to a byte; empty unless it is ``kept``."""
    channels = x.shape[1]
    return x.new_empty((x.numel() // channels + 7) // 8 * channels if kept else 0, dtype=torch.uint8)


def _backward(
    ctx: Any, saved: Saved, grad: Tensor, grad_fork: Tensor | None, dtypes: Dtypes
) -> Sequence[Tensor | None]:
    x, stats, mask = saved
    act, *_ = ctx.options
    x_dtype, residual_dtype, weight_dtype, bias_dtype = dtypes
    # Without an activation the residual's gradient is the incoming one, where that is one.
    direct = act is None and residual_dtype is not None and grad_fork is None
    found = batch_norm_act_backward(
        grad, grad_fork, x, stats, mask, act, ctx.frozen, True, x_dtype, None if direct else residual_dtype,
        weight_dtype, bias_dtype,
    )  # fmt: skip
    return (found[0], grad.to(residual_dtype), *found[2:]) if direct else found


def _add_forward(x: Tensor, residual: Tensor, norm: Norm, act: str | None, save: bool) -> tuple[Tensor, ...]:
    from fusedres.kernels.add_batch_norm import add_batch_norm_act_forward, add_batch_norm_act_inference_forward

    if norm.training:
        return add_batch_norm_act_forward(x, residual, norm, act)
    return add_batch_norm_act_inference_forward(x, residual, norm, act, save)


def _add_fake(x: Tensor, residual: Tensor, norm: Norm, act: str | None, save: bool) -> tuple[Tensor, ...]:
    s = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    return s, torch.empty_like(s), statistics(x, norm.training or save)


def _add_backward(
    ctx: Any, saved: Saved, grad: Tensor, grad_sum: Tensor | None, dtypes: Dtypes
) -> Sequence[Tensor | None]:
    s, stats = saved
    term_dtype, *parameter_dtypes = dtypes
    term, _, weight, bias = batch_norm_act_backward(
        grad, grad_sum, s, stats, None, ctx.options[0], ctx.frozen, False, term_dtype, None, *parameter_dtypes
    )
    return term, weight, bias


def _launch_backward(
    wanted: Any, grad: Tensor, other: Tensor | None, x: Tensor, stats: Tensor, mask: Tensor | None, act: str | None,
    frozen: bool, fork: bool,
) -> None:  # fmt: skip
    from fusedres.kernels.batch_norm_backward import batch_norm_act_backward

    if other is not None:
        other = dense_like(other, x, grad.dtype if fork else None)
    batch_norm_act_backward(
        dense_like(grad, x), x, mask if mask is not None and mask.numel() else None, stats, act, frozen, wanted, other,
        fork=fork and other is not None,
    )  # fmt: skip


batch_norm_act = register_family(
    Family(
        "batch_norm_act", "Tensor input, Tensor? residual", "str? act, bool fork",
        "Tensor out, Tensor fork, Tensor stats, Tensor mask", _forward, _fake,
        lambda inputs, outputs, needs: (inputs[0], *outputs[2:]), _backward, activations=2, forks=True,
    )
)  # fmt: skip
add_batch_norm_act = register_family(
    Family(
        "add_batch_norm_act", "Tensor input, Tensor residual", "str? act", "Tensor sum, Tensor out, Tensor stats",
        _add_forward, _add_fake, lambda inputs, outputs, needs: (outputs[0], outputs[2]), _add_backward, activations=2,
        adds=True,
    )
)  # fmt: skip
batch_norm_act_backward = register_backward(
    "batch_norm_act_backward", "Tensor stats, Tensor? mask", "str? act, bool frozen, bool fork", _launch_backward
)
