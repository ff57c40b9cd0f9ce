"""What PyTorch sees of batch_norm_act_conv2d: schemas, fakes, autograd, compilers and modes; and its errors."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusedres import functional
from fusedres.functional import batch_norm_act_conv2d
from tests.functional.convolutions import ONE_LAUNCH, conv_inputs, mapped, run
from tests.oracle import layout
from tests.parameters import BOTH, both_modes, compiled_modes, covering

pytestmark = pytest.mark.usefixtures("triton_backend")
LEAVES = ("input", "weight", "bias", "conv_weight", "conv_bias")
GEOMETRY = ([1, 2], [1, 0], [1, 1], 2)  # stride, padding, dilation, groups


def leaves(device: torch.device, training: bool = True, *, grad: bool = True, groups: int = 1) -> dict[str, Tensor]:
    given = mapped(lambda t: t.to(device), conv_inputs(ONE_LAUNCH, torch.float32, training, groups=groups))
    return {name: t.requires_grad_(grad and name in LEAVES) for name, t in given.items()}


@pytest.mark.parametrize("grad", [True, False])
@both_modes
def test_opcheck(device, training, grad):
    t = leaves(device, training, grad=grad, groups=2)
    t["input"] = t["input"].detach().contiguous(memory_format=torch.channels_last).requires_grad_(grad)
    given = [t[name] for name in ("input", "conv_weight", "conv_bias", "weight", "bias", "running_mean", "running_var")]
    if training:
        operator, rest = torch.ops.fusedres.batch_norm_act_conv2d.default, (t["num_batches_tracked"], 0.1)
    else:
        operator, rest = torch.ops.fusedres.batch_norm_act_conv2d_inference.default, ()
    torch.library.opcheck(operator, (*given, *rest, 1e-5, "relu", *GEOMETRY, grad))


@covering(
    channels_last=BOTH,
    frozen=BOTH,
    sum_used=BOTH,
    dtype=[torch.float32, None],
    needs_conv=[[True, True], [False, True], [True, False]],
)
def test_opcheck_backward(device, channels_last, frozen, sum_used, dtype, needs_conv):
    x = layout(device, channels_last)(torch.randn(ONE_LAUNCH))
    conv_weight = torch.randn(6, 4, 3, 3, device=device)
    grad = torch.randn(3, 6, 7, 2, device=device)
    torch.library.opcheck(
        torch.ops.fusedres.batch_norm_act_conv2d_backward.default,
        (grad, torch.randn_like(x) if sum_used else None, x, torch.rand(4, 8, device=device), conv_weight, "relu",
         frozen, *GEOMETRY, dtype, dtype, None, needs_conv),
    )  # fmt: skip


class Block(nn.Module):
    """Two pre-activated convolutions in a row; the second with 8 channels.

    With 2 to 5, a stride of 2 and AVX2 alone, oneDNN's weight gradient of it in channels-last writes out of bounds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(8, momentum=momentum) for momentum in (None, 0.1))
        self.convs = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 6, 1, stride=2, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=True):
            assert isinstance(norm, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d)
            x = batch_norm_act_conv2d(
                x, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training, norm.momentum,
                conv_weight=conv.weight, conv_bias=conv.bias, stride=conv.stride, padding=conv.padding,
                num_batches_tracked=norm.num_batches_tracked,
            )  # fmt: skip
        return x


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@compiled_modes
def test_compiled(device, training, backend, memory_format):
    """fullgraph, running statistics included, and no recompilation from step to step."""
    torch._dynamo.reset()
    block = Block().to(device, memory_format=memory_format).train(training)
    twin = copy.deepcopy(block)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    for _ in range(2):
        x = torch.randn(2, 8, 6, 6, device=device).contiguous(memory_format=memory_format)
        pair = [x.clone().requires_grad_() for _ in range(2)]
        outs = [run(leaf) for run, leaf in zip((block, compiled), pair, strict=True)]
        grad = torch.randn_like(outs[0])
        for out in outs:
            out.backward(grad)
        assert outs[1].stride() == outs[0].stride() and pair[1].grad.stride() == pair[0].grad.stride()
        torch.testing.assert_close(outs[1], outs[0])
        torch.testing.assert_close(pair[1].grad, pair[0].grad)
    assert counter.frame_count == 1
    for (name, mine), theirs in zip(twin.named_parameters(), block.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6, msg=name)
    for (name, mine), theirs in zip(twin.named_buffers(), block.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)


