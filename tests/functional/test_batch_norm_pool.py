"""batch_norm_act_max_pool2d: the oracle, and exactly PyTorch's choice among equal values, padding and NaN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import reference
from fusedres.functional import batch_norm_act, batch_norm_act_max_pool2d
from tests.oracle import (
    BOUNDARY,
    BatchNormInputs,
    Tensors,
    assert_as_good_as_eager,
    batch_norm_inputs,
    layout,
    run_batch_norm,
    to_double,
)
from tests.parameters import BOTH, DTYPES, both_layouts, both_modes, covering, has_statistics

pytestmark = pytest.mark.usefixtures("triton_backend")

STEM = {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1)}
# Kernel, stride, padding, and height and width of the input: overlapping, side by side, apart; larger than the input.
WINDOWS = [
    ((3, 3), (2, 2), (1, 1), (9, 7)),
    ((2, 2), (2, 2), (0, 0), (8, 6)),
    ((2, 2), (2, 2), (1, 1), (4, 7)),
    ((3, 3), (1, 1), (1, 1), (5, 6)),
    ((5, 5), (3, 3), (2, 2), (11, 8)),
    ((3, 2), (2, 1), (1, 0), (7, 5)),
    ((2, 1), (3, 2), (0, 0), (8, 7)),
    ((4, 5), (2, 3), (2, 1), (3, 4)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((1, 1), (1, 1), (0, 0), (3, 2)),
    ((6, 7), (2, 1), (3, 3), (9, 8)),  # not unrolled
    ((15, 17), (7, 8), (7, 8), (5, 9)),  # the most elements
]


def named(window: tuple[tuple[int, int], ...]) -> str:
    return "-".join(f"{down}x{across}" for down, across in window)


def pooling(window: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    return dict(zip(STEM, window[:3], strict=True))


def without_residual(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda residual, **arguments: function(**arguments)


def undecided(inputs: BatchNormInputs, training: bool, act: str | None, window: dict[str, Any]) -> Tensor:
    """Where rounding decides on the maximum of a window: its two largest values, or with a ReLU the largest and 0, lie
    within ``BOUNDARY`` eps of what they are the sums of."""
    x = inputs.map(to_double)
    if training or x.running_mean is None or x.running_var is None:
        mean, var = x.input.mean((0, 2, 3)), x.input.var((0, 2, 3), correction=0)
    else:
        mean, var = x.running_mean, x.running_var
    scale = (1.0 if x.weight is None else x.weight) / (var + 1e-5).sqrt()
    shift = ((0.0 if x.bias is None else x.bias) - mean * scale).view(1, -1, 1, 1)
    scaled = x.input * scale.view(1, -1, 1, 1)
    slack = BOUNDARY * torch.finfo(inputs.input.dtype).eps * F.max_pool2d(scaled.abs() + shift.abs(), **window)
    (p_h, p_w), (k_h, k_w), (s_h, s_w) = window["padding"], window["kernel_size"], window["stride"]
    padded = F.pad(scaled + shift, (p_w, p_w, p_h, p_h), value=-torch.inf)
    values = padded.unfold(2, k_h, s_h).unfold(3, k_w, s_w).flatten(4)
    values = F.pad(values, (0, 1), value=0.0 if act else -torch.inf)
    first, second = values.topk(2).values.unbind(-1)
    return first - second <= 2 * slack


def check(
    inputs: BatchNormInputs,
    device: torch.device,
    *,
    channels_last: bool,
    training: bool,
    act: str | None,
    window: dict[str, Any] = STEM,
    decided: float = 0.1,
    **options: Any,
) -> Tensors:
    """The oracle rule for one call; ``decided`` is the least share of the outputs whose gradient is compared."""
    near = undecided(inputs, training, act, window)
    assert (~near).double().mean() >= decided
    inputs = replace(inputs, grad=torch.randn(near.shape).masked_fill(near, 0).to(inputs.input.dtype))
    options |= window

    def run(function: Callable[..., Tensor], convert: Callable[[Tensor], Tensor]) -> Tensors:
        return run_batch_norm(without_residual(function), inputs.map(convert), training, act, **options)

    actual = run(batch_norm_act_max_pool2d, layout(device, channels_last))
    eagers = [run(reference.batch_norm_act_max_pool2d, layout(device, last)) for last in (True, False)]
    assert_as_good_as_eager(actual, eagers, run(reference.batch_norm_act_max_pool2d, to_double))
    for name in ("out", "grad_input"):
        assert actual[name].stride() == eagers[0 if channels_last else 1][name].stride(), name
    return actual


@pytest.mark.floor
@covering(training=BOTH, channels_last=BOTH, dtype=DTYPES, act=["relu", None])
def test_oracle(device, training, channels_last, dtype, act):
    inputs = batch_norm_inputs((2, 6, 9, 7), dtype)
    check(inputs, device, channels_last=channels_last, training=training, act=act)


@pytest.mark.parametrize("window", WINDOWS[:-1], ids=named)
@both_layouts
def test_windows(device, channels_last, window):
    size = window[3]
    inputs = batch_norm_inputs((5 if max(size) < 4 else 2, 5, *size), torch.float32)
    check(inputs, device, channels_last=channels_last, training=True, act="relu", window=pooling(window))


@pytest.mark.parametrize("shape", [(1, 35, 6, 5), (3, 40, 5, 9), (2, 8, 33, 30)], ids=str)
@both_layouts
def test_shapes(device, channels_last, shape):
    """Odd channels, several channel tiles, several tiles and programs of one."""
    inputs = batch_norm_inputs(shape, torch.bfloat16)
    check(inputs, device, channels_last=channels_last, training=True, act="relu")


OPTIONS = [
    {"affine": False},
    {"bias": False},
    {"tracking": False},
    {"parameter_dtype": torch.bfloat16},
    {"mean": 800.0, "std": 8.0},
]


@covering(has_statistics, training=BOTH, options=OPTIONS)
def test_parameters(device, training, options):
    inputs = batch_norm_inputs((3, 6, 9, 8), torch.bfloat16, **options)
    decided = 0.0 if "mean" in options else 0.1  # bfloat16 leaves steps of 4: most windows have equal values
    check(inputs, device, channels_last=True, training=training, act="relu", decided=decided)


@both_layouts
@both_modes
def test_large_mean(device, training, channels_last):
    """Statistics of the batch at a mean of 1e3 are test_batch_norm_act's."""
    inputs = batch_norm_inputs((4, 6, 9, 8), torch.float32, mean=1e2 if training else 1e3, std=1.0)
    check(inputs, device, channels_last=channels_last, training=training, act=None)


