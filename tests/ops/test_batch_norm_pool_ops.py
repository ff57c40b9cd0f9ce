"""The operators and the module of batch_norm_act_max_pool2d as PyTorch sees them, and the fork of its output."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres
from fusedres import reference
from fusedres.functional import Norm, batch_norm_act_max_pool2d, normalise_max_pool2d
from fusedres.nn import BatchNormActMaxPool2d
from tests.parameters import both_modes, compiled_modes

pytestmark = pytest.mark.usefixtures("triton_backend")
WINDOW = ([3, 3], [2, 2], [1, 1])
SHAPE, POOLED = (3, 4, 6, 5), (3, 4, 3, 3)


def tensors(device: torch.device, dtype: torch.dtype = torch.float32, *, grad: bool = True) -> dict[str, Tensor]:
    x = torch.randn(SHAPE, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.rand(2, 4, device=device) + 0.5
    return {
        "input": x.requires_grad_(grad),
        "weight": weight.requires_grad_(grad),
        "bias": bias.clone().requires_grad_(grad),
        "running_mean": torch.zeros(4, device=device),
        "running_var": torch.ones(4, device=device),
    }


def state(t: dict[str, Tensor], training: bool) -> Norm:
    return Norm(t["running_mean"].clone(), t["running_var"].clone(), t["weight"], t["bias"], training)


@pytest.mark.parametrize(("grad", "fork"), [(True, False), (True, True), (False, False)])
@both_modes
def test_opcheck_forward(device, training, grad, fork):
    t = tensors(device, grad=grad)
    vectors = (t["weight"], t["bias"], t["running_mean"], t["running_var"])
    operator = torch.ops.fusedres.batch_norm_act_max_pool2d.default
    arguments = (t["input"], *vectors, torch.tensor(3, device=device), 0.1, 1e-5, "relu", *WINDOW, fork, grad)
    if not training:
        operator = torch.ops.fusedres.batch_norm_act_max_pool2d_inference.default
        arguments = (t["input"], *vectors, 1e-5, "relu", *WINDOW, fork, grad)
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("fork", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_opcheck_backward(device, frozen, fork):
    x, stats = torch.randn(SHAPE, device=device), torch.rand(4, 4, device=device)
    winner = torch.randint(0, 9, POOLED, dtype=torch.uint8, device=device)
    grad, other = torch.randn(2, *POOLED, device=device)
    arguments = (grad, other if fork else None, x, stats, winner, *WINDOW, frozen, x.dtype, None, torch.float32, None)
    torch.library.opcheck(torch.ops.fusedres.batch_norm_act_max_pool2d_backward.default, arguments)


def test_saved_for_backward(device):
    """The input, the statistics, and a byte an output."""
    t = tensors(device, torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = batch_norm_act_max_pool2d(**t, training=True)
    assert sum(x.numel() * x.itemsize for x in saved) == t["input"].numel() * 2 + 4 * 4 * 4 + out.numel()
    assert any(x.data_ptr() == t["input"].data_ptr() for x in saved)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@both_modes
def test_without_gradients(device, training, context):
    t = tensors(device)
    expected = batch_norm_act_max_pool2d(**(t | state(t, training)._asdict()))
    with context():
        out = batch_norm_act_max_pool2d(**(t | state(t, training)._asdict()))
    assert not out.requires_grad
    assert torch.equal(out, expected)


@both_modes
def test_version_counters(device, training):
    t = tensors(device)
    buffers = [t["running_mean"], t["running_var"], torch.tensor(0, device=device)]
    before = [b._version for b in buffers]
    batch_norm_act_max_pool2d(**t, training=training, num_batches_tracked=buffers[2])
    assert [b._version for b in buffers] == [version + training for version in before]


def test_double_backward_is_refused(device):
    t = tensors(device)
    out = batch_norm_act_max_pool2d(**t, training=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(out, t["input"], torch.randn_like(out), create_graph=True)


def readers(outputs: tuple[Tensor, Tensor], cotangents: list[Tensor | None]) -> None:
    """The backward from those of two readers that have a gradient."""
    used = [(out, c.to(out.dtype)) for out, c in zip(outputs, cotangents, strict=True) if c is not None]
    torch.autograd.backward([out for out, _ in used], [c for _, c in used])


@pytest.mark.parametrize("used", ["both", "first", "second", "strided"])
@both_modes
def test_fork(device, training, used):
    """The gradient of two readers is that of their sum, bit for bit where it is exact."""
    t = tensors(device)
    first, second = torch.randint(-8, 9, (2, *POOLED), device=device).float()
    if used == "strided":
        second = second.contiguous(memory_format=torch.channels_last)
    cotangents = [None if used == "second" else first, None if used == "first" else second]
    results = []
    for forked in (True, False):
        leaves = {name: t[name].detach().clone().requires_grad_() for name in ("input", "weight", "bias")}
        norm = state(t | leaves, training)
        if forked:
            outputs = normalise_max_pool2d(leaves["input"], norm, "relu", (3, 2, 1, 1, False), fork=True)
            assert outputs[0] is not outputs[1] and outputs[0].data_ptr() == outputs[1].data_ptr()
            readers(outputs, cotangents)
        else:
            out = batch_norm_act_max_pool2d(leaves["input"], **norm._asdict())
            out.backward(sum(c for c in cotangents if c is not None))
        results.append([leaf.grad for leaf in leaves.values()])
    for forked, summed in zip(*results, strict=True):
        assert torch.equal(forked, summed)


def test_fork_of_two_dtypes(device):
    """The second gradient takes the dtype of the first."""
    t = tensors(device, torch.bfloat16)
    outputs = normalise_max_pool2d(t["input"], state(t, True), "relu", (3, 2, 1, 1, False), fork=True)
    grad, stats = torch.randn(POOLED, device=device).bfloat16(), torch.rand(4, 4, device=device)
    winner = torch.randint(0, 9, POOLED, dtype=torch.uint8, device=device)
    backward = torch.ops.fusedres.batch_norm_act_max_pool2d_backward
    rest = (t["input"].detach(), stats, winner, *WINDOW, True, torch.bfloat16, None, None, None)
    assert torch.equal(backward(grad, grad.float(), *rest)[0], backward(grad, grad, *rest)[0])
    assert outputs[1].requires_grad


def test_fork_that_nobody_needs(device, monkeypatch):
    t = tensors(device, grad=False)
    first, second = normalise_max_pool2d(t["input"], state(t, True), "relu", (3, 2, 1, 1, False), fork=True)
    assert first is second
    monkeypatch.setenv("FUSEDRES_BACKEND", "reference")
    t = tensors(device)
    first, second = normalise_max_pool2d(t["input"], state(t, True), "relu", (3, 2, 1, 1, False), fork=True)
    assert first is second


@compiled_modes
def test_compiled_fork(device, training, backend):
    """Two readers in one graph, with eager's gradients and running statistics."""
    torch._dynamo.reset()
    t = tensors(device)

    def run(x: Tensor, norm: Norm) -> Tensor:
        main, skip = normalise_max_pool2d(x, norm, "relu", (3, 2, 1, 1, False), fork=True)
        return main.sin() + 2 * skip

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend=backend)):
        leaves = {name: t[name].detach().clone().requires_grad_() for name in ("input", "weight", "bias")}
        norm = state(t | leaves, training)
        out = function(leaves["input"], norm)
        out.backward(torch.ones_like(out))
        results.append([out, norm.running_mean, norm.running_var, *(leaf.grad for leaf in leaves.values())])
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@both_modes
def test_compiled_module(device, training):
    """fullgraph, running statistics included, and no recompilation from step to step."""
    torch._dynamo.reset()
    module = BatchNormActMaxPool2d(4, momentum=None).to(device).train(training)
    twin = copy.deepcopy(module)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    for _ in range(2):
        pair = [leaf.requires_grad_() for leaf in torch.randn(1, *SHAPE, device=device).expand(2, *SHAPE).unbind()]
        outs = [run(leaf.clone()) for run, leaf in zip((module, compiled), pair, strict=True)]
        for out in outs:
            out.backward(torch.ones_like(out).cumsum(0))
        assert torch.equal(*outs)
    assert counter.frame_count == 1
    for (name, mine), theirs in zip(twin.state_dict().items(), module.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    assert torch.equal(twin.weight.grad, module.weight.grad)


def test_compiled_dynamic_shapes(device):
    torch._dynamo.reset()
    module = BatchNormActMaxPool2d(4).to(device)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 4, 6, 6), (3, 4, 9, 7)):
        x = torch.randn(shape, device=device)
        assert torch.equal(compiled(x), module(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 0}, "kernel_size must be"),
        ({"kernel_size": (2, 3, 4)}, "kernel_size must be"),
        ({"stride": (1, 0)}, "stride must be"),
        ({"padding": 2}, "padding must be at most half of the window 3, got 2"),
        ({"padding": -1}, "padding must be"),
        ({"dilation": 0}, "dilation must be"),
        ({"kernel_size": 9, "padding": 0}, "is smaller than the window 9"),
        ({"input": torch.zeros(3)}, "input must have 4 dimensions"),
        ({"act": "gelu"}, "act must be one of"),
    ],
    ids=str,
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    """What PyTorch refuses, before anything is updated."""
    t = tensors(torch.device("cpu")) | arguments
    with pytest.raises(ValueError, match=message):
        batch_norm_act_max_pool2d(**t, training=True)
    assert not t["running_mean"].any()


