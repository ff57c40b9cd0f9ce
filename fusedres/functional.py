"""Fused functions: validation, the choice between kernels and the reference, and the public documentation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedres import reference
from fusedres.ops import KERNEL_DTYPES as KERNEL_DTYPES  # for explain
from fusedres.ops import (
    autocast_dtypes,
    autocasts,
    is_known,
    layer_norm_refusal,
    sync_batch_norm_act,
    tf32,
    use_kernels,
)
from fusedres.ops import multiplies_itself as multiplies_itself  # for explain
from fusedres.ops import refusal as refusal  # for explain

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ACTIVATIONS = (None, "relu")


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
    shared = training and group is not None and group.size() > 1
    _check_batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, residual, act, num_batches_tracked,
        shared=shared,
    )  # fmt: skip
    if shared:
        return _synchronised(
            input, residual, (weight, bias), (running_mean, running_var, num_batches_tracked), momentum, eps, act,
            group, added=False,
        )  # fmt: skip
    if not use_kernels(input, residual, weight, bias, running_mean, running_var):
        return reference.batch_norm_act(
            input, running_mean, running_var, weight, bias, training, momentum, eps,
            residual=residual, act=act, num_batches_tracked=num_batches_tracked,
        )  # fmt: skip
    save_for_backward = _needs_grad(input, residual, weight, bias)
    if training:
        return torch.ops.fusedres.batch_norm_act(
            input, residual, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, act,
            save_for_backward,
        )[0]  # fmt: skip
    return torch.ops.fusedres.batch_norm_act_inference(
        input, residual, weight, bias, running_mean, running_var, eps, act, save_for_backward
    )[0]


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
    shared = training and group is not None and group.size() > 1
    _check_batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, residual, act, num_batches_tracked,
        dtype=torch.promote_types(input.dtype, residual.dtype), shared=shared,
    )  # fmt: skip
    if shared:
        return _synchronised(
            input, residual, (weight, bias), (running_mean, running_var, num_batches_tracked), momentum, eps, act,
            group, added=True,
        )  # fmt: skip
    if not use_kernels(input, residual, weight, bias, running_mean, running_var):
        return reference.add_batch_norm_act(
            input, residual, running_mean, running_var, weight, bias, training, momentum, eps,
            act=act, num_batches_tracked=num_batches_tracked,
        )  # fmt: skip
    save_for_backward = _needs_grad(input, residual, weight, bias)
    if training:
        return torch.ops.fusedres.add_batch_norm_act(
            input, residual, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, act,
            save_for_backward,
        )[:2]  # fmt: skip
    return torch.ops.fusedres.add_batch_norm_act_inference(
        input, residual, weight, bias, running_mean, running_var, eps, act, save_for_backward
    )[:2]


def layer_norm_linear_act(
    input: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: str | None = None,
) -> Tensor:
    r"""Layer normalisation over the last dimension, a linear map, then an optional activation.

    .. math:: y = \mathrm{act}(\mathrm{LN}(x)\,W^\top + b), \quad
              \mathrm{LN}(x) = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}}\,\gamma + \beta

    with the normalisation of Ba et al. (2016).

    Args:
        input: ``(*, K)``, any leading shape, any floating dtype.
        ln_weight, ln_bias: gamma and beta, ``(K,)`` or ``None`` (then 1 and 0).
        weight: ``(N, K)``, of ``input``'s dtype, or of any floating dtype under autocast.
        bias: ``(N,)`` or ``None``.
        eps: added to the variance.
        act: ``None`` or ``"relu"``.

    Returns:
        ``(*, N)``, in the dtype that eager PyTorch's sequence gives, under autocast too.

    Raises:
        TypeError: a tensor that is not floating-point, or dtypes that do not fit together.
        ValueError: shapes or devices that do not fit together, or an unknown ``act``.
        RuntimeError: ``FUSEDRES_BACKEND=triton`` and no kernel covers the input.
    """
    _check_linear(input, weight, bias, act)
    _check_layer_norm(ln_weight, ln_bias, weight.shape[1], input)
    reason = layer_norm_refusal(weight.shape[1])
    if not use_kernels(input, weight, bias, ln_weight, ln_bias, reason=reason):
        return reference.layer_norm_linear_act(input, ln_weight, ln_bias, weight, bias, eps=eps, act=act)
    dtype, _ = autocast_dtypes(input)
    return torch.ops.fusedres.layer_norm_linear_act(
        input, ln_weight, ln_bias, weight.to(dtype), None if bias is None else bias.to(dtype), eps, act, tf32(),
        _needs_grad(input, ln_weight, ln_bias, weight, bias),
    )[0]  # fmt: skip


def linear_layer_norm_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    *,
    eps: float = 1e-5,
    act: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    r"""A linear map, layer normalisation of its output, an optional activation, then an optional residual addition.

    .. math:: y = \mathrm{act}(\mathrm{LN}(x W^\top + b)) + \mathrm{residual}

    Args:
        input: ``(*, K)``, any leading shape, any floating dtype.
        weight: ``(N, K)``, of ``input``'s dtype, or of any floating dtype under autocast.
        bias: ``(N,)`` or ``None``.
        ln_weight, ln_bias: gamma and beta, ``(N,)`` or ``None`` (then 1 and 0).
        eps: added to the variance.
        act: ``None`` or ``"relu"``.
        residual: ``(*, N)``; its dtype may differ, the output is promoted as by ``+``.

    Returns:
        ``(*, N)``, in the dtype that eager PyTorch's sequence gives, under autocast too.

    Raises:
        TypeError: a tensor that is not floating-point, or dtypes that do not fit together.
        ValueError: shapes or devices that do not fit together, or an unknown ``act``.
        RuntimeError: ``FUSEDRES_BACKEND=triton`` and no kernel covers the input.
    """
    _check_linear(input, weight, bias, act)
    _check_layer_norm(ln_weight, ln_bias, weight.shape[0], input)
    if residual is not None:
        _check_residual(residual, input, torch.Size((*input.shape[:-1], weight.shape[0])))
    reason = layer_norm_refusal(weight.shape[0])
    if not use_kernels(input, weight, bias, ln_weight, ln_bias, residual, reason=reason):
        return reference.linear_layer_norm_act(
            input, weight, bias, ln_weight, ln_bias, eps=eps, act=act, residual=residual
        )
    dtype, ln_dtype = autocast_dtypes(input)
    return torch.ops.fusedres.linear_layer_norm_act(
        input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), ln_weight, ln_bias, residual,
        ln_dtype, eps, act, tf32(), _needs_grad(input, weight, bias, ln_weight, ln_bias, residual),
    )[0]  # fmt: skip


def _synchronised(
    input: Tensor,
    residual: Tensor | None,
    parameters: tuple[Tensor | None, Tensor | None],
    buffers: tuple[Tensor | None, Tensor | None, Tensor | None],
    momentum: float | None,
    eps: float,
    act: str | None,
    group: ProcessGroup | None,
    *,
    added: bool,
) -> Any:
    """The batches of all ranks normalised together; a rank with an empty one merges as the others do."""
    assert group is not None
    activations = (input, residual) if input.numel() > 0 else (input.new_empty(1), None)
    return sync_batch_norm_act(
        input, residual, parameters, buffers, momentum=momentum, eps=eps, act=act, added=added,
        group=(group.group_name, group.size()), kernels=use_kernels(*activations, *parameters, *buffers[:2]),
        save_for_backward=_needs_grad(input, residual, *parameters),
    )  # fmt: skip


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _check_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    residual: Tensor | None,
    act: str | None,
    num_batches_tracked: Tensor | None,
    *,
    shared: bool,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise TypeError or ValueError, naming the argument and the value, before anything is launched.

    ``dtype``: of the sum where it is input + residual that is normalised. ``shared``: other ranks have values too.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {ACTIVATIONS}, got {act!r}")
    if not input.is_floating_point():
        raise TypeError(f"input must be floating-point, got {input.dtype}")
    if input.dim() < 2:
        raise ValueError(f"input must have at least 2 dimensions (N, C, *), got shape {tuple(input.shape)}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be given or both be None")
    if running_mean is None and not training:
        raise ValueError("running_mean and running_var must be given when training is False")
    for name, tensor in (
        ("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias)
    ):  # fmt: skip
        if tensor is not None:
            _check_vector(name, tensor, input.shape[1], input, dtype)
    if residual is not None:
        _check_residual(residual, input, input.shape)
        if dtype is not None and dtype.is_complex:
            raise TypeError(f"residual must be floating-point, got {residual.dtype}")
    if training:
        _check_training(input, running_mean, momentum, num_batches_tracked, shared)


def _check_training(
    input: Tensor,
    running_mean: Tensor | None,
    momentum: float | None,
    num_batches_tracked: Tensor | None,
    shared: bool,
) -> None:
    if not shared and input.shape[1] != 0:
        if is_known(input.numel() == input.shape[1]):
            shape = tuple(input.shape)
            raise ValueError(f"input must have more than 1 value per channel when training, got shape {shape}")
        if torch.compiler.is_compiling():
            torch._check(input.numel() != input.shape[1])  # where it is open: raises when the data is there
    if num_batches_tracked is not None:
        if num_batches_tracked.numel() != 1 or num_batches_tracked.is_floating_point():
            raise ValueError(f"num_batches_tracked must be one integer, got {num_batches_tracked!r}")
        _check_device("num_batches_tracked", num_batches_tracked, input)
    elif momentum is None and running_mean is not None:
        raise ValueError("momentum=None (the cumulative average) needs num_batches_tracked")


def _check_linear(input: Tensor, weight: Tensor, bias: Tensor | None, act: str | None) -> None:
    """Raise TypeError or ValueError for what a linear map and its normalisation have in common."""
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {ACTIVATIONS}, got {act!r}")
    if not input.is_floating_point():
        raise TypeError(f"input must be floating-point, got {input.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight must have 2 dimensions (N, K), got shape {tuple(weight.shape)}")
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(f"input must have shape (*, {weight.shape[1]}), got {tuple(input.shape)}")
    if weight.dtype != input.dtype and not (autocasts(input) and weight.is_floating_point()):
        raise TypeError(f"weight must be of input's dtype {input.dtype}, got {weight.dtype}")
    _check_device("weight", weight, input)
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
        if bias.dtype != weight.dtype and not (autocasts(input) and bias.is_floating_point()):
            raise TypeError(f"bias must be of weight's dtype {weight.dtype}, got {bias.dtype}")
        _check_device("bias", bias, input)


def _check_layer_norm(ln_weight: Tensor | None, ln_bias: Tensor | None, size: int, input: Tensor) -> None:
    for name, tensor in (("ln_weight", ln_weight), ("ln_bias", ln_bias)):
        if tensor is not None:
            odd = tensor.dtype not in (torch.float32, input.dtype)
            autocast = odd and tensor.is_floating_point() and autocasts(input)
            _check_vector(name, tensor, size, input, tensor.dtype if autocast else None)
    if ln_weight is not None and ln_bias is not None and ln_weight.dtype != ln_bias.dtype:
        raise TypeError(f"ln_bias must be of ln_weight's dtype {ln_weight.dtype}, got {ln_bias.dtype}")


def _check_vector(name: str, tensor: Tensor, size: int, input: Tensor, dtype: torch.dtype | None = None) -> None:
    """``dtype``: of what is normalised, where it is not ``input``'s."""
    if tensor.dim() != 1 or tensor.shape[0] != size:
        raise ValueError(f"{name} must have shape ({size},), got {tuple(tensor.shape)}")
    if tensor.dtype not in (torch.float32, dtype or input.dtype):
        whose = "input's dtype" if dtype is None else "the sum's dtype"
        raise TypeError(f"{name} must be float32 or of {whose} {dtype or input.dtype}, got {tensor.dtype}")
    _check_device(name, tensor, input)


def _check_residual(residual: Tensor, input: Tensor, shape: torch.Size) -> None:
    if residual.shape != shape:
        raise ValueError(f"residual must have shape {tuple(shape)}, got {tuple(residual.shape)}")
    if not (residual.is_floating_point() or residual.is_complex()):
        raise TypeError(f"residual must be floating-point, got {residual.dtype}")
    _check_device("residual", residual, input)


def _check_device(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        raise ValueError(f"{name} must be on {input.device}, got {tensor.device}")
