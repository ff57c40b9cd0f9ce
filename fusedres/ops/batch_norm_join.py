"""``fusedres::batch_norm_add_batch_norm_act``, with two inputs that are normalised and then added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedres.kernels.layout import dense, dense_like
from fusedres.norm import Norm
from fusedres.ops.batch_norm_family import Dtypes, Family, Saved, register_family, statistics
from fusedres.ops.registration import register


def _forward(
    a: Tensor, b: Tensor, norm: Norm, other_norm: Norm, act: str | None, fork: bool, save: bool
) -> tuple[Tensor, None, Tensor, Tensor]:
    from fusedres.kernels.batch_norm_join import batch_norm_join_forward, batch_norm_join_inference_forward

    if norm.training:
        out, stats, other_stats = batch_norm_join_forward(a, b, norm, other_norm, act)
    else:
        out, stats, other_stats = batch_norm_join_inference_forward(a, b, norm, other_norm, act, save)
    return out, None, stats, other_stats


def _fake(
    a: Tensor, b: Tensor, norm: Norm, other_norm: Norm, act: str | None, fork: bool, save: bool
) -> tuple[Tensor, ...]:
    kept = norm.training or save
    return torch.empty_like(a), a.new_empty(0), statistics(a, kept), statistics(a, kept)


def _backward(
    ctx: Any, saved: Saved, grad: Tensor, grad_fork: Tensor | None, dtypes: Dtypes
) -> Sequence[Tensor | None]:
    needs_input, needs_other, *needs = (dtype is not None for dtype in dtypes)
    grad_input, grad_other, sums = batch_norm_add_batch_norm_act_backward(
        grad, grad_fork, *saved, ctx.options[0], ctx.frozen, needs_input, needs_other, any(needs)
    )
    if not any(needs):
        return grad_input, grad_other, None, None, None, None
    parameters = zip(sums.unbind(), dtypes[2:], strict=True)
    return grad_input, grad_other, *(None if dtype is None else row.to(dtype) for row, dtype in parameters)


def _allocate(
    a: Tensor, frozen: bool, needs_input: bool, needs_other: bool, needs_parameters: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised gradients of both inputs and of the parameters; those that nothing needs are empty."""
    grad_input, grad_other = (
        torch.empty_like(a) if needed else a.new_empty(0) for needed in (needs_input, needs_other)
    )
    return grad_input, grad_other, statistics(a, needs_parameters or not frozen)  # the inputs' are made of these sums


def _launch_backward(
    grad: Tensor, grad_fork: Tensor | None, input: Tensor, other: Tensor, stats: Tensor, other_stats: Tensor,
    act: str | None, frozen: bool, *needs: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from fusedres.kernels.batch_norm_join_backward import Gradients, batch_norm_join_backward

    a = dense(input)
    outputs = _allocate(a, frozen, *needs)
    wanted = Gradients(*(out if out.numel() else None for out in outputs))
    fork = None if grad_fork is None else dense_like(grad_fork, a)
    batch_norm_join_backward(
        dense_like(grad, a), fork, a, dense_like(other, a), stats, other_stats, act, frozen, wanted
    )  # fmt: skip
    return outputs


batch_norm_add_batch_norm_act = register_family(
    Family(
        "batch_norm_add_batch_norm_act", "Tensor input, Tensor other", "str? act, bool fork",
        "Tensor out, Tensor fork, Tensor stats, Tensor other_stats", _forward, _fake,
        lambda inputs, outputs, needs: (*inputs, *outputs[2:]), _backward, activations=2, norms=2, forks=True,
    )
)  # fmt: skip
batch_norm_add_batch_norm_act_backward = register(
    "batch_norm_add_batch_norm_act_backward(Tensor grad, Tensor? grad_fork, Tensor input, Tensor other, Tensor stats, "
    "Tensor other_stats, str? act, bool frozen, bool needs_input, bool needs_other, bool needs_parameters) "
    "-> (Tensor grad_input, Tensor grad_other, Tensor grad_parameters)",
    _launch_backward,
    lambda grad, grad_fork, input, other, stats, other_stats, act, *flags: _allocate(dense(input), *flags),
)
