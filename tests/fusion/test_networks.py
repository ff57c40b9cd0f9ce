"""Whole fused networks in float32 through the interpreted kernels: the oracle rule, and the launches they make."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from triton.runtime import interpreter

import fusedres
from fusedres import models
from tests import zoo
from tests.oracle import Tensors, assert_as_good_as_eager, assert_network_as_good_as_eager

pytestmark = [pytest.mark.floor, pytest.mark.usefixtures("triton_backend")]


LAYERS = ("", "_apply", "_on_chip")  # kernels that write an output, once a layer
BEYOND = {"batch_norm_join": "bn_add_bn_act", "batch_norm_pool": "bn_act_maxpool"}


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


def train(model: nn.Module, x: Tensor, form: torch.memory_format = torch.contiguous_format) -> Tensors:
    """Output, all gradients and buffers of one step; the cotangent is the same for the same shapes."""
    model, leaf = model.to(memory_format=form), x.clone(memory_format=form).requires_grad_()
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


RESNET34 = {"bn_act_maxpool": 1, "bn_act": 16, "bn_add_act": 12, "bn_add_bn_act": 3, "bn_add_act_avgpool": 1}
RESNET50 = {"bn_act_maxpool": 1, "bn_act": 32, "bn_add_act": 11, "bn_add_bn_act": 4, "bn_add_act_avgpool": 1}
NETWORKS = {
    "resnet34": (lambda: models.resnet34(num_classes=5, width=8), (3, 3, 64, 64), RESNET34),
    "resnet50": (lambda: models.resnet50(num_classes=5, width=8), (3, 3, 64, 64), RESNET50),
    "hand-written resnet34": (lambda: zoo.hand_resnet34(), (3, 3, 64, 64), RESNET34),
    "hand-written resnet50": (lambda: zoo.hand_resnet50(), (3, 3, 64, 64), RESNET50),
    "projection block": (lambda: zoo.ProjectionBlock(8, 16), (4, 8, 14, 14), {"bn_act": 1, "bn_add_act": 1, "bn": 1}),
}


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("name", NETWORKS)
def test_oracle(name, channels_last, monkeypatch):
    build, shape, expected = NETWORKS[name]
    torch.manual_seed(0)
    model = zoo.randomise(build()).float().train()
    x = torch.randn(shape)
    form = torch.channels_last if channels_last else torch.contiguous_format
    exact = train(copy.deepcopy(model).double(), x.double())
    eagers = [train(copy.deepcopy(model), x, f) for f in (torch.channels_last, torch.contiguous_format)]
    fused = fusedres.fuse(model)
    with recorded_layers() as seen:
        actual = train(fused, x, form)
    assert seen.pop("backward") == sum(expected.values())
    assert seen == expected
    assert_network_as_good_as_eager(actual, eagers, exact)


@pytest.mark.parametrize("name", ["resnet50", "hand-written resnet34", "projection block"])
def test_inference(name):
    build, shape, expected = NETWORKS[name]
    model = zoo.randomise(build()).float().eval()
    x = torch.randn(shape)
    with torch.no_grad():
        exact = {"out": copy.deepcopy(model).double()(x.double())}
        eager = {"out": model(x)}
        with recorded_layers() as seen:
            actual = {"out": fusedres.fuse(model)(x)}
    assert +seen == expected
    assert_as_good_as_eager(actual, [eager], exact)
