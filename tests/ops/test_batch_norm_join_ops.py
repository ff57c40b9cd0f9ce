"""The operators of the projection join as PyTorch sees them: schemas, fakes, autograd, compilers and modes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from fusedres import functional
from fusedres.functional import (
    Norm,
    batch_norm_add_batch_norm_act,
    forked_batch_norm_add_batch_norm_act,
)
from tests.functional.join_parts import LEAVES, JoinInputs, join_inputs, run_join
from tests.parameters import both_modes

pytestmark = pytest.mark.usefixtures("triton_backend")
both_readers = pytest.mark.parametrize("fork", [False, True], ids=["plain", "fork"])


def arguments(device, *, grad: bool, dtype=torch.float32) -> JoinInputs:
    t = join_inputs((3, 4, 5, 3), dtype, fork=True).map(lambda t: t.to(device))
    for name in LEAVES:
        getattr(t, name).requires_grad_(grad)
    return t


@pytest.mark.parametrize("grad", [True, False])
@both_readers
def test_opcheck_training(device, fork, grad):
    t = arguments(device, grad=grad)
    torch.library.opcheck(
        torch.ops.fusedres.batch_norm_add_batch_norm_act.default,
        (
            t.input, t.other, t.weight, t.bias, t.running_mean, t.running_var, t.num_batches_tracked, 0.1, 1e-5,
            t.other_weight, t.other_bias, t.other_running_mean, t.other_running_var, t.other_num_batches_tracked, None,
            1e-3, "relu", fork, grad,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("grad", [True, False])
@both_readers
def test_opcheck_inference(device, fork, grad):
    t = arguments(device, grad=grad)
    torch.library.opcheck(
        torch.ops.fusedres.batch_norm_add_batch_norm_act_inference.default,
        (
            t.input, t.other, t.weight, t.bias, t.running_mean, t.running_var, 1e-5, t.other_weight, t.other_bias,
            t.other_running_mean, t.other_running_var, 1e-3, "relu", fork, grad,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, False, True)], ids=str)
@both_readers
def test_opcheck_backward(device, fork, needs, frozen):
    a, b, grad, grad_fork = (torch.randn(3, 4, 5, 3, device=device) for _ in range(4))
    stats, other_stats = (torch.rand(4, 4, device=device) for _ in range(2))
    torch.library.opcheck(
        torch.ops.fusedres.batch_norm_add_batch_norm_act_backward.default,
        (grad, grad_fork if fork else None, a, b, stats, other_stats, "relu", frozen, *needs),
    )


def test_empty_batches_are_counted(device):
    """Also by the operator itself, which a compiled graph calls whatever the batch turns out to be."""
    t = join_inputs((0, 4, 5, 3), torch.float32).map(lambda t: t.to(device))
    out, *_ = torch.ops.fusedres.batch_norm_add_batch_norm_act(
        t.input, t.other, t.weight, t.bias, t.running_mean, t.running_var, t.num_batches_tracked, 0.1, 1e-5,
        t.other_weight, t.other_bias, t.other_running_mean, t.other_running_var, t.other_num_batches_tracked, 0.1, 1e-5,
        "relu", True, False,
    )  # fmt: skip
    assert out.shape == t.input.shape
    assert (t.num_batches_tracked.item(), t.other_num_batches_tracked.item()) == (4, 1)


@both_modes
@both_readers
def test_saved_for_backward(device, fork, training):
    """Both inputs and both statistics; nothing for the ReLU."""
    t = arguments(device, grad=True, dtype=torch.bfloat16)
    saved: list[torch.Tensor] = []
    function = forked_batch_norm_add_batch_norm_act if fork else batch_norm_add_batch_norm_act
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        function(t.input, t.other, t.norm("", training), t.norm("other_", training), act="relu")
    assert sum(x.numel() * x.itemsize for x in saved) == 2 * t.input.numel() * 2 + 2 * 4 * 4 * 4
    assert {t.input.data_ptr(), t.other.data_ptr()} <= {x.data_ptr() for x in saved}


def state(norm: nn.BatchNorm2d) -> Norm:
    return Norm(
        norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps,
        norm.num_batches_tracked,
    )  # fmt: skip


class Block(nn.Module):
    """A projection block whose output has two readers."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.conv, self.projection, self.reader = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.norm = nn.BatchNorm2d(4, momentum=None)
        self.other_norm = self.norm if shared else nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, skip = forked_batch_norm_add_batch_norm_act(
            self.conv(x), self.projection(x), state(self.norm), state(self.other_norm), act="relu"
        )
        return self.reader(out) + skip