@pytest.mark.parametrize(
    "arguments",
    [{"dilation": 2, "padding": 1}, {"ceil_mode": True}, {"kernel_size": 16, "padding": 8, "stride": None}],
    ids=str,
)
def test_windows_of_the_reference(device, monkeypatch, arguments):
    """No kernel has them: as PyTorch, or an error where kernels are insisted on."""
    t = tensors(device)
    with pytest.raises(RuntimeError, match="no kernel pools"):
        batch_norm_act_max_pool2d(**t, training=True, **arguments)
    assert not t["running_mean"].any()
    monkeypatch.setenv("FUSEDRES_BACKEND", "auto")
    out = batch_norm_act_max_pool2d(**(t | state(t, True)._asdict()), **arguments)
    z = F.batch_norm(t["input"], None, None, t["weight"], t["bias"], True)
    assert torch.equal(out, F.max_pool2d(z.relu(), **({"kernel_size": 3, "stride": 2, "padding": 1} | arguments)))


def test_float64_takes_the_reference(monkeypatch):
    monkeypatch.setenv("FUSEDRES_BACKEND", "auto")
    x = torch.randn(SHAPE, dtype=torch.float64)
    expected = reference.batch_norm_act_max_pool2d(x, None, None, training=True)
    assert torch.equal(batch_norm_act_max_pool2d(x, None, None, training=True), expected)


