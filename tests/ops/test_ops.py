"""The operators as PyTorch sees them: schemas, fakes, autograd, compilers, modes and transforms."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres.functional import add_batch_norm_act, batch_norm_act
from fusedres.nn import BasicBlock, BatchNormAct2d
from tests.oracle import batch_norm_inputs, run_batch_norm
from tests.parameters import compiled_modes

pytestmark = pytest.mark.usefixtures("triton_backend")


def operator_arguments(device, dtype=torch.float32, *, residual: bool, grad: bool):
    t = batch_norm_inputs((3, 4, 5, 3), dtype, residual=residual).map(lambda t: t.to(device))
    for leaf in (t.input, t.residual, t.weight, t.bias):
        if leaf is not None:
            leaf.requires_grad_(grad)
    return t


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_opcheck_training(device, residual, grad):
    t = operator_arguments(device, residual=residual, grad=grad)
    torch.library.opcheck(
        torch.ops.fusedres.batch_norm_act.default,
        (
            t.input,
            t.residual,
            t.weight,
            t.bias,
            t.running_mean,
            t.running_var,
            t.num_batches_tracked,
            0.1,
            1e-5,
            "relu",
            False,
            grad,
        ),
    )


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_opcheck_inference(device, residual, grad):
    t = operator_arguments(device, residual=residual, grad=grad)
    torch.library.opcheck(
        torch.ops.fusedres.batch_norm_act_inference.default,
        (t.input, t.residual, t.weight, t.bias, t.running_mean, t.running_var, 1e-5, "relu", False, grad),
    )


@pytest.mark.parametrize("frozen", [True, False])
def test_opcheck_backward(device, frozen):
    x = torch.randn(3, 4, 5, 3, device=device)
    stats = torch.rand(4, 4, device=device)
    mask = torch.randint(0, 256, (6 * 4,), dtype=torch.uint8, device=device)
    torch.library.opcheck(
        torch.ops.fusedres.batch_norm_act_backward.default,
        (torch.randn_like(x), None, x, stats, mask, "relu", frozen, True, x.dtype, x.dtype, torch.float32, None),
    )


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_sum_training(device, residual_dtype, grad):
    t = operator_arguments(device, residual=True, grad=grad)
    residual = t.residual.detach().to(residual_dtype).requires_grad_(grad)
    torch.library.opcheck(
        torch.ops.fusedres.add_batch_norm_act.default,
        (
            t.input,
            residual,
            t.weight,
            t.bias,
            t.running_mean,
            t.running_var,
            t.num_batches_tracked,
            0.1,
            1e-5,
            "relu",
            grad,
        ),
    )


@pytest.mark.parametrize("grad", [True, False])
def test_opcheck_sum_inference(device, grad):
    t = operator_arguments(device, residual=True, grad=grad)
    torch.library.opcheck(
        torch.ops.fusedres.add_batch_norm_act_inference.default,
        (t.input, t.residual, t.weight, t.bias, t.running_mean, t.running_var, 1e-5, "relu", grad),
    )


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("sum_used", [True, False])
@pytest.mark.parametrize("term_dtype", [torch.float32, torch.bfloat16, None], ids=str)
def test_opcheck_sum_backward(device, term_dtype, sum_used, frozen):
    s = torch.randn(3, 4, 5, 3, device=device)
    grad, grad_sum = torch.randn_like(s), torch.randn_like(s) if sum_used else None
    stats = torch.rand(4, 4, device=device)
    torch.library.opcheck(
        torch.ops.fusedres.batch_norm_act_backward.default,
        (grad, grad_sum, s, stats, None, "relu", frozen, False, term_dtype, None, torch.float32, None),
    )


@pytest.mark.parametrize("residual", [True, False])
def test_saved_for_backward(device, residual):
    """The input, the statistics, and a bit an element only where a residual needs it."""
    t = operator_arguments(device, torch.bfloat16, residual=residual, grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        batch_norm_act(t.input, t.running_mean, t.running_var, t.weight, t.bias, True, residual=t.residual, act="relu")
    mask_bytes = (3 * 5 * 3 + 7) // 8 * 4 if residual else 0
    assert sum(x.numel() * x.itemsize for x in saved) == t.input.numel() * 2 + 4 * 4 * 4 + mask_bytes
    assert any(x.data_ptr() == t.input.data_ptr() for x in saved)


@pytest.mark.parametrize("training", [True, False])
def test_sum_saved_for_backward(device, training):
    """The sum, which is an output, and the statistics."""
    t = operator_arguments(device, torch.bfloat16, residual=True, grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        total, _ = add_batch_norm_act(
            t.input, t.residual, t.running_mean, t.running_var, t.weight, t.bias, training, act="relu"
        )
    assert sum(x.numel() * x.itemsize for x in saved) == total.numel() * 2 + 4 * 4 * 4
    assert any(x.data_ptr() == total.data_ptr() for x in saved)


class PreActivation(nn.Module):
    """Two joins in a row: the sum is normalised, and handed on to the next join."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(BatchNormAct2d(4, momentum=momentum) for momentum in (None, 0.1))
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, input: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total, out = self.norms[0].add(input, residual)
        return self.norms[1].add(self.conv(out), total)