def test_compiled_dynamic_batch_under_autocast(device):
    """Also a batch that turns out to be empty."""
    torch._dynamo.reset()
    block = Block().to(device)
    twin = copy.deepcopy(block)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for batch in (2, 5, 3):
        x = torch.randn(batch, 8, 6, 9, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            out, expected = compiled(x), block(x)
        assert out.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(out, expected)
        grad = torch.randn_like(out)
        out.backward(grad)
        expected.backward(grad)
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1
    for (name, mine), theirs in zip(twin.named_parameters(), block.parameters(), strict=True):
        assert mine.grad.dtype == torch.float32
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


def test_compiled_batch_of_unknown_size(device):
    """How many samples there are is in the data; none, too."""
    torch._dynamo.reset()
    block = Block().to(device)

    def picked(x: Tensor, keep: Tensor) -> Tensor:
        return block(x[keep])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(picked, fullgraph=True, backend="aot_eager")
        for count in (4, 2, 0):
            x = torch.randn(4, 8, 6, 6, device=device, requires_grad=True)
            keep = torch.arange(4, device=device) < count
            out = compiled(x, keep)
            assert out.shape == (count, 6, 3, 3)
            (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
            assert gradient.isfinite().all() and not gradient[count:].any()


def test_export(device):
    block = Block().to(device).eval()
    x = torch.randn(2, 8, 6, 6, device=device)
    exported = torch.export.export(block, (x,))
    torch.testing.assert_close(exported.module()(x), block(x))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(device, use_reentrant):
    """The same gradients; the statistics move twice, as with PyTorch's own BatchNorm."""
    given = mapped(lambda t: t.to(device), conv_inputs(ONE_LAUNCH, torch.float32))
    expected = run(functional, given, True, padding=1)

    class Checkpointed:
        @staticmethod
        def batch_norm_act_conv2d(**arguments: object) -> Tensor:
            def call(x: Tensor) -> Tensor:
                return batch_norm_act_conv2d(**(arguments | {"input": x}))

            return checkpoint(call, arguments["input"], use_reentrant=use_reentrant)

    actual = run(Checkpointed, given, True, padding=1)
    for name in ("out", *(f"grad_{leaf}" for leaf in LEAVES)):
        assert torch.equal(actual[name], expected[name]), name
    assert actual["num_batches_tracked"] == given["num_batches_tracked"] + 2


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@both_modes
def test_without_gradients(device, context, training):
    given = mapped(lambda t: t.to(device), conv_inputs(ONE_LAUNCH, torch.float32, training))
    expected = run(functional, given, training)
    with context():
        copies = mapped(torch.clone, given)
        out = batch_norm_act_conv2d(**copies, training=training)
    assert not out.requires_grad
    assert torch.equal(out, expected["out"])
    assert torch.equal(copies["running_var"], expected["running_var"])


@pytest.mark.parametrize("training", [True, False])
def test_version_counters(device, training):
    t = leaves(device, training, grad=False)
    before = [t[name]._version for name in ("running_mean", "running_var", "num_batches_tracked")]
    batch_norm_act_conv2d(**t, training=training)
    after = [t[name]._version for name in ("running_mean", "running_var", "num_batches_tracked")]
    assert after == [version + training for version in before]


@pytest.mark.parametrize("changed", ["input", "conv_weight"])
def test_changes_before_the_backward_are_noticed(device, changed):
    t = leaves(device)
    out = batch_norm_act_conv2d(**t, training=True)
    with torch.no_grad():
        t[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_double_backward_is_refused(device):
    t = leaves(device)
    out = batch_norm_act_conv2d(**t, training=True)
    for name in LEAVES:
        with pytest.raises(NotImplementedError, match="double backward"):
            torch.autograd.grad(out, t[name], torch.randn_like(out), create_graph=True, retain_graph=True)


def test_func_transforms_take_the_reference(device, monkeypatch):
    t = leaves(device, grad=False)
    t = {name: tensor for name, tensor in t.items() if not name.startswith(("running", "num"))}

    def loss(conv_weight: Tensor) -> Tensor:
        given = t | {"conv_weight": conv_weight}
        return batch_norm_act_conv2d(**given, running_mean=None, running_var=None, training=True).square().sum()

    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(loss)(t["conv_weight"])
    monkeypatch.setenv("FUSEDRES_BACKEND", "auto")
    leaf = t["conv_weight"].clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(t["conv_weight"]), leaf.grad)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"conv_weight": torch.ones(6, 8, 3, 3, dtype=torch.bfloat16)}, RuntimeError),
        ({"conv_bias": torch.ones(6, dtype=torch.float16)}, RuntimeError),
        ({"conv_bias": torch.ones(5)}, RuntimeError),
        ({"conv_weight": torch.ones(6, 4, 3, 3)}, RuntimeError),
        ({"conv_weight": torch.ones(6, 8, 9, 3)}, RuntimeError),
        ({"conv_weight": torch.ones(6, 8, 3)}, RuntimeError),
        ({"groups": 3}, RuntimeError),
        ({"groups": 0}, RuntimeError),
        ({"stride": 0}, RuntimeError),
        ({"stride": (1, 1, 1)}, RuntimeError),
        ({"padding": -1}, RuntimeError),
        ({"padding": "same", "stride": 2}, RuntimeError),
        ({"padding": "nonsense"}, RuntimeError),
        ({"dilation": (1, 0)}, RuntimeError),
        ({"input": torch.ones(8, 7, 5)}, ValueError),
        ({"act": "gelu"}, ValueError),
        ({"weight": torch.ones(3)}, ValueError),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_errors(monkeypatch, backend, changes, error):
    """Eager's own words for the convolution; nothing has been updated."""
    monkeypatch.setenv("FUSEDRES_BACKEND", backend)
    given = conv_inputs(ONE_LAUNCH, torch.float32)
    before = mapped(torch.clone, given)
    with pytest.raises(error) as raised:
        batch_norm_act_conv2d(**(given | {"training": True} | changes))
    for name, tensor in before.items():
        assert torch.equal(given[name], tensor), name
    if error is RuntimeError:
        options = {"conv_weight": given["conv_weight"], "conv_bias": given["conv_bias"]} | changes
        weight, bias = options.pop("conv_weight"), options.pop("conv_bias")
        with pytest.raises(RuntimeError) as eager:
            F.conv2d(given["input"], weight, bias, **options)
        assert str(raised.value) == str(eager.value)
