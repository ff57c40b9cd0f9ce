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

from typing import Any

import torch
from torch.nn.modules.utils import _pair

from fusedres.flat.rewriting import Call
from fusedres.flat.shapes import Seen
from fusedres.functional import KERNEL_DTYPES, layer_norm_refusal, multiplies_itself, pool_refusal

# pattern -> eager's passes and ours, forward and backward of a training step together
_TRAINING = {
    "bn": (3 + 5, 3 + 5),
    "bn_act": (5 + 8, 3 + 5),
    "bn_add": (6 + 5, 4 + 5),
    "bn_add_act": (8 + 8, 4 + 6),  # and one bit an element, written and read
    "add_bn": (6 + 8, 5 + 6),
    "add_bn_act": (8 + 11, 5 + 6),
    "bn_add_bn": (9 + 10, 5 + 8),
    "bn_add_bn_act": (11 + 13, 5 + 8),
    "bn_avgpool": (4 + 6, 2 + 3),
    "bn_act_avgpool": (6 + 9, 2 + 3),
    "bn_add_avgpool": (7 + 6, 3 + 4),
    "bn_add_act_avgpool": (9 + 9, 3 + 4),  # and one bit an element, written once and read twice
}
_INFERENCE = {"bn": (2, 2), "bn_act": (4, 2), "bn_add": (5, 3), "bn_add_act": (7, 3), "add_bn": (5, 4),
              "add_bn_act": (7, 4), "bn_add_bn": (7, 3), "bn_add_bn_act": (9, 3), "bn_avgpool": (3, 1),
              "bn_act_avgpool": (5, 1), "bn_add_avgpool": (6, 2), "bn_add_act_avgpool": (8, 2)}  # fmt: skip
_BITS = {"bn_add_act": 2, "bn_add_act_avgpool": 3}  # accesses of the mask
# What the second gradient costs where the output has two readers: eager adds it, the kernels read it.
_FORK = 3
_FORKED = {"bn": 2, "bn_act": 2, "bn_add": 2, "bn_add_act": 1, "bn_add_bn": 2, "bn_add_bn_act": 2}
_RECOMPUTED = 2  # the output of a ReLU, written and read once more


def bytes_saved(call: Call, seen: Seen, training: bool, device: torch.device) -> int | None:
    """For one call of a pattern on a device where kernels run; ``None`` where the Linear beside was not seen.

    0 for dtypes and sizes that no kernel covers.
    """
    if seen.dtype not in KERNEL_DTYPES:
        return 0
    if call.pattern == "bn_act_maxpool":
        return _pooled_bytes(call, seen, training)
    if call.pattern in _TRAINING:
        eager, ours = (_TRAINING if training else _INFERENCE)[call.pattern]
        if training:
            eager += _FORK * call.forks
            ours += _FORKED.get(call.pattern, 0) * call.forks + _RECOMPUTED * call.recomputes
        mask = _BITS.get(call.pattern, 0) * (seen.elements // 8) * training
        return (eager - ours) * seen.elements * seen.dtype.itemsize - mask
    elements = _linear_elements(call, seen, training, device)
    return None if elements is None else elements * seen.dtype.itemsize


def window(call: Call) -> tuple[Any, ...]:
    """That of a maximum pooling, with pairs of rows and columns."""
    assert call.window is not None
    kernel, stride, padding, dilation, ceil_mode = call.window
    sizes = (kernel, kernel if stride is None else stride, padding, dilation)
    return *((_pair(size) * 2)[:2] for size in sizes), ceil_mode


def _pooled_bytes(call: Call, seen: Seen, training: bool) -> int | None:
    """Of BatchNorm, ReLU and maximum pooling; 0 where the reference runs."""
    kernel, stride, padding, dilation, ceil_mode = window(call)
    if pool_refusal(kernel, dilation, ceil_mode) or len(seen.shape) != 4:
        return 0
    outputs = seen.shape[0] * seen.shape[1]
    for length, k, s, p in zip(seen.shape[2:], kernel, stride, padding, strict=True):
        outputs *= (length + 2 * p - k) // s + 1
    x, y, places = seen.elements * seen.dtype.itemsize, outputs * seen.dtype.itemsize, 8 * outputs
    if not training:
        return (5 - 1) * x + places  # y is written by both
    eager = 15 * x + 2 * y + 2 * places + _FORK * y * call.forks
    ours = 5 * x + 3 * y + 3 * outputs + 2 * y * call.forks
    return eager - ours


def _linear_elements(call: Call, seen: Seen, training: bool, device: torch.device) -> int | None:
    """Elements of x [M, K] and y [M, N] that eager moves and the kernels do not; products are the same for both.

    Eager normalises in 2 passes (backward: 3, and 2 for gamma's and beta's gradients); bias gradient, ReLU and
    addition are passes of their own.
    """
    if seen.elements == 0:
        return 0
    norm_first = call.pattern == "ln_linear_act"
    other = seen.behind if norm_first else seen.in_front
    if other is None:
        return None
    M = seen.elements // seen.features
    x, y = (seen.elements, other) if norm_first else (other, seen.elements)
    if layer_norm_refusal(seen.features):
        return 0
    one_kernel = multiplies_itself(norm_first, M, y // M, x // M, seen.dtype, device)
    if norm_first:  # the normalised x is never written, and ReLU has no pass of its own
        forward = 2 * x + 2 * y * call.acts if one_kernel else 0
        backward = x + y * call.acts
    else:
        forward = 2 * y * call.acts + 2 * y * call.adds + (2 * y - y * training if one_kernel else 0)
        backward = 3 * y + 3 * y * call.acts
    return forward + backward * training
