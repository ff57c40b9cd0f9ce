"""LayerNorm and Linear in one module, in both orders: drop-in promises, beside PyTorch's own modules."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusedres import models
from fusedres.nn import LayerNormLinear, LinearLayerNorm, ResidualMLPBlock
from tests.oracle import assert_as_good_as_eager
from tests.zoo import TOLERANCE, assert_same_steps, randomise

KINDS = [LayerNormLinear, LinearLayerNorm, ResidualMLPBlock]
PAIRS = KINDS[:2]
IN, OUT = 6, 5
SWITCHES: dict[str, dict[str, Any]] = {
    "default": {},
    "no bias": {"bias": False},
    "no norm bias": {"ln_bias": False},
    "no affine": {"elementwise_affine": False},
    "nothing": {"bias": False, "elementwise_affine": False, "act": None},
    "no act": {"act": None},
    "eps": {"eps": 0.1},
}


def plain(kind: type, *, bias=True, eps=1e-5, elementwise_affine=True, ln_bias=True, act="relu", **factory):
    """The same of PyTorch's own modules, under the same names and drawn in the same order."""
    first = kind is LayerNormLinear
    norm = nn.LayerNorm(IN if first else OUT, eps, elementwise_affine, ln_bias, **factory)
    linear = nn.Linear(IN, OUT, bias, **factory)
    parts: list[tuple[str, nn.Module]] = [("norm", norm), ("linear", linear)]
    return nn.Sequential(
        OrderedDict([*(parts if first else parts[::-1]), ("act", nn.ReLU() if act else nn.Identity())])
    )


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("kind", PAIRS)
def test_one_seed_gives_the_plain_modules(kind, switches):
    """Keys in their order, shapes and the very values; then outputs and gradients in float64."""
    torch.manual_seed(1)
    ours = kind(IN, OUT, **switches)
    torch.manual_seed(1)
    theirs = plain(kind, **switches)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    theirs.load_state_dict(randomise(ours).state_dict())
    for shape in ((3, IN), (2, 3, IN), (IN,), (0, IN)):
        assert_same_steps(ours, theirs.double(), double(*shape))


@pytest.mark.parametrize("act", ["relu", None])
def test_residual(act):
    ours, theirs = LinearLayerNorm(IN, OUT, act=act), plain(LinearLayerNorm, act=act).double()
    theirs.load_state_dict(randomise(ours).state_dict())
    x, residual, grad = double(4, IN).requires_grad_(), double(4, OUT).requires_grad_(), double(4, OUT)
    out, expected = ours(x, residual), theirs(x) + residual
    torch.testing.assert_close(out, expected, **TOLERANCE)
    for mine, other in zip(
        torch.autograd.grad(out, (x, residual), grad), torch.autograd.grad(expected, (x, residual), grad), strict=True
    ):
        torch.testing.assert_close(mine, other, **TOLERANCE)
    assert x._version == residual._version == 0


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_graph_break(kind):
    module = kind(IN, OUT)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, IN)
    torch.testing.assert_close(compiled(x), module(x))
    with torch.autocast("cpu", torch.bfloat16):  # dtypes differ now, so the validation asks for autocast
        assert torch.equal(compiled(x.bfloat16()), module(x.bfloat16()))


def test_residual_of_another_dtype():
    module = LinearLayerNorm(IN, OUT, dtype=torch.bfloat16)
    x = torch.randn(3, IN, dtype=torch.bfloat16)
    assert module(x).dtype == torch.bfloat16
    assert module(x, torch.randn(3, OUT)).dtype == torch.float32