@pytest.mark.parametrize("shared", [False, True], ids=["two norms", "one norm"])
@both_modes
def test_compiled(device, training, shared):
    """fullgraph, running statistics included, no recompilation from step to step."""
    torch._dynamo.reset()
    module = Block(shared).to(device).train(training)
    twin = copy.deepcopy(module)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    for _ in range(2):
        x, grad = torch.randn(2, 2, 4, 6, 6, device=device)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        outs = [run(leaf) for run, leaf in zip((module, compiled), leaves, strict=True)]
        for out in outs:
            out.backward(grad)
        torch.testing.assert_close(outs[1], outs[0])
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
    assert counter.frame_count == 1
    for (name, mine), theirs in zip(twin.named_parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    for (name, mine), theirs in zip(twin.named_buffers(), module.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)
    assert module.norm.num_batches_tracked == (2 * (1 + shared) if training else 0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@both_modes
def test_without_gradients(device, context, training):
    t = join_inputs((3, 4, 5, 3), torch.float32).map(lambda t: t.to(device))
    expected = run_join(batch_norm_add_batch_norm_act, t, training, "relu")
    t.input.requires_grad_()
    with context():
        out, second = forked_batch_norm_add_batch_norm_act(
            t.input, t.other, t.norm("", training), t.norm("other_", training, 0.3, 1e-3), act="relu"
        )
    assert out is second and not out.requires_grad
    assert torch.equal(out, expected["out"])
    assert torch.equal(t.other_running_var, expected["other_running_var"])


@both_modes
def test_version_counters(device, training):
    """Running statistics changed behind autograd's back are noticed."""
    t = arguments(device, grad=True)
    buffers = [t.running_mean, t.running_var, t.num_batches_tracked]
    buffers += [t.other_running_mean, t.other_running_var, t.other_num_batches_tracked]
    before = [buffer._version for buffer in buffers]
    batch_norm_add_batch_norm_act(t.input, t.other, t.norm("", training), t.norm("other_", training))
    assert [buffer._version for buffer in buffers] == [version + training for version in before]


@both_readers
def test_an_input_changed_in_place_is_noticed(device, fork):
    """Both are what the backward reads."""
    t = arguments(device, grad=True)
    other = t.other.detach().clone()
    join = forked_batch_norm_add_batch_norm_act if fork else batch_norm_add_batch_norm_act
    out = join(t.input, other, t.norm("", True), t.norm("other_", True), act="relu")
    other.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(out, [t.grad, t.grad] if fork else t.grad)


@both_readers
def test_double_backward_is_refused(device, fork):
    t = arguments(device, grad=True)
    outs = forked_batch_norm_add_batch_norm_act(t.input, t.other, t.norm("", True), t.norm("other_", True), act="relu")
    used = outs if fork else outs[:1]
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(used, t.input, [torch.randn_like(t.input)] * len(used), create_graph=True)


def test_parameter_gradients_are_apart(device):
    """Both biases have one gradient, in memory of their own: what is done to one does not reach the other."""
    t = arguments(device, grad=True)
    batch_norm_add_batch_norm_act(t.input, t.other, t.norm("", True), t.norm("other_", True)).backward(t.grad)
    before = t.other_bias.grad.clone()
    assert torch.equal(t.bias.grad, before)
    t.bias.grad.mul_(2)
    t.weight.grad.zero_()
    assert torch.equal(t.other_bias.grad, before)


def test_public_names():
    assert functional.batch_norm_add_batch_norm_act is batch_norm_add_batch_norm_act
    assert "batch_norm_add_batch_norm_act" in functional.__all__
    assert "forked_batch_norm_add_batch_norm_act" not in functional.__all__
