"""Predicted bytes: what eager PyTorch reads and writes for a pattern, less what the kernels do.

In passes over an activation (one reads or writes it once). Eager runs each operation on its own. A BatchNorm reads its
input twice in training, once in evaluation, and writes; its backward reads gradient and input twice and writes. ReLU
reads and writes, its backward reads two and writes. An addition reads two and writes; its backward is free, but two
gradients that meet at a sum, or at an output with two readers, are added, which is an addition again. Averaging reads,
and its backward writes. Maximum pooling reads, and writes its output and 8 bytes an element of it; its backward reads
gradient and those and writes. The kernels' passes are derived in ``kernels/README.md``; where a channel's values fit on
the chip they need fewer, which is not counted here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.utils import _pair

from fusedres.functional import KERNEL_DTYPES, layer_norm_refusal, multiplies_itself, pool_refusal
from fusedres.fusion.rewriting import Call
from fusedres.fusion.shapes import Seen

# pattern -> passes of eager and of ours: in a training step, forward and backward, and in an inference step
_PASSES = {
    "bn": ((3 + 5, 3 + 5), (2, 2)),
    "bn_act": ((5 + 8, 3 + 5), (4, 2)),
    "bn_add": ((6 + 5, 4 + 5), (5, 3)),
    "bn_add_act": ((8 + 8, 4 + 6), (7, 3)),
    "add_bn": ((6 + 8, 5 + 6), (5, 4)),
    "add_bn_act": ((8 + 11, 5 + 6), (7, 4)),
    "bn_add_bn": ((9 + 10, 5 + 8), (7, 3)),
    "bn_add_bn_act": ((11 + 13, 5 + 8), (9, 3)),
    "bn_avgpool": ((4 + 6, 2 + 3), (3, 1)),
    "bn_act_avgpool": ((6 + 9, 2 + 3), (5, 1)),
    "bn_add_avgpool": ((7 + 6, 3 + 4), (6, 2)),
    "bn_add_act_avgpool": ((9 + 9, 3 + 4), (8, 2)),
}
_MASK = {"bn_add_act": 2, "bn_add_act_avgpool": 3}  # accesses of the ReLU's bits in training, one an element
# What the second gradient costs where the output has two readers: eager adds it, the kernels read it.
_FORK, _FORKED, _FORKED_WITH_MASK = 3, 2, 1
_RECOMPUTED = 2  # the output of a ReLU, written and read once more


def bytes_saved(call: Call, seen: Seen, training: bool, device: torch.device) -> int | None:
    """For one call of a pattern on a device where kernels run; ``None`` where the Linear beside was not seen.

    0 for dtypes and sizes that no kernel covers.
    """
    if seen.dtype not in KERNEL_DTYPES or seen.elements == 0:
        return 0
    if call.window is not None:
        return _pooled_bytes(call, seen, training)
    if call.pattern not in _PASSES:
        elements = _linear_elements(call, seen, training, device)
        return None if elements is None else elements * seen.dtype.itemsize
    eager, ours = _PASSES[call.pattern][0 if training else 1]
    mask = 0
    if training:
        mask = _MASK.get(call.pattern, 0) * (seen.elements // 8)
        eager += _FORK * call.forks
        ours += (_FORKED_WITH_MASK if mask else _FORKED) * call.forks + _RECOMPUTED * call.recomputes
    return (eager - ours) * seen.elements * seen.dtype.itemsize - mask


def shape_refusal(call: Call, norm: nn.Module) -> str | None:
    """Why no kernel covers the window or the features of ``call``, on whatever device."""
    if call.window is not None:
        kernel, _, _, dilation, ceil_mode = call.window
        return pool_refusal((_pair(kernel) * 2)[:2], _pair(dilation), ceil_mode)
    return layer_norm_refusal(norm.normalized_shape[-1]) if isinstance(norm, nn.LayerNorm) else None


def _pooled_bytes(call: Call, seen: Seen, training: bool) -> int:
    """Of BatchNorm, ReLU and maximum pooling."""
    assert call.window is not None
    outputs = F.max_pool2d(torch.empty(seen.shape, device="meta"), *call.window).numel()
    x, y, places = seen.elements * seen.dtype.itemsize, outputs * seen.dtype.itemsize, 8 * outputs
    if not training:
        return (5 - 1) * x + places  # y is written by both
    eager = 15 * x + 2 * y + 2 * places + _FORK * y * call.forks
    ours = 5 * x + 3 * y + 3 * outputs + _FORKED * y * call.forks
    return eager - ours


def _linear_elements(call: Call, seen: Seen, training: bool, device: torch.device) -> int | None:
    """Elements of x [M, K] and y [M, N] that eager moves and the kernels do not; products are the same for both.

    Eager normalises in 2 passes (backward: 3, and 2 for gamma's and beta's gradients); bias gradient, ReLU and
    addition are passes of their own.
    """
    norm_first, features = call.pattern == "ln_linear_act", seen.shape[-1]
    x, y = (seen.elements, seen.behind) if norm_first else (seen.in_front, seen.elements)
    if x is None or y is None:
        return None
    if layer_norm_refusal(features):
        return 0
    M = seen.elements // features
    one_kernel = multiplies_itself(norm_first, M, y // M, x // M, seen.dtype, device)
    if norm_first:  # the normalised x is never written, and ReLU has no pass of its own
        forward = 2 * x + 2 * y * call.acts if one_kernel else 0
        backward = x + y * call.acts
    else:
        forward = 2 * y * call.acts + 2 * y * call.adds + (2 * y - y * training if one_kernel else 0)
        backward = 3 * y + 3 * y * call.acts
    return forward + backward * training