@compiled_modes
def test_compiled_sums(device, training, backend):
    """fullgraph, both outputs in the backward, running statistics included, no recompilation from step to step."""
    torch._dynamo.reset()
    module = PreActivation().to(device).train(training)
    twin = copy.deepcopy(module)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    for _ in range(3):
        x, r, *grads = torch.randn(4, 2, 4, 6, 6, device=device)
        pairs = [[t.clone().requires_grad_() for t in (x, r)] for _ in range(2)]
        outs = [run(*leaves) for run, leaves in zip((module, compiled), pairs, strict=True)]
        for results in outs:
            torch.autograd.backward(results, grads)
        for mine, theirs in zip(
            [*outs[1], *(t.grad for t in pairs[1])], [*outs[0], *(t.grad for t in pairs[0])], strict=True
        ):
            torch.testing.assert_close(mine, theirs)
    assert counter.frame_count == 1
    for (name, mine), theirs in zip(twin.named_parameters(), module.parameters(), strict=True):
        # A compiler may sum a convolution's gradient in another order: rounding in proportion to the largest.
        rounding = 1e-6 * theirs.grad.abs().max().item()
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=rounding, msg=name)
    for (name, mine), theirs in zip(twin.named_buffers(), module.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)
    assert module.norms[0].num_batches_tracked == (3 if training else 0)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_sum_of_one_tensor(device, backend):
    """The input is the residual, of another dtype than the parameters, and only one output is used."""
    torch._dynamo.reset()
    x, grad = torch.randn(2, 3, 4, 6, 6, device=device).to(torch.bfloat16)

    def run(t):
        return add_batch_norm_act(t, t, None, None, training=True, act="relu")

    for used in (0, 1):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        for function, leaf in zip((run, torch.compile(run, fullgraph=True, backend=backend)), leaves, strict=True):
            function(leaf)[used].backward(grad)
        assert torch.equal(leaves[0].grad, leaves[1].grad)


@compiled_modes
def test_compiled_block(device, training, backend):
    """fullgraph, running statistics included, and no recompilation from step to step."""
    torch._dynamo.reset()
    block = BasicBlock(4, 4).to(device).train(training)
    block.bn1.momentum = None
    compiled_block = copy.deepcopy(block)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(compiled_block, fullgraph=True, backend=counter)
    for _ in range(3):
        x = torch.randn(2, 4, 6, 6, device=device)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        grad = torch.randn_like(x)
        outs = [block(leaves[0]), compiled(leaves[1])]
        for out in outs:
            out.backward(grad)
        torch.testing.assert_close(outs[1], outs[0])
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
    assert counter.frame_count == 1
    for (name, mine), theirs in zip(compiled_block.named_parameters(), block.parameters(), strict=True):
        # A compiler may sum a convolution's gradient in another order: rounding in proportion to the largest.
        rounding = 1e-6 * theirs.grad.abs().max().item()
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=rounding, msg=name)
    for (name, mine), theirs in zip(compiled_block.named_buffers(), block.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)
    assert block.bn1.num_batches_tracked == (3 if training else 0)


def test_compiled_dynamic_batch(device):
    torch._dynamo.reset()
    module = BatchNormAct2d(4).to(device)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for batch in (2, 5, 3):
        x = torch.randn(batch, 4, 6, 6, device=device)
        torch.testing.assert_close(compiled(x), module(x))
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1


