"""A whole fused network on the kernels: what autograd and PyTorch's own operators have left to do."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedres
from fusedres import models
from tests import zoo

pytestmark = [pytest.mark.floor, pytest.mark.usefixtures("triton_backend")]
PLAIN = {"add", "add_", "native_batch_norm", "native_batch_norm_backward", "_native_batch_norm_legit", "relu", "relu_",
         "threshold_backward", "max_pool2d_with_indices", "max_pool2d_with_indices_backward", "mean", "clone",
         "_adaptive_avg_pool2d", "copy_"}  # fmt: skip


class Operators(TorchDispatchMode):
    """Counts ours, and those of PyTorch's that move an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: Counter[str] = Counter()
        self.plain: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "fusedres":
            self.ours[name] += 1
        elif name in PLAIN and isinstance(out, Tensor) and out.dim() == 4:
            self.plain[name] += 1
        return out


@pytest.mark.parametrize("save", ["activations", "recompute"])
def test_nothing_is_left_between_the_convolutions(save):
    """No addition of gradients in particular."""
    model = zoo.resnet(models.Bottleneck, (2, 2), width=8, small_input=False).float()
    model = fusedres.fuse(model, save=save).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with Operators() as forward:
        loss = model(x).sum()
    with Operators() as backward:
        loss.backward()
    layers = {"batch_norm_act": 9}
    if save == "recompute":
        layers = {"batch_norm_act": 1, "batch_norm_act_conv2d": 8}
    assert forward.ours == {
        "batch_norm_act_max_pool2d": 1, "batch_norm_add_batch_norm_act": 2, "batch_norm_act_global_avg_pool2d": 1,
        **layers,
    }  # fmt: skip
    assert backward.ours == {f"{name}_backward": count for name, count in forward.ours.items()}
    assert not forward.plain and not backward.plain
