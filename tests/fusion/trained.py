"""Networks in float32 through the interpreted kernels: the oracle rule, and the launches they make."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

import fusedres
from tests.oracle import Tensors, assert_network_as_good_as_eager

FORMATS = (torch.channels_last, torch.contiguous_format)
LAYERS = ("", "_apply", "_on_chip")  # kernels that write an output, once a layer
BEYOND = {"batch_norm_join": "bn_add_bn_act", "batch_norm_pool": "bn_act_maxpool"}
UNDECIDED = 3e-5  # twice what rounding to float32 reaches in the networks here


@contextmanager
def recorded_layers() -> Iterator[Counter[str]]:
    """Counts forward layers by what they fuse, and backward layers, as the kernels are launched."""
    seen: Counter[str] = Counter()
    run = interpreter.GridExecutor.__call__

    def record(executor, *args, **kwargs):
        values = dict(zip(executor.arg_names, args, strict=False)) | kwargs
        family, _, kernel = executor.fn.__name__.strip("_").removesuffix("_kernel").rpartition("_fwd")
        if kernel in LAYERS:
            add = "_add" if values.get("residual_ptr") is not None else ""
            pattern = BEYOND.get(family, f"bn{add}{'_act' if values['RELU'] else ''}")
            seen[f"{pattern}_avgpool" if family == "batch_norm_head" else pattern] += 1
        seen["backward"] += executor.fn.__name__.endswith(("_bwd_apply_kernel", "_bwd_on_chip_kernel"))
        return run(executor, *args, **kwargs)

    with mock.patch.object(interpreter.GridExecutor, "__call__", record):
        yield seen


class Decided(TorchDispatchMode):
    """Refuses values in front of a ReLU that rounding may move to its other side: their gradient would be chance."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__.removesuffix("_") in ("relu", "leaky_relu"):
            self.seen += 1
            nearest = args[0][args[0] != 0].abs().min()
            assert nearest > UNDECIDED, f"{nearest:.1e} in front of a ReLU: take another seed"
        return func(*args, **(kwargs or {}))


def train(model: nn.Module, x: Tensor, form: torch.memory_format = torch.contiguous_format) -> Tensors:
    """Output, all gradients and buffers of one step; the cotangent is the same for the same shapes."""
    model, leaf = model.to(memory_format=form), x.clone(memory_format=form).requires_grad_()  # pyright: ignore[reportCallIssue]
    out = model(leaf)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    out.backward(grad)
    named = {"out": out.detach(), "grad_input": leaf.grad}
    # A convolution's bias has no effect in front of a BatchNorm: its gradient is rounding noise around 0.
    named |= {
        name: p.grad for name, p in model.named_parameters() if not re.search(r"(conv\d|downsample\.0)\.bias", name)
    }
    named |= dict(model.named_buffers())
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def check_network(model: nn.Module, x: Tensor, form: torch.memory_format) -> Counter[str]:
    """Fuse and train it in float32: as good as eager. The layers that the kernels ran."""
    with mock.patch.dict("os.environ", FUSEDRES_BACKEND="reference"):  # some have modules of ours from the start
        with Decided() as decided:
            exact = train(copy.deepcopy(model).double(), x.double())
        assert decided.seen
        eagers = [train(copy.deepcopy(model), x, each) for each in FORMATS]
    fusedres.fuse(model)
    with mock.patch.dict("os.environ", FUSEDRES_BACKEND="triton"), recorded_layers() as seen:
        actual = train(model, x, form)
    assert_network_as_good_as_eager(actual, eagers, exact)
    return seen
