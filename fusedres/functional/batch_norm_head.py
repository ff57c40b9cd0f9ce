"""The head of a network: BatchNorm, residual addition, activation and global average pooling."""

from __future__ import annotations

from torch import Tensor

from fusedres import ops, reference
from fusedres.functional.checks import check_batch_norm, is_usual, needs_grad
from fusedres.norm import Norm
from fusedres.ops import takes_reference, use_kernels


def batch_norm_act_global_avg_pool2d(
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
) -> Tensor:
    r""":func:`batch_norm_act`, averaged over the pixels of every image, as at the end of a network.

    .. math:: y_{nc} = \frac{1}{HW} \sum_{hw} \mathrm{act}(\mathrm{bn}(x) + \mathrm{residual})_{nchw}

    as in ``torch.nn.AdaptiveAvgPool2d(1)`` (Lin et al., 2013). The activation is rounded to its dtype, as eager's is,
    and averaged in float32; it is neither written to memory nor saved.

    Args:
        input: ``(N, C, H, W)``, any floating dtype, any layout; contiguous and channels-last need no copy.
        running_mean, running_var, weight, bias, training, momentum, eps, residual, act, num_batches_tracked: as
            :func:`batch_norm_act`.

    Returns:
        ``(N, C, 1, 1)``, of the dtype of :func:`batch_norm_act`.

    Raises:
        TypeError, RuntimeError: as :func:`batch_norm_act`.
        ValueError: as :func:`batch_norm_act`, and for an ``input`` of other than 4 dimensions.
    """
    norm = Norm(running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    if takes_reference(input) and input.dim() == 4 and is_usual(input, norm, residual, act):
        return reference.batch_norm_act_global_avg_pool2d(
            input, *norm[:7], residual=residual, act=act, num_batches_tracked=num_batches_tracked
        )
    check_batch_norm(input, norm, residual, act)
    if input.dim() != 4:
        raise ValueError(f"input must have 4 dimensions (N, C, H, W), got shape {tuple(input.shape)}")
    if not use_kernels(input, residual, *norm.tensors):
        return reference.batch_norm_act_global_avg_pool2d(
            input, *norm[:7], residual=residual, act=act, num_batches_tracked=num_batches_tracked
        )
    save_for_backward = needs_grad(input, residual, weight, bias)
    return ops.batch_norm_act_global_avg_pool2d(input, residual, norm, act, save_for_backward)[0]
