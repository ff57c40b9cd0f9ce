"""The join of projection blocks: two BatchNorms, whose outputs are added."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import ops, reference
from fusedres.functional.batch_norm import normalise
from fusedres.functional.checks import check_batch_norm, check_residual, is_usual, needs_grad
from fusedres.norm import Norm
from fusedres.ops import takes_reference, use_kernels


def batch_norm_add_batch_norm_act(
    input: Tensor,
    other: Tensor,
    norm: Norm,
    other_norm: Norm,
    *,
    act: str | None = None,
) -> Tensor:
    r"""The join of projection blocks: two batch normalisations, their sum, then an optional activation.

    .. math:: y = \mathrm{act}(\mathrm{BN}_a(a) + \mathrm{BN}_b(b)), \quad
              \mathrm{BN}(x) = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}}\,\gamma + \beta

    following Ioffe & Szegedy (2015) for the normalisation and He et al. (2015) for the block, whose shortcut is a
    convolution (the projection) with a normalisation of its own.

    One operation where both norms are in one mode, the dtypes of ``input`` and ``other`` are the same, and the norms
    have no running statistics in common; elsewhere two, the first on ``input``, the second on ``other``.

    Args:
        input: ``(N, C, *)``, any floating dtype, any layout; contiguous and channels-last need no copy.
        other: of ``input``'s shape and device; its dtype may differ, the output is promoted as by ``+``.
        norm, other_norm: what ``input`` and ``other`` are normalised with, ``fusedres.functional.Norm``: the
            arguments of :func:`batch_norm_act` from ``running_mean`` to ``eps``, and ``num_batches_tracked``. Buffers
            are updated in place where ``training``; those that both norms share, by ``input`` first.
        act: ``None`` or ``"relu"``.

    Returns:
        A tensor of ``input``'s shape and memory format.

    Raises:
        TypeError: a tensor that is not floating-point, or a weight that is neither of its input's dtype nor float32.
        ValueError: shapes or devices that do not fit together (nothing is broadcast), an unknown ``act``, statistics
            that are missing, or one value a channel in training. Nothing has been updated then.
        RuntimeError: ``FUSEDRES_BACKEND=triton`` and no kernel covers the input.
    """
    return _join(input, other, norm, other_norm, act, fork=False)[0]


def forked_batch_norm_add_batch_norm_act(
    input: Tensor,
    other: Tensor,
    norm: Norm,
    other_norm: Norm,
    *,
    act: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The same under two names, for two readers: their gradients are added where the backward reads them.

    Both are one memory. A reader of only one gives an ordinary backward.
    """
    return _join(input, other, norm, other_norm, act, fork=True)


def _join(
    input: Tensor, other: Tensor, norm: Norm, other_norm: Norm, act: str | None, *, fork: bool
) -> tuple[Tensor, Tensor]:
    if takes_reference(input) and is_usual(input, norm, other, act) and is_usual(other, other_norm, None, act):
        out = reference.batch_norm_add_batch_norm_act(input, other, norm, other_norm, act=act)
        return out, out
    check_batch_norm(input, norm, None, act, prefix="norm.")
    check_residual(other, input, input.shape, "other")
    check_batch_norm(other, other_norm, None, act, name="other", prefix="other_norm.")
    if not use_kernels(input, other, *norm.tensors, *other_norm.tensors):
        out = reference.batch_norm_add_batch_norm_act(input, other, norm, other_norm, act=act)
        return out, out
    if _is_two(input, other, norm, other_norm):
        out = normalise(other, other_norm, normalise(input, norm), act)
        return out, out
    save_for_backward = needs_grad(input, other, norm.weight, norm.bias, other_norm.weight, other_norm.bias)
    fork = fork and save_for_backward
    outputs = ops.batch_norm_add_batch_norm_act(input, other, norm, other_norm, act, fork, save_for_backward)
    return outputs[0], outputs[1 if fork else 0]


def _is_two(input: Tensor, other: Tensor, norm: Norm, other_norm: Norm) -> bool:
    """Whether it takes two operations: the kernels have one dtype and one mode, and update buffers in no order."""
    if input.dtype != other.dtype or norm.training != other_norm.training:
        return True
    if not norm.training:
        return False
    mine, others = ((n.running_mean, n.running_var, n.num_batches_tracked) for n in (norm, other_norm))
    return any(_is_one(a, b) for a in mine for b in others)


def _is_one(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both are one memory; a compiler sees only whether they are one tensor."""
    if a is None or b is None:
        return False
    return a is b or (not torch.compiler.is_compiling() and torch._C._is_alias_of(a, b))  # pyright: ignore[reportAttributeAccessIssue]
