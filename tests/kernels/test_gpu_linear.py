"""The MLP kernels on hardware: sizes that an interpreter does not reach, ordering, graphs, far addresses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fusedres import functional, reference
from fusedres.nn import LayerNormLinear, ResidualMLPBlock
from tests.oracle import LINEAR_LN, LN_LINEAR, assert_as_good_as_eager, linear_inputs, run_linear, to_double

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("triton_backend")]
both_orders = pytest.mark.parametrize("order", [LN_LINEAR, LINEAR_LN])
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "features"),
    [
        (128, (512, 512)),
        (4096, (256, 1024)),
        (4096, (512, 512)),
        (16384, (1024, 256)),
        (16384, (4096, 1024)),
        (1, (1, 1)),
    ],
    ids=str,
)
@both_orders
def test_oracle(order, rows, features, dtype, precision):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        inputs = linear_inputs(order, (rows,), features, dtype, residual=order == LINEAR_LN).map(lambda t: t.to(DEVICE))
        actual, eager = (run_linear(module, order, inputs, None) for module in (functional, reference))
        exact = run_linear(reference, order, inputs.map(to_double), None)
        assert_as_good_as_eager(actual, [eager], exact)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@both_orders
def test_bit_for_bit(order):
    """A partial sum that is read before it is written would show in some of 2,000 runs."""
    inputs = linear_inputs(order, (8192,), (512, 384), torch.bfloat16).map(lambda t: t.to(DEVICE))
    leaves = inputs.map(lambda t: t.detach().requires_grad_())
    given = [leaves.input, leaves.weight, leaves.bias, leaves.ln_weight, leaves.ln_bias]
    if order == LN_LINEAR:
        out = functional.layer_norm_linear_act(
            leaves.input, leaves.ln_weight, leaves.ln_bias, leaves.weight, leaves.bias, act="relu"
        )
    else:
        out = functional.linear_layer_norm_act(*given, act="relu")
    first = torch.autograd.grad(out, given, inputs.grad, retain_graph=True)
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(2_000):
        for got, want in zip(torch.autograd.grad(out, given, inputs.grad, retain_graph=True), first, strict=True):
            wrong += (got != want).any()
    assert wrong.item() == 0


BUILDS = pytest.mark.parametrize(
    "build", [lambda: LayerNormLinear(512, 256), lambda: ResidualMLPBlock(512)], ids=[LN_LINEAR, LINEAR_LN]
)


def step(module: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    out = module(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *module.parameters()], grad)]


@BUILDS
def test_two_streams(build):
    """Reductions that run at once on two streams do not share their counters or partial sums."""
    modules = [build().to(DEVICE) for _ in range(2)]
    inputs = [torch.randn(4096, 512, device=DEVICE, requires_grad=True) for _ in modules]
    grads = [torch.randn_like(module(x)) for module, x in zip(modules, inputs, strict=True)]
    expected = [step(*given) for given in zip(modules, inputs, grads, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in modules]
    for _ in range(50):
        results = []
        for stream, *given in zip(streams, modules, inputs, grads, strict=True):
            with torch.cuda.stream(stream):
                results.append(step(*given))
        torch.cuda.synchronize()
        for result, wanted in zip(results, expected, strict=True):
            for got, want in zip(result, wanted, strict=True):
                assert torch.equal(got, want)


@BUILDS
def test_graph(build):
    """A captured training step gives what the step gives, replay after replay."""
    module = build().to(DEVICE)
    x = torch.randn(4096, 512, device=DEVICE, requires_grad=True)
    grad = torch.randn_like(module(x))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(module, x, grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(module, x, grad)
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
        graph.replay()
        for got, want in zip(captured, step(module, x, grad), strict=True):
            torch.testing.assert_close(got, want)


@both_orders
def test_far_addresses(order):
    """More than 2³¹ elements: the last rows come out as they do alone."""
    rows, features = 270_000, 8192
    x = torch.randn(rows, features, device=DEVICE, dtype=torch.bfloat16)
    last = x[-5:].clone()
    ones = torch.ones(features, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(16, features, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        if order == LN_LINEAR:
            out, expected = (functional.layer_norm_linear_act(t, ones, None, weight, act="relu") for t in (x, last))
        else:
            identity = torch.eye(features, device=DEVICE, dtype=torch.bfloat16)
            out, expected = (
                functional.linear_layer_norm_act(t, identity, None, ones, None, act="relu") for t in (x, last)
            )
    torch.testing.assert_close(out[-5:], expected, rtol=0.02, atol=0.02)
