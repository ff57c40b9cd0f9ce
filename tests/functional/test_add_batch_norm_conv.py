"""add_batch_norm_act_conv2d: the sum that is handed on, and the convolution of its normalisation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.instruments.saved import Saved, saved_for_backward
from fusedres import functional, reference
from fusedres.functional import add_batch_norm_act, add_batch_norm_act_conv2d
from fusedres.ops import batch_norm_conv
from tests.functional.convolutions import (
    LEAVES,
    ONE_LAUNCH,
    TWO_LAUNCHES,
    check,
    conv_inputs,
    cotangent,
    mapped,
    run,
)
from tests.oracle import Tensors, layout, to_double
from tests.parameters import BOTH, both_modes, compiled_modes, covering

pytestmark = pytest.mark.usefixtures("triton_backend")
PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
]
GEOMETRY = ([1, 2], [1, 0], [1, 1], 2)  # stride, padding, dilation, groups
TILINGS = {"one launch": ONE_LAUNCH, "two launches": TWO_LAUNCHES}


def inputs(device: torch.device, training: bool = True, dtype: torch.dtype = torch.float32, **options) -> Tensors:
    return mapped(lambda t: t.to(device), conv_inputs(ONE_LAUNCH, dtype, training, residual=dtype, **options))


@pytest.mark.floor
@covering(training=BOTH, channels_last=BOTH, dtypes=PAIRS)
def test_oracle(device, training, channels_last, dtypes):
    dtype, residual = dtypes
    given = conv_inputs(ONE_LAUNCH, dtype, training, residual=residual, groups=2)
    check(given, device, training, channels_last, padding=(1, 0), stride=(1, 2), groups=2)


@both_modes
def test_two_launches(device, training):
    check(conv_inputs(TWO_LAUNCHES, torch.bfloat16, training, residual=torch.bfloat16), device, training, True)


@both_modes
def test_even_kernel(device, training):
    given = conv_inputs(ONE_LAUNCH, torch.float32, training, residual=torch.float32, kernel=(2, 3))
    check(given, device, training, True, padding="same")


@covering(training=BOTH, channels_last=BOTH, dtypes=PAIRS, shape=TILINGS)
def test_made_again_bit_for_bit(device, monkeypatch, training, channels_last, dtypes, shape):
    read: list[Tensor] = []
    differentiate = batch_norm_conv._convolution_gradients
    monkeypatch.setattr(
        batch_norm_conv, "_convolution_gradients", lambda *args: read.append(args[2].clone()) or differentiate(*args)
    )
    given = conv_inputs(shape, dtypes[0], training, residual=dtypes[1])
    given = mapped(layout(device, channels_last), given)
    total = run(functional, given, training)["sum"]
    buffers = (given["running_mean"].clone(), given["running_var"].clone())
    activations = (given["input"], given["residual"])
    s, y = add_batch_norm_act(*activations, *buffers, given["weight"], given["bias"], training, act="relu")
    assert torch.equal(total, s) and torch.equal(read[0], y)


@pytest.mark.parametrize("used", [("sum",), ("out",), ("sum", "out")], ids="+".join)
@pytest.mark.parametrize("needed", [*({leaf} for leaf in LEAVES), set(LEAVES)], ids=lambda s: "+".join(sorted(s)))
def test_partial_gradients(device, needed, used):
    """What needs no gradient gets none; the rest is eager's, whichever outputs are used."""
    given = inputs(device)
    results = []
    for module in (functional, reference):
        leaves = {name: t.clone().requires_grad_(name in needed) for name, t in given.items()}
        outputs = dict(
            zip(("sum", "out"), module.add_batch_norm_act_conv2d(**leaves, training=True, padding=1), strict=True)
        )
        assert outputs["sum"].requires_grad == bool(needed & {"input", "residual"})
        differentiated = [outputs[name] for name in used if outputs[name].requires_grad]
        if differentiated:
            torch.autograd.backward(differentiated, [cotangent(t) for t in differentiated])
        results.append({name: leaves[name].grad for name in LEAVES})
    for name in LEAVES:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-5, msg=name)


@both_modes
@pytest.mark.parametrize("frozen", [set(), {"input", "residual", "weight", "bias"}, set(LEAVES) - {"conv_bias"}])
def test_saved_for_backward(device, training, frozen):
    """The sum, which is an output, the statistics and the convolution's weight."""
    given = conv_inputs((2, 64, 4, 4), torch.bfloat16, training, out=8, residual=torch.bfloat16)
    given = mapped(lambda t: t.to(device), given)
    leaves = {name: t.requires_grad_(name in LEAVES and name not in frozen) for name, t in given.items()}

    def forward() -> Tensor:
        copies = {"conv_weight": leaves["conv_weight"].clone()}  # nobody else keeps it
        return add_batch_norm_act_conv2d(**(leaves | copies), training=training, padding=1)[1]

    forward()
    saved = saved_for_backward(forward, list(given.values()))
    needed = [given["input"].nbytes, 4 * 4 * 64, given["conv_weight"].nbytes] if len(frozen) < 5 else []
    assert saved == Saved(sum(needed), sum(needed))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_autocast(device, dtypes):
    """The dtypes that eager has, with gradients near its own."""
    given = conv_inputs(ONE_LAUNCH, dtypes[0], residual=dtypes[1])
    given = mapped(lambda t: t.to(device), given)
    with torch.autocast(device.type, torch.bfloat16):
        actual, eager = (run(module, given, True, padding=1) for module in (functional, reference))
    for name, tensor in actual.items():
        assert tensor.dtype == eager[name].dtype, name
        torch.testing.assert_close(tensor, eager[name], rtol=0.05, atol=0.05, msg=name)
    assert actual["out"].dtype == torch.bfloat16 and actual["sum"].dtype == torch.float32


