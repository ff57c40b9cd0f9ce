"""BatchNorm, residual addition and activation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedres import ops, reference
from fusedres.functional.checks import check_batch_norm, is_usual, needs_grad
from fusedres.norm import Norm
from fusedres.ops import is_known, sync_batch_norm_act, takes_reference, use_kernels

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    act: str | None = None,
    num_batches_tracked: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Batch normalisation, then an optional residual addition, then an optional activation.

    .. math:: y = \mathrm{act}\Bigl(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}}\,\gamma + \beta
              + \mathrm{residual}\Bigr)

    following Ioffe & Szegedy (2015) for the normalisation and He et al. (2015) for the residual block. The
    positional arguments are those of :func:`torch.nn.functional.batch_norm`.

    Args:
        input: ``(N, C, *)``, any floating dtype, any layout; contiguous and channels-last need no copy.
        running_mean, running_var: ``(C,)`` or both ``None``. Updated in place when ``training``; the variance
            with Bessel's correction.
        weight, bias: ``(C,)`` or ``None`` (then 1 and 0).
        training: normalise with the statistics of the batch (``True``) or with the running ones.
        momentum: weight of the new statistics in the running ones; ``None`` is the cumulative average, which
            needs ``num_batches_tracked``.
        eps: added to the variance.
        residual: of ``input``'s shape and device; its dtype may differ, the output is promoted as by ``+``.
        act: ``None`` or ``"relu"``.
        num_batches_tracked: one integer, incremented when ``training``.
        group: the ranks over whose batches the statistics are taken when ``training``; ``None`` is this one.
            Every rank calls this, with a batch of any size, and runs the backward: one all-gather of (count, mean,
            M2), merged by Chan et al. (1983) in one order on all ranks, and one all-reduce. Gradients of weight and
            bias are those of the rank's own batch, as in :class:`torch.nn.SyncBatchNorm`.

    Returns:
        A tensor of ``input``'s shape and memory format.

    Raises:
        TypeError: a tensor that is not floating-point, or a weight of another dtype than ``input``'s or float32.
        ValueError: shapes or devices that do not fit together, an unknown ``act``, statistics that are missing,
            or one value a channel in training (not looked for in other ranks: that would wait for the device).
            Nothing has been updated then.
        RuntimeError: ``FUSEDRES_BACKEND=triton`` and no kernel covers the input.
    """
    norm = Norm(running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    return normalise(input, norm, residual, act, group)


def normalise(
    input: Tensor,
    norm: Norm,
    residual: Tensor | None = None,
    act: str | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """:func:`batch_norm_act` for those who have a ``norm`` in one piece."""
    if takes_reference(input) and group is None and is_usual(input, norm, residual, act):
        return reference.normalise(input, norm, residual=residual, act=act)
    shared = norm.training and group is not None and group.size() > 1
    check_batch_norm(input, norm, residual, act, shared=shared)
    if shared:
        return _synchronised(input, residual, norm, act, group, added=False)
    return _batch_norm_act(input, norm, residual, act, fork=False)[0]


def forked_batch_norm_act(
    input: Tensor, norm: Norm, *, residual: Tensor | None = None, act: str | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`batch_norm_act` for two readers: the output under two names, one for each.

    Their gradients meet in the backward's reduction, not in a pass of autograd's own; a hook on one name, or its
    ``grad``, has the gradient of that reader alone. Neither name may be written to. Raises as
    :func:`batch_norm_act` does.
    """
    if takes_reference(input) and is_usual(input, norm, residual, act):
        out = reference.normalise(input, norm, residual=residual, act=act)
        return out, out
    check_batch_norm(input, norm, residual, act)
    return _batch_norm_act(input, norm, residual, act, fork=True)


def _batch_norm_act(
    input: Tensor, norm: Norm, residual: Tensor | None, act: str | None, *, fork: bool
) -> tuple[Tensor, Tensor]:
    """The output twice: with ``fork`` under two names, where a gradient is needed and the kernels run."""
    if not use_kernels(input, residual, *norm.tensors):
        out = reference.normalise(input, norm, residual=residual, act=act)
        return out, out
    save_for_backward = needs_grad(input, residual, norm.weight, norm.bias)
    fork = fork and save_for_backward
    outputs = ops.batch_norm_act(input, residual, norm, act, fork, save_for_backward)
    return outputs[0], outputs[1 if fork else 0]


def add_batch_norm_act(
    input: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    act: str | None = None,
    num_batches_tracked: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The join of pre-activation blocks: ``s = input + residual`` and ``act(batch_norm(s))``.

    He et al. (2016): ``s`` is the identity path, handed on unchanged; its normalisation opens the next block.

    Args:
        input, residual: ``(N, C, *)`` of one shape; the dtypes may differ, ``s`` is promoted as by ``+``.
        running_mean, running_var, weight, bias, training, momentum, eps, act, num_batches_tracked, group: as
            :func:`batch_norm_act`.

    Returns:
        ``s`` and ``act(batch_norm(s))``, both of ``input``'s shape and memory format.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`batch_norm_act`, where ``input`` is the sum or a term of it.
    """
    norm = Norm(running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    return add_normalise(input, residual, norm, act, group)


def add_normalise(
    input: Tensor, residual: Tensor, norm: Norm, act: str | None = None, group: ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`add_batch_norm_act` for those who have a ``norm`` in one piece."""
    if takes_reference(input) and group is None and is_usual(input, norm, residual, act):
        return reference.add_normalise(input, residual, norm, act=act)
    shared = norm.training and group is not None and group.size() > 1
    dtype = torch.promote_types(input.dtype, residual.dtype)
    check_batch_norm(input, norm, residual, act, shared=shared, dtype=dtype)
    if shared:
        return _synchronised(input, residual, norm, act, group, added=True)
    if not use_kernels(input, residual, *norm.tensors):
        return reference.add_normalise(input, residual, norm, act=act)
    save_for_backward = needs_grad(input, residual, norm.weight, norm.bias)
    s, out, _ = ops.add_batch_norm_act(input, residual, norm, act, save_for_backward)
    return s, out


def _synchronised(
    input: Tensor,
    residual: Tensor | None,
    norm: Norm,
    act: str | None,
    group: ProcessGroup | None,
    *,
    added: bool,
) -> Any:
    """The batches of all ranks normalised together; a rank with an empty one merges as the others do."""
    assert group is not None
    activations = (input.new_empty(1), None) if is_known(input.numel() == 0) else (input, residual)
    return sync_batch_norm_act(
        input, residual, norm, act, added=added, group=(group.group_name, group.size()),
        kernels=use_kernels(*activations, *norm.tensors),
        save_for_backward=needs_grad(input, residual, norm.weight, norm.bias),
    )  # fmt: skip