@pytest.mark.parametrize("kind", PAIRS)
def test_autocast(kind):
    ours, theirs = kind(IN, OUT), plain(kind)
    theirs.load_state_dict(ours.state_dict())
    exact = copy.deepcopy(theirs).double()
    for x in (torch.randn(3, IN), torch.randn(3, IN, dtype=torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16):
            actual, eager = {"out": ours(x)}, {"out": theirs(x)}
        assert_as_good_as_eager(actual, [eager], {"out": exact(x.double())})


@pytest.mark.parametrize("kind", KINDS)
def test_device_and_dtype(kind):
    for dtype in (torch.bfloat16, torch.float64):
        module = kind(IN, OUT, dtype=dtype)
        assert {p.dtype for p in module.parameters()} == {dtype}
        assert module(torch.randn(2, IN, dtype=dtype)).dtype == dtype
    module = kind(IN, OUT, device="meta")
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert module(torch.empty(2, IN, device="meta")).shape == (2, OUT)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_traces(kind):
    module = randomise(kind(IN, OUT, eps=1e-3, act=None))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    x = double(3, IN)
    for twin in (copy.deepcopy(module), torch.load(buffer, weights_only=False)):
        assert type(twin) is kind and twin.act is None
        assert torch.equal(twin(x), module(x))
    assert torch.equal(torch.fx.symbolic_trace(module)(x), module(x))
    assert "act=None" in repr(module)


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_act(kind):
    with pytest.raises(ValueError, match=r"act must be .*'gelu'"):
        kind(IN, OUT, act="gelu")


@pytest.mark.parametrize("kind", PAIRS)
def test_wrong_dtype(kind):
    with pytest.raises(TypeError, match=r"input's dtype torch\.float64, got torch\.float32"):
        kind(IN, OUT)(double(2, IN))
    with pytest.raises(TypeError, match=r"input's dtype torch\.float32, got torch\.float64"):
        kind(IN, OUT, device="meta", dtype=torch.float64)(torch.empty(2, IN, device="meta"))


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("shape", [(2, IN + 1), (IN, 1), ()])
def test_wrong_features(kind, shape):
    with pytest.raises(ValueError, match=rf"input must have shape \(\*, {IN}\), got "):
        kind(IN, OUT)(torch.randn(shape))


def test_wrong_residual():
    with pytest.raises(ValueError, match=rf"residual must have shape \(2, {OUT}\), got \(2, {IN}\)"):
        LinearLayerNorm(IN, OUT)(torch.randn(2, IN), torch.randn(2, IN))


@pytest.mark.parametrize("linear", [False, True])
def test_residual_block_is_the_models(linear):
    """One seed, checkpoints both ways, and the same steps."""
    torch.manual_seed(1)
    ours = ResidualMLPBlock(IN, skip=nn.Linear(IN, IN, bias=False) if linear else None)
    torch.manual_seed(1)
    theirs = models.ResidualMLPBlock(IN, nn.Linear(IN, IN, bias=False) if linear else None)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    theirs.double().load_state_dict(randomise(ours).state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert_same_steps(ours, theirs, double(3, IN))


def test_residual_block_projects_where_sizes_differ():
    torch.manual_seed(1)
    block = ResidualMLPBlock(IN, OUT, False, dtype=torch.float64)
    torch.manual_seed(1)
    body = plain(LinearLayerNorm, bias=False, dtype=torch.float64)
    skip = nn.Linear(IN, OUT, bias=False, dtype=torch.float64)
    assert list(block.state_dict()) == ["linear.weight", "norm.weight", "norm.bias", "skip.weight"]
    x = double(3, IN)
    torch.testing.assert_close(block(x), body(x) + skip(x))
    assert ResidualMLPBlock(IN).skip is None and ResidualMLPBlock(IN, IN).skip is None


def test_residual_block_with_a_skip_that_does_not_fit():
    with pytest.raises(ValueError, match=rf"residual must have shape \(2, {OUT}\), got \(2, {IN}\)"):
        ResidualMLPBlock(IN, OUT, skip=nn.Identity())(torch.randn(2, IN))


def test_hooks_see_the_module_and_not_its_children():
    called = []
    block = ResidualMLPBlock(IN, skip=nn.Identity())
    for name, module in block.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    block(torch.randn(2, IN))
    assert called == ["skip", ""]
