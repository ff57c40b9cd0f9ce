"""Predicted bytes: what eager PyTorch reads and writes for a pattern, less what the kernels do.

In passes over an activation (one reads or writes it once). Eager runs each operation on its own. A BatchNorm reads its
input twice in training, once in evaluation, and writes; its backward reads gradient and input twice and writes. ReLU
reads and writes, its backward reads two and writes. An addition reads two and writes; its backward is free, but two
gradients that meet at a sum are added, which is an addition again. The kernels' passes are derived in
``kernels/README.md``; where a channel's values fit on the chip they need fewer, which is not counted here.
"""

from __future__ import annotations

import torch

from fusedres.functional import KERNEL_DTYPES, layer_norm_refusal, multiplies_itself
from fusedres.fusion.rewriting import Call
from fusedres.fusion.shapes import Seen

# pattern -> eager's passes and ours, forward and backward of a training step together
_TRAINING = {
    "bn": (3 + 5, 3 + 5),
    "bn_act": (5 + 8, 3 + 5),
    "bn_add": (6 + 5, 4 + 5),
    "bn_add_act": (8 + 8, 4 + 6),  # and one bit an element, written and read
    "add_bn": (6 + 8, 5 + 6),
    "add_bn_act": (8 + 11, 5 + 6),
}
_INFERENCE = {"bn": (2, 2), "bn_act": (4, 2), "bn_add": (5, 3), "bn_add_act": (7, 3), "add_bn": (5, 4),
              "add_bn_act": (7, 4)}  # fmt: skip


def bytes_saved(call: Call, seen: Seen, training: bool, device: torch.device) -> int | None:
    """For one call of a pattern on a device where kernels run; ``None`` where the Linear beside was not seen.

    0 for dtypes and sizes that no kernel covers.
    """
    if seen.dtype not in KERNEL_DTYPES:
        return 0
    if call.pattern in _TRAINING:
        eager, ours = (_TRAINING if training else _INFERENCE)[call.pattern]
        mask = 2 * (seen.elements // 8) if training and call.pattern == "bn_add_act" else 0
        return (eager - ours) * seen.elements * seen.dtype.itemsize - mask
    elements = _linear_elements(call, seen, training, device)
    return None if elements is None else elements * seen.dtype.itemsize


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