def test_export(device):
    module = BasicBlock(4, 4).to(device).eval()
    x = torch.randn(2, 4, 6, 6, device=device)
    exported = torch.export.export(module, (x,))
    torch.testing.assert_close(exported.module()(x), module(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(device, dtype):
    """Statistics and parameters stay float32, the activation has autocast's dtype, as in eager."""
    block = BasicBlock(4, 4).to(device)
    eager = copy.deepcopy(block)
    x = torch.randn(2, 4, 6, 6, device=device)
    with torch.autocast(device.type, dtype):
        out = block(x)
    torch.manual_seed(1)
    grad = torch.randn_like(out)
    out.backward(grad)
    assert block.bn1.weight.grad is not None and block.bn1.weight.grad.dtype == torch.float32
    # The float32 input is the residual: the sum is promoted.
    assert out.dtype == torch.float32
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSEDRES_BACKEND", "reference")
        with torch.autocast(device.type, dtype):
            expected = eager(x)
    assert expected.dtype == out.dtype
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(device, context, training):
    t = operator_arguments(device, residual=True, grad=True)
    expected = run_batch_norm(batch_norm_act, t, training, "relu")
    with context():
        running = [t.running_mean.clone(), t.running_var.clone()]
        out = batch_norm_act(t.input, *running, t.weight, t.bias, training, residual=t.residual, act="relu")
    assert not out.requires_grad
    assert torch.equal(out, expected["out"])
    assert torch.equal(running[0], expected["running_mean"])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(device, use_reentrant):
    """The same gradients; the statistics move twice, as with PyTorch's own BatchNorm."""
    block = BasicBlock(4, 4).to(device)
    twin = copy.deepcopy(block)
    x = torch.randn(2, 4, 6, 6, device=device)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    grad = torch.randn_like(x)
    block(leaves[0]).backward(grad)
    checkpoint(twin, leaves[1], use_reentrant=use_reentrant).backward(grad)
    assert torch.equal(leaves[0].grad, leaves[1].grad)
    assert torch.equal(block.bn2.weight.grad, twin.bn2.weight.grad)
    assert twin.bn1.num_batches_tracked == 2


def test_version_counters(device):
    """Running statistics changed behind autograd's back are noticed."""
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
    x = torch.randn(2, 4, 3, 3, device=device)
    scale = torch.ones(4, device=device, requires_grad=True)
    used = scale * var
    before = (mean._version, var._version)
    batch_norm_act(x, mean, var, training=True)
    assert (mean._version, var._version) == (before[0] + 1, before[1] + 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        used.sum().backward()


def test_double_backward_is_refused(device):
    x = torch.randn(2, 4, 3, 3, device=device, requires_grad=True)
    out = batch_norm_act(x, None, None, training=True, act="relu")
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(out, x, torch.randn_like(out), create_graph=True)


def test_double_backward_of_a_sum_is_refused(device):
    x = torch.randn(2, 4, 3, 3, device=device, requires_grad=True)
    outputs = add_batch_norm_act(x, x.detach(), None, None, training=True, act="relu")
    for used in (outputs[:1], outputs[1:], outputs):
        with pytest.raises(NotImplementedError, match="double backward"):
            torch.autograd.grad(used, x, [torch.randn_like(x)] * len(used), create_graph=True, retain_graph=True)


@pytest.mark.parametrize("training", [True, False])
def test_version_counters_of_a_sum(device, training):
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
    x = torch.randn(2, 4, 3, 3, device=device)
    before = (mean._version, var._version)
    add_batch_norm_act(x, x, mean, var, training=training)
    assert (mean._version, var._version) == (before[0] + training, before[1] + training)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_sum_without_gradients(device, context, training):
    t = operator_arguments(device, residual=True, grad=True)
    expected = run_batch_norm(add_batch_norm_act, t, training, "relu")
    with context():
        running = [t.running_mean.clone(), t.running_var.clone()]
        total, out = add_batch_norm_act(t.input, t.residual, *running, t.weight, t.bias, training, act="relu")
    assert not total.requires_grad and not out.requires_grad
    assert torch.equal(total, expected["sum"])
    assert torch.equal(out, expected["out"])
    assert torch.equal(running[0], expected["running_mean"])


def test_func_transforms_take_the_reference(device, monkeypatch):
    x = torch.randn(2, 4, 3, 3, device=device)
    weight = torch.rand(4, device=device)

    def loss(w):
        return (batch_norm_act(x, None, None, w, training=True, act="relu") ** 2).sum()

    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(loss)(weight)
    monkeypatch.setenv("FUSEDRES_BACKEND", "auto")
    leaf = weight.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(weight), leaf.grad)
    torch._dynamo.reset()
    compiled = torch.compile(lambda w: torch.func.grad(loss)(w), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(weight), leaf.grad)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_forward_mode_takes_the_reference(device, monkeypatch, requires_grad):
    monkeypatch.setenv("FUSEDRES_BACKEND", "auto")
    x = torch.randn(2, 4, 3, 3, device=device, requires_grad=requires_grad)
    tangent = torch.randn_like(x)
    expected = torch.func.jvp(lambda t: batch_norm_act(t, None, None, training=True), (x,), (tangent,))[1]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        out = batch_norm_act(dual, None, None, training=True)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(out).tangent, expected)


def test_unused_output_and_unused_gradients(device):
    x = torch.randn(2, 4, 3, 3, device=device, requires_grad=True)
    y = torch.randn(2, 4, 3, 3, device=device, requires_grad=True)
    batch_norm_act(x, None, None, training=True)
    (y * 2).sum().backward()
    assert x.grad is None


@pytest.mark.parametrize("backend", ["nonsense", "Triton"])
def test_unknown_backend(monkeypatch, backend):
    monkeypatch.setenv("FUSEDRES_BACKEND", backend)
    with pytest.raises(ValueError, match=f"FUSEDRES_BACKEND.*{backend}"):
        batch_norm_act(torch.randn(2, 3, 4, 4), None, None, training=True)


def test_public_names():
    assert fusedres.functional.batch_norm_act is batch_norm_act
    assert fusedres.functional.add_batch_norm_act is add_batch_norm_act
    assert issubclass(BatchNormAct2d, nn.BatchNorm2d)
