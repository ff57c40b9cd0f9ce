"""batch_norm_act_conv2d against the oracle, and what it keeps for its backward."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.instruments.saved import Saved, peak_bytes, saved_for_backward
from fusedres import functional, reference
from fusedres.functional import batch_norm_act, batch_norm_act_conv2d
from fusedres.ops import batch_norm_conv
from tests.functional.convolutions import ONE_LAUNCH, TWO_LAUNCHES, check, conv_inputs, cotangent, mapped, run
from tests.oracle import assert_as_good_as_eager, layout, to_double
from tests.parameters import BOTH, DTYPES, both_layouts, both_modes, covering

pytestmark = pytest.mark.usefixtures("triton_backend")

LEAVES = ("input", "weight", "bias", "conv_weight", "conv_bias")
TILINGS = {"one launch": ONE_LAUNCH, "two launches": TWO_LAUNCHES}
both_shapes = pytest.mark.parametrize("shape", TILINGS.values(), ids=TILINGS)


CONVOLUTIONS = [
    ((1, 1), {"stride": 2}),
    ((3, 3), {"padding": (1, 0), "stride": (1, 2), "groups": 2}),
    ((3, 2), {"padding": 2, "dilation": (2, 1), "groups": 8, "act": None}),
]


@pytest.mark.floor
@covering(training=BOTH, channels_last=BOTH, dtype=DTYPES, convolution=CONVOLUTIONS)
def test_oracle(device, training, channels_last, dtype, convolution):
    kernel, options = convolution
    groups = options.get("groups", 1)
    given = conv_inputs(ONE_LAUNCH, dtype, training, kernel=kernel, groups=groups, out=16)
    check(given, device, training, channels_last, **options)


@covering(
    training=BOTH,
    channels_last=BOTH,
    shape=[TWO_LAUNCHES, (5, 3, 1, 1), (1, 67, 5, 3), (4, 1, 6, 6), (2, 24, 14, 14)],
)
def test_shapes(device, training, channels_last, shape):
    """Two launches, one pixel, odd channels, one channel, and channels that are divisible by 8 only."""
    check(conv_inputs(shape, torch.bfloat16, training), device, training, channels_last, padding=1)


@pytest.mark.parametrize(
    "absent",
    [("weight", "bias"), ("bias",), ("conv_bias",), ("running_mean", "running_var", "num_batches_tracked")],
    ids="+".join,
)
@pytest.mark.parametrize("momentum", [None, 0.3])
def test_absent_tensors(device, absent, momentum):
    given = {name: t for name, t in conv_inputs(ONE_LAUNCH, torch.float32).items() if name not in absent}
    given = {"running_mean": None, "running_var": None} | given if "running_mean" in absent else given
    given = {name: None if t is None else t.to(device) for name, t in given.items()}
    ours, eager = (
        module.batch_norm_act_conv2d(**given, training=True, momentum=momentum) for module in (functional, reference)
    )
    torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(3, 3), (4, 3), (2, 5)], ids=str)
@both_modes
def test_padding_by_name(device, training, kernel, padding):
    given = conv_inputs(ONE_LAUNCH, torch.float32, training, kernel=kernel)
    actual = check(given, device, training, True, padding=padding, dilation=1)
    assert padding == "valid" or actual["out"].shape[2:] == given["input"].shape[2:]


@pytest.fixture
def convolved(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """What convolutions read, forward and backward; ``None`` where a backward did not make it again."""
    read: list[Tensor | None] = []
    forward, backward = batch_norm_conv._convolve, batch_norm_conv._convolution_gradients

    def convolve(y: Tensor, *args: object) -> Tensor:
        read.append(y.clone())
        return forward(y, *args)

    def differentiate(grad: Tensor, x: Tensor, y: Tensor | None, *args: object) -> object:
        read.append(None if y is None else y.clone())
        return backward(grad, x, y, *args)

    monkeypatch.setattr(batch_norm_conv, "_convolve", convolve)
    monkeypatch.setattr(batch_norm_conv, "_convolution_gradients", differentiate)
    return read


@covering(training=BOTH, channels_last=BOTH, dtype=DTYPES, shape=TILINGS)
def test_made_again_bit_for_bit(device, convolved, training, channels_last, dtype, shape):
    given = mapped(layout(device, channels_last), conv_inputs(shape, dtype, training))
    run(functional, given, training)
    first, again = convolved
    buffers = (given["running_mean"].clone(), given["running_var"].clone())
    y = batch_norm_act(given["input"], *buffers, given["weight"], given["bias"], training, act="relu")
    assert torch.equal(first, y) and torch.equal(again, y)
    assert again.stride() == first.stride() == y.stride()


@pytest.mark.gpu  # the interpreter runs one program after the other
@both_shapes
@both_layouts
def test_deterministic(device, channels_last, shape):
    given = mapped(layout(device, channels_last), conv_inputs(shape, torch.bfloat16))
    first, second = (run(functional, given, True) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("needed", LEAVES)
@both_modes
def test_partial_gradients(device, convolved, training, needed):
    """One alone has the gradient that it has among all; what needs none gets none and costs nothing."""
    given = mapped(lambda t: t.to(device), conv_inputs(ONE_LAUNCH, torch.float32, training))
    everything = run(functional, given, training, padding=1)
    convolved.clear()
    leaves = {name: t.clone().requires_grad_(name == needed) for name, t in given.items()}
    out = batch_norm_act_conv2d(**leaves, training=training, padding=1)
    out.backward(cotangent(out))
    assert [name for name in LEAVES if leaves[name].grad is not None] == [needed]
    torch.testing.assert_close(leaves[needed].grad, everything[f"grad_{needed}"])
    assert [y is not None for y in convolved[1:]] == ([] if needed == "conv_bias" else [needed == "conv_weight"])


@both_modes
@pytest.mark.parametrize("frozen", [set(), {"conv_weight"}, {"input", "weight", "bias"}, set(LEAVES) - {"conv_bias"}])
def test_saved_for_backward(device, training, frozen):
    """The input, the statistics and the convolution's weight, by autograd's account and by the allocator's."""
    given = mapped(lambda t: t.to(device), conv_inputs((2, 64, 4, 4), torch.bfloat16, training, out=8))
    leaves = {name: t.requires_grad_(name in LEAVES and name not in frozen) for name, t in given.items()}

    def forward() -> Tensor:
        copies = {name: leaves[name].clone() for name in ("input", "conv_weight")}  # nobody else keeps them
        return batch_norm_act_conv2d(**(leaves | copies), training=training, padding=1)

    forward()
    saved = saved_for_backward(forward, list(given.values()))
    needed = [given["input"].nbytes, 4 * 4 * 64, given["conv_weight"].nbytes] if len(frozen) < 4 else []
    assert all(size % 512 == 0 for size in needed)  # the allocator of a GPU adds nothing
    assert saved == Saved(sum(needed), sum(needed))