@pytest.mark.parametrize("momentum", [None, 0.0, 0.3])
def test_momentum(device, momentum):
    inputs = batch_norm_inputs((3, 6, 5, 5), torch.float32)
    actual = check(inputs, device, channels_last=True, training=True, act="relu", momentum=momentum)
    assert actual["num_batches_tracked"].item() == 4


def pool(x: Tensor, act: str | None, window: dict[str, Any], weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Ours, with statistics and parameters that leave x as it is, and the winners."""
    channels = x.shape[1]
    mean, var = torch.zeros(channels, device=x.device), torch.ones(channels, device=x.device)
    out, _, _, winner = torch.ops.fusedres.batch_norm_act_max_pool2d_inference(
        x, weight, bias, mean, var, 0.0, act, *window.values(), False, True
    )
    return out, winner


def places(winner: Tensor, size: torch.Size, window: dict[str, Any]) -> Tensor:
    """PyTorch's indices, row · W + column, from the places in the windows."""
    (_, k_w), (s_h, s_w), (p_h, p_w) = window.values()
    rows = torch.arange(winner.shape[2], device=winner.device).view(-1, 1) * s_h - p_h
    columns = torch.arange(winner.shape[3], device=winner.device) * s_w - p_w
    return (rows + winner.long() // k_w) * size[3] + columns + winner.long() % k_w


@covering(channels_last=BOTH, act=["relu", None], window={named(window): window for window in WINDOWS})
def test_ties_padding_and_nan(device, channels_last, window, act):
    """Small integers, so that most windows have several maxima: all as PyTorch's, values and gradients bit for bit.

    PyTorch's kernels for the CPU agree with each other, in either format: of equal values the first wins, of NaNs the
    last. Where a window is of -inf alone CUDA's channels-last kernel differs from them, which are followed here.
    """
    arguments = pooling(window)
    x = torch.randint(-2, 3, (2, 5, *window[3])).float()
    specials = ((), (-torch.inf, -torch.inf, torch.inf), (torch.nan,), (torch.nan,) * 9)
    for channel, values in enumerate(specials):
        for value in values:
            x[torch.randint(2, ()), channel].view(-1)[torch.randint(window[3][0] * window[3][1], ())] = value
    x[1, 4] = -torch.inf
    x = layout(torch.device("cpu"), channels_last)(x)
    before = x.requires_grad_().relu() if act else x.requires_grad_() * 1
    expected, indices = F.max_pool2d(before, **arguments, return_indices=True)
    cotangent = torch.randint(-3, 4, expected.shape).float()
    expected.backward(cotangent)

    ours = x.detach().to(device).requires_grad_()
    weight, bias = (torch.full((5,), value, device=device, requires_grad=True) for value in (1.0, 0.0))
    out, winner = pool(ours, act, arguments, weight, bias)
    out.backward(cotangent.to(device))
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ours.grad.cpu(), x.grad, rtol=0, atol=0, equal_nan=True)
    open_ = ~(expected <= 0) if act else torch.ones_like(expected, dtype=torch.bool)
    assert torch.equal(winner.cpu() == 255, ~open_)
    assert torch.equal(places(winner.cpu(), x.shape, arguments)[open_], indices[open_])
    torch.testing.assert_close(bias.grad.cpu(), (cotangent * open_).sum((0, 2, 3)), rtol=0, atol=0)


@covering(channels_last=BOTH, act=["relu", None], dtype=DTYPES)
def test_what_is_compared_has_been_rounded(device, channels_last, act, dtype):
    """Values that are equal after the cast are: bit for bit the pooling of what batch_norm_act writes."""
    inputs = batch_norm_inputs((2, 6, 9, 7), dtype, std=1e-2).map(layout(device, channels_last))
    state = (inputs.running_mean, inputs.running_var * 1e2, inputs.weight, inputs.bias)
    z = batch_norm_act(inputs.input, *state, act=act)
    expected, indices = F.max_pool2d(z, 3, 2, 1, return_indices=True)
    out, _, _, winner = torch.ops.fusedres.batch_norm_act_max_pool2d_inference(
        inputs.input, *state[2:], *state[:2], 1e-5, act, *STEM.values(), False, True
    )
    assert torch.equal(out, expected)
    open_ = expected > 0 if act else torch.ones_like(expected, dtype=torch.bool)
    assert torch.equal(places(winner, inputs.input.shape, STEM)[open_], indices[open_])
    if dtype != torch.float32:
        values = F.pad(z, (1, 1, 1, 1), value=-torch.inf).unfold(2, 3, 2).unfold(3, 3, 2).flatten(4)
        first, second = values.topk(2).values.unbind(-1)
        assert (first == second)[open_].any(), "no equal values"


def test_underflow_has_no_gradient(device):
    """A maximum that is positive before the cast and zero after it has gradient 0, as in eager."""
    x = torch.randn(2, 2, 5, 5, device=device).half().requires_grad_()
    weight, bias = torch.zeros(2, device=device), torch.full((2,), 1e-9, device=device, requires_grad=True)
    out = batch_norm_act_max_pool2d(x, None, None, weight, bias, training=True)
    out.backward(torch.randn_like(out))
    assert not out.any()
    assert not x.grad.any() and not bias.grad.any()


LEAVES = ("input", "weight", "bias")


@pytest.mark.parametrize("alone", LEAVES)
@both_modes
def test_partial_gradients(device, training, alone):
    """One alone has the gradient that it has among all, and what needs none gets none."""
    inputs = batch_norm_inputs((3, 6, 7, 6), torch.float32).map(lambda t: t.to(device))
    grad = torch.randn(3, 6, 4, 3, device=device)
    results = []
    for needed in (LEAVES, (alone,)):
        leaves = {name: getattr(inputs, name).clone().requires_grad_(name in needed) for name in LEAVES}
        state = (inputs.running_mean.clone(), inputs.running_var.clone())
        batch_norm_act_max_pool2d(leaves["input"], *state, leaves["weight"], leaves["bias"], training).backward(grad)
        results.append({name: leaf.grad for name, leaf in leaves.items()})
    assert [name for name, grad in results[1].items() if grad is not None] == [alone]
    assert torch.equal(results[1][alone], results[0][alone])


@both_modes
def test_strided(device, training):
    """Slices, columns as parameters, an expanded gradient: copied where needed, right always."""
    x = torch.randn(4, 16, 9, 14, device=device)[:, ::2, 1:, ::2]
    vectors = torch.rand(8, 8, device=device) + 0.5
    results = []
    for function, convert in (
        (batch_norm_act_max_pool2d, torch.clone),
        (reference.batch_norm_act_max_pool2d, to_double),
    ):
        columns = convert(vectors)
        leaf = (x if convert is torch.clone else x.double()).detach().requires_grad_()
        mean, var, weight, bias = (columns[:, 2 * place] for place in range(4))
        out = function(leaf, mean, var, weight, bias, training)
        out.mean().backward()
        results.append((out, leaf.grad, columns))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu  # the interpreter runs one program after the other
@both_layouts
def test_deterministic(device, channels_last):
    """Bit for bit the same from run to run."""
    inputs = batch_norm_inputs((2, 6, 33, 30), torch.bfloat16)
    inputs = replace(inputs, grad=torch.randn(2, 6, 17, 15).bfloat16()).map(layout(device, channels_last))
    function = without_residual(batch_norm_act_max_pool2d)
    first, second = (run_batch_norm(function, inputs, True, "relu") for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@both_modes
def test_empty_batch(device, training):
    x = torch.randn(0, 3, 4, 4, device=device, requires_grad=True)
    mean, var, count = torch.zeros(3, device=device), torch.ones(3, device=device), torch.tensor(0, device=device)
    out = batch_norm_act_max_pool2d(x, mean, var, training=training, num_batches_tracked=count)
    out.backward(torch.empty_like(out))
    assert out.shape == (0, 3, 2, 2)
    assert x.grad.shape == x.shape
    assert not mean.any() and count.item() == int(training)