@pytest.mark.parametrize("options", [{}, {"act": None, "kernel_size": 2, "stride": None, "padding": 0}], ids=str)
def test_module(device, options):
    """A BatchNorm2d with the same tensors under the same names, that gives what the three modules do."""
    ours = BatchNormActMaxPool2d(4, **options).to(device)
    plain = nn.BatchNorm2d(4).to(device)
    pool = nn.MaxPool2d(*((2, None, 0) if options else (3, 2, 1)))
    assert isinstance(ours, nn.BatchNorm2d)
    ours.load_state_dict(plain.state_dict())
    theirs = nn.Sequential(plain, nn.Identity() if options else nn.ReLU(), pool)
    for training in (True, True, False):
        x = torch.randn(SHAPE, device=device)
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))
    for (name, mine), other in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, other, msg=name)
    assert f"kernel_size={options.get('kernel_size', 3)}" in repr(ours)


def test_copies_of_the_module():
    module = BatchNormActMaxPool2d(4, stride=(2, 1))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(module), torch.load(buffer, weights_only=False)):
        assert type(twin) is BatchNormActMaxPool2d
        assert twin.stride == (2, 1) and twin.act == "relu"


@pytest.mark.parametrize("act", ["relu", None])
def test_conversions_never_drop_the_pooling(act):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormActMaxPool2d(4, act=act), nn.ReLU())
    with pytest.raises(RuntimeError, match=r"drop its.* pooling"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(TypeError, match="BatchNormActMaxPool2d"):
        fusedres.convert_sync_batchnorm(model)


def test_a_fused_model_keeps_the_module(monkeypatch):
    monkeypatch.setenv("FUSEDRES_BACKEND", "auto")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormActMaxPool2d(4, act=None), nn.ReLU())
    x = torch.randn(2, 3, 9, 9)
    expected = copy.deepcopy(model)(x)
    fused = fusedres.fuse(model)
    assert type(fused[1]) is BatchNormActMaxPool2d
    torch.testing.assert_close(fused(x), expected)