def test_made_again_is_gone_before_the_input_has_a_gradient(device, monkeypatch):
    seen: list[weakref.ref[Tensor]] = []
    differentiate, allocate = batch_norm_conv._convolution_gradients, batch_norm_conv.gradients

    def note(grad: Tensor, x: Tensor, y: Tensor, *args: object) -> object:
        seen.append(weakref.ref(y))
        return differentiate(grad, x, y, *args)

    def check_and_allocate(*args: object) -> object:
        assert seen[-1]() is None
        return allocate(*args)

    monkeypatch.setattr(batch_norm_conv, "_convolution_gradients", note)
    monkeypatch.setattr(batch_norm_conv, "gradients", check_and_allocate)
    run(functional, mapped(lambda t: t.to(device), conv_inputs(ONE_LAUNCH, torch.float32)), True)
    assert len(seen) == 1


@pytest.mark.gpu
def test_peak_of_a_step():
    """Making the activation again costs no more at its worst than keeping it: it is gone when dx comes."""
    device = torch.device("cuda")
    x = torch.randn(32, 64, 56, 56, device=device).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    conv_weight = torch.randn(64, 64, 1, 1, device=device, dtype=torch.bfloat16).requires_grad_()
    x.requires_grad_()

    def kept(conv_weight: Tensor) -> Tensor:
        return F.conv2d(batch_norm_act(x, None, None, training=True, act="relu"), conv_weight)

    def again(conv_weight: Tensor) -> Tensor:
        return batch_norm_act_conv2d(x, None, None, training=True, conv_weight=conv_weight)

    peaks = []
    for function in (kept, again):

        def step() -> None:
            out = function(conv_weight)  # noqa: B023
            torch.autograd.grad(out, (x, conv_weight), torch.randn_like(out))

        step()  # makes the libraries' workspaces
        peaks.append(peak_bytes(step, device))
    assert peaks[1] <= 1.02 * peaks[0]


