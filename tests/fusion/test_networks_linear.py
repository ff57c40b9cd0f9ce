"""Fused multilayer perceptrons in float32 through the interpreted kernels: the oracle rule, and their launches."""

from __future__ import annotations

import copy
from collections import Counter
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from triton.runtime import interpreter

import fusedres
from fusedres import models
from tests import zoo
from tests.fusion.linear_parts import LINEAR_LN, LN_LINEAR
from tests.fusion.trained import Decided
from tests.oracle import Tensors, assert_network_as_good_as_eager

pytestmark = [pytest.mark.floor, pytest.mark.usefixtures("triton_backend")]

FORWARD = {"_layer_norm_linear_fwd_kernel": LN_LINEAR, "_linear_layer_norm_fwd_kernel": LINEAR_LN}
BACKWARD = "_layer_norm_bwd_kernel"
NETWORKS = {
    "residual_mlp": (
        lambda: models.residual_mlp(image_size=4, width=32, depth=3, num_classes=5), (9, 3, 4, 4), {LINEAR_LN: 3}
    ),
    "residual_mlp, linear skips": (
        lambda: models.residual_mlp(image_size=4, width=32, depth=2, num_classes=5, skip="linear"),
        (9, 3, 4, 4),
        {LINEAR_LN: 2},
    ),
    "plain_mlp": (
        lambda: models.plain_mlp(in_features=20, width=32, out_features=5, depth=3), (3, 4, 20), {LN_LINEAR: 3}
    ),
    "hand-written": (zoo.HandMLP, (9, 12), {LINEAR_LN: 3}),
    "hand-written, functional": (lambda: zoo.HandMLP(zoo.FunctionalMLPBlock), (9, 12), {LINEAR_LN: 3}),
}  # fmt: skip


def train(model: nn.Module, x: Tensor) -> Tensors:
    """Output and all gradients of one step; the cotangent is the same for the same shapes."""
    leaf = x.clone().requires_grad_()
    out = model(leaf)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype))
    named = {"out": out.detach(), "grad_input": leaf.grad} | {name: p.grad for name, p in model.named_parameters()}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


@pytest.mark.parametrize("name", NETWORKS)
def test_oracle(name):
    build, shape, expected = NETWORKS[name]
    torch.manual_seed(1)  # 0 has a value at the edge of a ReLU
    model, x = zoo.randomise(build()).float(), torch.randn(shape)
    with Decided():
        exact = train(copy.deepcopy(model).double(), x.double())
    eager = train(copy.deepcopy(model), x)
    fused = fusedres.fuse(model)
    launches: Counter[str] = Counter()
    run = interpreter.GridExecutor.__call__

    def record(executor, *args, **kwargs):
        launches[executor.fn.__name__] += 1
        return run(executor, *args, **kwargs)

    with mock.patch.object(interpreter.GridExecutor, "__call__", record):
        actual = train(fused, x)
    assert {FORWARD[kernel]: count for kernel, count in launches.items() if kernel in FORWARD} == expected
    assert launches[BACKWARD] == sum(expected.values())
    assert {row["path"] for row in fusedres.explain(fused).rows} == {"triton"}
    assert_network_as_good_as_eager(actual, [eager], exact)