@both_modes
def test_float64_takes_the_reference(device, monkeypatch, training):
    given = mapped(to_double, inputs(device, training))
    monkeypatch.setenv("FUSEDRES_BACKEND", "auto")
    actual, eager = (run(module, given, training, padding=1) for module in (functional, reference))
    for name, tensor in actual.items():
        assert torch.equal(tensor, eager[name]), name


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@both_modes
def test_without_gradients(device, context, training):
    given = inputs(device, training)
    expected = run(functional, given, training)
    with context():
        copies = mapped(torch.clone, given)
        s, out = add_batch_norm_act_conv2d(**copies, training=training)
    assert not s.requires_grad and not out.requires_grad
    assert torch.equal(s, expected["sum"]) and torch.equal(out, expected["out"])
    assert torch.equal(copies["running_var"], expected["running_var"])


@both_modes
def test_empty_batch(device, training):
    given = {name: t[:0] if name in ("input", "residual") else t for name, t in inputs(device, training).items()}
    actual, eager = (run(module, given, training, padding=1) for module in (functional, reference))
    for name, tensor in actual.items():
        assert torch.equal(tensor, eager[name]), name


@pytest.mark.parametrize("grad", [True, False])
@both_modes
def test_opcheck(device, training, grad):
    t = {name: t.requires_grad_(grad and name in LEAVES) for name, t in inputs(device, training, groups=2).items()}
    tensors = ("input", "residual", "conv_weight", "conv_bias", "weight", "bias", "running_mean", "running_var")
    given = [t[name] for name in tensors]
    if training:
        operator, rest = torch.ops.fusedres.add_batch_norm_act_conv2d.default, (t["num_batches_tracked"], 0.1)
    else:
        operator, rest = torch.ops.fusedres.add_batch_norm_act_conv2d_inference.default, ()
    torch.library.opcheck(operator, (*given, *rest, 1e-5, "relu", *GEOMETRY, grad))


class Blocks(nn.Module):
    """Two joins, the second of what the first hands on."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=bias) for bias in (True, False))

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        for norm, conv in zip(self.norms, self.convs, strict=True):
            assert isinstance(norm, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d)
            residual, x = add_batch_norm_act_conv2d(
                x, residual, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training,
                conv_weight=conv.weight, conv_bias=conv.bias, padding=conv.padding,
                num_batches_tracked=norm.num_batches_tracked,
            )  # fmt: skip
        return residual, x


@compiled_modes
def test_compiled(device, training, backend):
    torch._dynamo.reset()
    blocks = Blocks().to(device).train(training)
    twin = copy.deepcopy(blocks)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    for _ in range(2):
        x, residual, *grads = torch.randn(4, 2, 4, 6, 6, device=device)
        pairs = [[t.clone().requires_grad_() for t in (x, residual)] for _ in range(2)]
        outs = [module(*pair) for module, pair in zip((blocks, compiled), pairs, strict=True)]
        for out in outs:
            torch.autograd.backward(out, grads)
        torch.testing.assert_close(outs[1], outs[0])
        for mine, theirs in zip(pairs[1], pairs[0], strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)
    assert counter.frame_count == 1
    for (name, mine), theirs in zip(twin.named_parameters(), blocks.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6, msg=name)
    for (name, mine), theirs in zip(twin.named_buffers(), blocks.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(device, use_reentrant):
    blocks = Blocks().to(device)
    twin = copy.deepcopy(blocks)
    x, residual, *grads = torch.randn(4, 2, 4, 6, 6, device=device)
    pairs = [[t.clone().requires_grad_() for t in (x, residual)] for _ in range(2)]
    torch.autograd.backward(blocks(*pairs[0]), grads)
    torch.autograd.backward(checkpoint(twin, *pairs[1], use_reentrant=use_reentrant), grads)
    for mine, theirs in zip([*pairs[1], *twin.parameters()], [*pairs[0], *blocks.parameters()], strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_double_backward_is_refused(device):
    given = {name: t.requires_grad_(name in LEAVES) for name, t in inputs(device).items()}
    outputs = add_batch_norm_act_conv2d(**given, training=True)
    for used in (outputs[:1], outputs[1:], outputs):
        with pytest.raises(NotImplementedError, match="double backward"):
            torch.autograd.grad(used, given["input"], [torch.randn_like(t) for t in used], create_graph=True,
                                retain_graph=True)  # fmt: skip


@both_modes
def test_version_counters(device, training):
    given, names = inputs(device, training), ("running_mean", "running_var", "num_batches_tracked")
    before = [given[name]._version for name in names]
    add_batch_norm_act_conv2d(**given, training=training)
    assert [given[name]._version for name in names] == [version + training for version in before]


@pytest.mark.parametrize(
    "changes",
    [
        {"conv_weight": torch.ones(6, 8, 3, 3, dtype=torch.bfloat16)},
        {"conv_weight": torch.ones(6, 4, 3, 3)},
        {"residual": torch.ones(3, 8, 7, 4)},
        {"residual": torch.ones(ONE_LAUNCH, dtype=torch.int64)},
        {"input": torch.ones(8, 7, 5), "residual": torch.ones(8, 7, 5)},
    ],
    ids="+".join,
)
def test_errors(changes):
    """Nothing has been updated; a convolution of the dtype of a term, and not of the sum, is refused as in eager."""
    given = conv_inputs(ONE_LAUNCH, torch.bfloat16, residual=torch.float32)
    before = mapped(torch.clone, given)
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        add_batch_norm_act_conv2d(**(given | {"training": True} | changes))
    for name, tensor in before.items():
        assert torch.equal(given[name], tensor), name