@both_modes
def test_strided_activations(device, training):
    """Slices, an expanded gradient and formats that differ between input and weight: right, with eager's strides."""
    given = conv_inputs((4, 8, 9, 14), torch.float32, training)
    wide = torch.randn(4, 16, 10, 28)
    wide[:, ::2, 1:, ::2] = given["input"]
    for name, x in (
        ("sliced", wide[:, ::2, 1:, ::2]),
        ("channels-last", given["input"].to(memory_format=torch.channels_last)),
    ):
        results = []
        for function in (batch_norm_act_conv2d, reference.batch_norm_act_conv2d):
            leaves = {n: t.detach().clone().to(device).requires_grad_(n in LEAVES) for n, t in given.items()}
            leaves["input"] = x.to(device).detach().requires_grad_()
            out = function(**leaves, training=training, padding=1)
            out.mean().backward()
            results.append([out, *(leaves[leaf].grad for leaf in LEAVES)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, msg=name)
            assert got.stride() == want.stride(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@both_modes
def test_autocast(device, training, dtype):
    """Eager's dtypes, and errors by the rule: BatchNorm in its input's dtype, the convolution in autocast's."""
    given = conv_inputs(ONE_LAUNCH, torch.bfloat16, training)
    given["input"] = given["input"].to(dtype)
    for name in ("conv_weight", "conv_bias"):
        given[name] = given[name].float()
    exact = run(reference, mapped(to_double, given), training, padding=1)
    with torch.autocast(device.type, torch.bfloat16):
        actual, eager = (
            run(m, mapped(lambda t: t.to(device), given), training, padding=1) for m in (functional, reference)
        )
    assert actual["out"].dtype == torch.bfloat16 and actual["grad_conv_weight"].dtype == torch.float32
    slack = {name: t.to(torch.bfloat16) for name, t in actual.items() if t.is_floating_point()}
    assert {name: t.dtype for name, t in actual.items()} == {name: t.dtype for name, t in eager.items()}
    theirs = {name: eager[name].to(torch.bfloat16) for name in slack}
    assert_as_good_as_eager(slack, [theirs], {name: exact[name] for name in slack})


def test_underflow_in_autocast_has_a_gradient(device):
    """What is positive in the dtype of the BatchNorm, and zero in the convolution's: open, as in eager."""
    given = mapped(lambda t: t.to(device), conv_inputs(ONE_LAUNCH, torch.float32))
    given["weight"].zero_()
    given["bias"].fill_(1e-9)
    with torch.autocast(device.type, torch.float16):
        ours, eager = (run(module, given, True)["grad_bias"] for module in (functional, reference))
    assert ours.all()
    torch.testing.assert_close(ours, eager, rtol=1e-2, atol=1e-2)


@both_modes
def test_float64_takes_the_reference(device, monkeypatch, training):
    """Which is eager, exactly."""
    given = mapped(to_double, mapped(lambda t: t.to(device), conv_inputs(ONE_LAUNCH, torch.float32, training)))
    with pytest.raises(RuntimeError, match=r"no kernel for torch\.float64"):
        run(functional, given, training)
    monkeypatch.setenv("FUSEDRES_BACKEND", "auto")

    class Eager:
        @staticmethod
        def batch_norm_act_conv2d(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            conv_weight,
            conv_bias,
            num_batches_tracked,
            **options,
        ):
            if training:
                num_batches_tracked += 1
            y = F.relu(F.batch_norm(input, running_mean, running_var, weight, bias, training))
            return F.conv2d(y, conv_weight, conv_bias, **options)

    actual, eager = (run(m, given, training, stride=2, padding=(1, 0)) for m in (functional, Eager))
    for name, tensor in actual.items():
        assert torch.equal(tensor, eager[name]), name


@both_modes
def test_empty_batch(device, monkeypatch, training):
    given = mapped(lambda t: t.to(device), conv_inputs(ONE_LAUNCH, torch.float32, training))
    given["input"] = given["input"][:0]
    actual, eager = (run(module, given, training, padding=1) for module in (functional, reference))
    for name, tensor in actual.items():
        assert torch.equal(tensor, eager[name]), name
