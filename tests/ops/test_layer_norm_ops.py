"""The MLP operators as PyTorch sees them: schemas, fakes, autograd, compilers and modes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusedres.functional import layer_norm_linear_act, linear_layer_norm_act
from fusedres.nn import LayerNormLinear, LinearLayerNorm, ResidualMLPBlock
from tests.oracle import LINEAR_LN, LN_LINEAR, LinearInputs, linear_inputs

pytestmark = pytest.mark.usefixtures("triton_backend")
both_orders = pytest.mark.parametrize("order", [LN_LINEAR, LINEAR_LN])
both_paths = pytest.mark.parametrize("features", [(6, 10), (1100, 10)], ids=["one kernel", "vendor product"])
MODULES = {
    "LayerNormLinear": lambda: LayerNormLinear(6, 10),
    "LinearLayerNorm": lambda: LinearLayerNorm(6, 10, act=None),
    "ResidualMLPBlock": lambda: ResidualMLPBlock(6),
    "projection": lambda: ResidualMLPBlock(6, 10),
}
every_module = pytest.mark.parametrize("name", MODULES)


def leaves(order: str, device: torch.device, features: tuple[int, int] = (6, 10), *, grad: bool = True) -> LinearInputs:
    inputs = linear_inputs(order, (2, 3), features, torch.float32, residual=order == LINEAR_LN)
    return inputs.map(lambda t: t.to(device).requires_grad_(grad))


@pytest.mark.parametrize("grad", [True, False])
@both_orders
@both_paths
def test_opcheck(device, order, features, grad):
    t = leaves(order, device, features, grad=grad)
    if order == LN_LINEAR:
        operator = torch.ops.fusedres.layer_norm_linear_act.default
        arguments = (t.input, t.ln_weight, t.ln_bias, t.weight, t.bias, 1e-5, "relu", False, grad)
    else:
        operator = torch.ops.fusedres.linear_layer_norm_act.default
        arguments = (
            t.input, t.weight, t.bias, t.ln_weight, t.ln_bias, t.residual, torch.float32, 1e-5, "relu", False, grad
        )  # fmt: skip
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("needs", [[True] * 5, [False, True, False, True, False]], ids=["all", "some"])
@both_orders
def test_opcheck_backward(device, order, needs):
    t = leaves(order, device, grad=False)
    stats = torch.rand(2, 6, device=device)
    grad = torch.randn(2, 3, 6, device=device)
    if order == LN_LINEAR:
        operator = torch.ops.fusedres.layer_norm_linear_act_backward.default
        arguments = (grad, t.input, grad, stats, t.ln_weight, t.ln_bias, t.weight, needs)
    else:
        operator = torch.ops.fusedres.linear_layer_norm_act_backward.default
        arguments = (grad, t.input, t.weight, grad.view(6, 6), stats, t.ln_weight, t.ln_bias, "relu", needs)
    torch.library.opcheck(operator, arguments)


@both_orders
@both_paths
def test_saved_for_backward(device, order, features):
    """LayerNorm first: input and output. Linear first: input and product. Nothing else of their size."""
    t = leaves(order, device, features)
    parameters = {p.data_ptr() for p in (t.weight, t.bias, t.ln_weight, t.ln_bias) if p is not None}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        call(order, t)
    n, k = features
    assert sum(saved.values()) == 4 * (6 * k + 6 * n + 2 * 6)
    assert t.input.data_ptr() in saved


def test_frozen_linear_saves_no_input(device):
    t = leaves(LINEAR_LN, device)
    t.weight.requires_grad_(False)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        out = call(LINEAR_LN, t)
    assert t.input.data_ptr() not in saved
    out.sum().backward()
    assert t.input.grad.isfinite().all() and t.weight.grad is None


def call(order: str, t: LinearInputs) -> Tensor:
    if order == LN_LINEAR:
        return layer_norm_linear_act(t.input, t.ln_weight, t.ln_bias, t.weight, t.bias, act="relu")
    return linear_layer_norm_act(
        t.input, t.weight, t.bias, t.ln_weight, t.ln_bias, act="relu", residual=t.residual
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "aot_eager") for name in MODULES), ("LayerNormLinear", "inductor"), ("projection", "inductor")],
)
def test_compiled(device, name, backend):
    """fullgraph, and no recompilation from step to step."""
    torch._dynamo.reset()
    module = MODULES[name]().to(device)
    twin = copy.deepcopy(module)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    for _ in range(3):
        x = torch.randn(4, 6, device=device)
        given = [x.clone().requires_grad_() for _ in range(2)]
        outs = [module(given[0]), compiled(given[1])]
        grad = torch.randn_like(outs[0])
        for out in outs:
            out.backward(grad)
        torch.testing.assert_close(outs[1], outs[0])
        torch.testing.assert_close(given[1].grad, given[0].grad)
    assert counter.frame_count == 1
    for (key, mine), theirs in zip(twin.named_parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6, msg=key)


@every_module
def test_compiled_dynamic_batch_under_autocast(device, name):
    torch._dynamo.reset()
    module = MODULES[name]().to(device)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, dynamic=True, backend=counter)
    frames = []
    with torch.autocast(device.type, torch.bfloat16):
        for batch in (2, 5, 3):
            x = torch.randn(batch, 6, device=device)
            out, expected = compiled(x), module(x)
            assert out.dtype == expected.dtype
            torch.testing.assert_close(out, expected)
            frames.append(counter.frame_count)
    assert len(set(frames)) == 1


@every_module
def test_export(device, name):
    module = MODULES[name]().to(device).eval()
    x = torch.randn(4, 6, device=device)
    exported = torch.export.export(module, (x,))
    torch.testing.assert_close(exported.module()(x), module(x))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@both_orders
def test_without_gradients(device, order, context):
    t = leaves(order, device)
    expected = call(order, t)
    with context():
        out = call(order, t)
    assert not out.requires_grad
    assert torch.equal(out, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
@every_module
def test_checkpointing(device, name, use_reentrant):
    module = MODULES[name]().to(device)
    twin = copy.deepcopy(module)
    x = torch.randn(4, 6, device=device)
    given = [x.clone().requires_grad_() for _ in range(2)]
    out = module(given[0])
    grad = torch.randn_like(out)
    out.backward(grad)
    checkpoint(twin, given[1], use_reentrant=use_reentrant).backward(grad)
    assert torch.equal(given[0].grad, given[1].grad)
    assert torch.equal(module.linear.weight.grad, twin.linear.weight.grad)


@both_orders
def test_double_backward_is_refused(device, order):
    t = leaves(order, device)
    out = call(order, t)
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(out, t.input, torch.randn_like(out), create_graph=True)


@both_orders
def test_func_transforms_take_the_reference(device, order, monkeypatch):
    t = leaves(order, device, grad=False)

    def loss(weight: Tensor) -> Tensor:
        t.weight = weight
        return call(order, t).square().sum()

    weight = t.weight
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(loss)(weight)
    monkeypatch.setenv("FUSEDRES_BACKEND", "auto")
    gradient = torch.func.grad(loss)(weight)
    leaf = weight.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(gradient, leaf.grad)


@pytest.mark.parametrize("changed", ["input", "weight", "out"])
@both_orders
def test_changes_before_the_backward_are_noticed(device, order, changed):
    """As in eager: what the backward reads must not change in between; Linear first, it does not read the output."""
    t = leaves(order, device)
    out = call(order, t)
    with torch.no_grad():
        (out if changed == "out" else getattr(t, changed)).mul_(2)
    if changed == "out" and order == LINEAR_LN:
        out.sum().backward()
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("operation", [nn.functional.relu_, torch.Tensor.neg_])
@both_orders
def test_operators_do_not_alias(device, order, operation):
    """The output is a tensor of its own: changing it changes neither input nor residual."""
    t = leaves(order, device, grad=False)
    before = t.map(lambda x: x.clone())
    operation(call(order, t))
    for name, tensor in vars(t).items():
        assert tensor is None or torch.equal(tensor, getattr(before, name)), name
