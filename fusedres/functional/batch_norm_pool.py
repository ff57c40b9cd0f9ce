"""BatchNorm, activation and max pooling: the stem of a residual network."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusedres import ops, reference
from fusedres.functional.checks import check_batch_norm, check_pooling, is_usual, needs_grad
from fusedres.norm import Norm
from fusedres.ops import pool_refusal, takes_reference, use_kernels
from fusedres.reference import Extent


def batch_norm_act_max_pool2d(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    act: str | None = "relu",
    kernel_size: Extent = 3,
    stride: Extent | None = 2,
    padding: Extent = 1,
    dilation: Extent = 1,
    ceil_mode: bool = False,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    r"""Batch normalisation, then an optional activation, then max pooling over rows and columns.

    .. math:: y = \mathrm{maxpool}\Bigl(\mathrm{act}\Bigl(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x]
              + \epsilon}}\,\gamma + \beta\Bigr)\Bigr)

    as in the stem of He et al. (2015), whose largest activation it never writes: of the pooling a byte an output is
    kept for the backward. Which of several maxima has the gradient is as in :func:`torch.nn.functional.max_pool2d`:
    the first of equal ones in the order of memory rows, and of NaNs the last.

    Args:
        input: ``(N, C, H, W)``, any floating dtype, any layout; contiguous and channels-last need no copy.
        running_mean, running_var, weight, bias, training, momentum, eps, act, num_batches_tracked: as
            :func:`batch_norm_act`.
        kernel_size, padding: of the window, in elements; one number or (rows, columns). Padding never is a maximum.
        stride: between windows, in elements; ``None`` is ``kernel_size``.
        dilation, ceil_mode: as in PyTorch. Other than 1 and ``False`` they take the reference path, as windows of
            more than 255 elements do.

    Returns:
        ``(N, C, H', W')`` with H' = (H + 2·padding − kernel_size) // stride + 1, in ``input``'s memory format.

    Raises:
        TypeError, ValueError: as :func:`batch_norm_act`; or a window that PyTorch refuses, such as one padded by more
            than half of it, or larger than the padded input. Nothing has been updated then.
        RuntimeError: ``FUSEDRES_BACKEND=triton`` and no kernel covers the input or the window.
    """
    norm = Norm(running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    window = kernel_size, stride, padding, dilation, ceil_mode
    return normalise_max_pool2d(input, norm, act, window)[0]


def normalise_max_pool2d(
    input: Tensor, norm: Norm, act: str | None, window: tuple[Any, ...], *, fork: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`batch_norm_act_max_pool2d` for those who have a ``norm`` in one piece, and the ``window`` too.

    The output twice: with ``fork`` for two readers, under a name for each. Their gradients meet in the backward's
    kernels, not in a pass of autograd's own; a hook on one name, or its ``grad``, has the gradient of that reader
    alone. Neither name may be written to.
    """
    pooling = check_pooling(input, *window)
    if takes_reference(input) and is_usual(input, norm, None, act):
        out = reference.normalise_max_pool2d(input, norm, pooling, act=act)
        return out, out
    check_batch_norm(input, norm, None, act)
    refused = pool_refusal(pooling.kernel_size, pooling.dilation, pooling.ceil_mode)
    if not use_kernels(input, *norm.tensors, reason=refused):
        out = reference.normalise_max_pool2d(input, norm, pooling, act=act)
        return out, out
    save_for_backward = needs_grad(input, norm.weight, norm.bias)
    fork = fork and save_for_backward
    outputs = ops.batch_norm_act_max_pool2d(input, norm, act, *pooling[:3], fork, save_for_backward)
    return outputs[0], outputs[1 if fork else 0]
