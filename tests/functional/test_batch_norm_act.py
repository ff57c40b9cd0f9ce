"""batch_norm_act against the oracle: shapes, dtypes, layouts, modes, and what the kernels promise beside."""

from __future__ import annotations

import itertools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fusedres.functional import batch_norm_act
from tests.oracle import (
    assert_as_good_as_eager,
    batch_norm_inputs,
    check_batch_norm,
    run_batch_norm,
    to_double,
)

pytestmark = [pytest.mark.floor, pytest.mark.usefixtures("triton_backend")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
both_layouts = pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
residual_or_not = pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])


@pytest.mark.parametrize("act", ["relu", None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@residual_or_not
@both_layouts
@both_modes
def test_oracle(device, training, channels_last, residual, dtype, act):
    inputs = batch_norm_inputs((3, 12, 7, 5), dtype, residual=residual)
    check_batch_norm(batch_norm_act, inputs, device, channels_last=channels_last, training=training, act=act)


@pytest.mark.parametrize(
    "shape",
    [
        (2, 1, 3, 3),  # one channel
        (5, 3, 1, 1),  # H·W = 1
        (1, 67, 5, 3),  # odd C, one image
        (2, 2048, 2, 1),
        (4, 24, 14, 14),  # C divisible by 8 only
        (9, 130, 17, 9),  # two launches, ragged in every direction
        (3, 5, 97, 61),
        (40, 64, 8, 8),
        (6, 10),  # (N, C)
        (4, 6, 11),  # (N, C, L)
        (2, 3, 4, 5, 2),  # (N, C, D, H, W)
    ],
    ids=str,
)
@residual_or_not
@both_layouts
@both_modes
def test_shapes(device, training, channels_last, residual, shape):
    if channels_last and len(shape) != 4:
        pytest.skip("channels_last is a format of four dimensions")
    inputs = batch_norm_inputs(shape, torch.bfloat16, residual=residual)
    check_batch_norm(batch_norm_act, inputs, device, channels_last=channels_last, training=training, act="relu")


@pytest.mark.parametrize("shape", [(4, 12, 6, 6), (6, 40, 17, 9)], ids=["one launch", "two launches"])
@pytest.mark.parametrize(
    "options",
    [
        {"affine": False},
        {"bias": False},
        {"tracking": False},
        {"affine": False, "tracking": False},
        {"parameter_dtype": torch.bfloat16},
        {"residual": True, "residual_dtype": torch.float32},
        {"residual": True, "residual_dtype": torch.float16},
    ],
    ids=str,
)
@both_modes
def test_parameters_and_dtypes(device, training, options, shape):
    if not training and options.get("tracking") is False:
        pytest.skip("evaluation needs running statistics")
    inputs = batch_norm_inputs(shape, torch.bfloat16, **options)
    check_batch_norm(batch_norm_act, inputs, device, channels_last=True, training=training, act="relu")


@both_layouts
def test_sixteen_bit_residual_of_float32_input(device, channels_last):
    """The gradient of the residual is rounded to its dtype, that of the input is not."""
    inputs = batch_norm_inputs((6, 40, 17, 9), torch.float32, residual=True, residual_dtype=torch.bfloat16)
    check_batch_norm(batch_norm_act, inputs, device, channels_last=channels_last, training=True, act="relu")


@pytest.mark.parametrize("shape", [(4, 12, 6, 6), (6, 40, 17, 9)], ids=["one launch", "two launches"])
@pytest.mark.parametrize("momentum", [None, 0.0, 0.3, 1.0])
def test_momentum(device, momentum, shape):
    inputs = batch_norm_inputs(shape, torch.float32)
    actual = check_batch_norm(
        batch_norm_act, inputs, device, channels_last=True, training=True, act=None, momentum=momentum
    )
    assert actual["num_batches_tracked"].item() == 4


@pytest.mark.parametrize("shape", [(4, 8, 9, 9), (6, 40, 17, 9)], ids=["one launch", "two launches"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@both_layouts
def test_large_mean(device, channels_last, dtype, shape):
    std = 1.0 if dtype == torch.float32 else 8.0  # in bfloat16 a mean of 1000 leaves steps of 4
    inputs = batch_norm_inputs(shape, dtype, mean=1e3 * std, std=std)
    check_batch_norm(batch_norm_act, inputs, device, channels_last=channels_last, training=True, act=None)


@pytest.mark.parametrize("first", [1.0, 20.0, 1e4])
@both_layouts
def test_untypical_first_value(device, channels_last, first):
    """Moments are taken of differences to a channel's first value, which helps only where it is like the others."""
    inputs = batch_norm_inputs((6, 16, 40, 40), torch.float32, mean=0.0, std=1.0)
    assert inputs.running_mean is not None
    inputs.running_mean.zero_()  # so that nothing hides the error of the mean, which is near 0
    inputs.input[0, :, 0, 0] = first
    check_batch_norm(batch_norm_act, inputs, device, channels_last=channels_last, training=True, act=None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@residual_or_not
def test_not_finite(device, residual, training, value):
    inputs = batch_norm_inputs((3, 4, 5, 5), torch.float32, residual=residual)
    inputs.input[1, 2, 3, 3] = value
    if residual:
        assert inputs.residual is not None
        inputs.residual[0, 1, 2, 2] = value

    def on(t: Tensor) -> Tensor:
        return t.to(device)

    actual = run_batch_norm(batch_norm_act, inputs.map(on), training, "relu")
    exact = run_batch_norm(torch_eager, inputs.map(to_double), training, "relu")
    for name in ("out", "grad_input"):
        assert torch.equal(actual[name].isnan().cpu(), exact[name].isnan()), name
    assert torch.equal(actual["out"].isposinf().cpu(), exact["out"].isposinf())
    # An infinity among the values of a channel leaves its moments undefined; eager's differ between devices.
    assert torch.equal(actual["running_mean"].isfinite().cpu(), exact["running_mean"].isfinite())


def torch_eager(*args, **kwargs) -> Tensor:
    from fusedres import reference

    return reference.batch_norm_act(*args, **kwargs)


@residual_or_not
@both_layouts
def test_exact_zeros_get_no_gradient(device, channels_last, residual):
    inputs = batch_norm_inputs((4, 6, 5, 5), torch.float32, residual=residual, affine=False)
    inputs.input[:, 2] = 0
    if inputs.residual is not None:
        inputs.residual[:, 2] = 0
    actual = check_batch_norm(batch_norm_act, inputs, device, channels_last=channels_last, training=True, act="relu")
    assert not actual["out"][:, 2].any()
    assert not actual["grad_input"][:, 2].any()


def test_underflow_has_no_gradient(device):
    """A value that is positive before the cast and zero after it has gradient 0, as in eager."""
    inputs = batch_norm_inputs((4, 2, 3, 3), torch.float16, residual=True)
    assert inputs.residual is not None and inputs.weight is not None and inputs.bias is not None
    inputs.weight.zero_()
    inputs.bias.fill_(1e-9)
    inputs.residual.zero_()
    actual = run_batch_norm(batch_norm_act, inputs.map(lambda t: t.to(device)), True, "relu")
    assert not actual["out"].any()
    assert not actual["grad_residual"].any()


@pytest.mark.parametrize(
    "frozen",
    [set(c) for n in range(1, 4) for c in itertools.combinations(["input", "residual", "weight", "bias"], n)],
    ids=lambda s: "+".join(sorted(s)),
)
@pytest.mark.parametrize("shape", [(4, 12, 6, 6), (6, 40, 17, 9)], ids=["one launch", "two launches"])
@both_modes
def test_partial_gradients(device, training, shape, frozen):
    """What needs no gradient gets none, and the rest does not change."""
    inputs = batch_norm_inputs(shape, torch.float32, residual=True).map(lambda t: t.to(device))
    everything = run_batch_norm(batch_norm_act, inputs, training, "relu")
    given = inputs.map(lambda t: t.clone())
    leaves = {name: getattr(given, name) for name in ("input", "residual", "weight", "bias")}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in frozen)
    out = batch_norm_act(
        given.input, given.running_mean, given.running_var, given.weight, given.bias, training,
        residual=given.residual, act="relu",
    )  # fmt: skip
    out.backward(given.grad)
    for name, leaf in leaves.items():
        if name in frozen:
            assert leaf.grad is None
        else:
            assert torch.equal(leaf.grad, everything[f"grad_{name}"]), name


@both_modes
@pytest.mark.parametrize("layouts", ["strided", "mixed formats"])
def test_strided_activations(device, training, layouts):
    """Slices, expanded gradients and mixed memory formats: copied where needed, right always."""
    x = torch.randn(4, 16, 9, 14, device=device)[:, ::2, 1:, ::2]
    r = torch.randn(4, 8, 8, 7, device=device).to(memory_format=torch.channels_last)
    if layouts == "mixed formats":
        x = x.contiguous()
    else:
        assert not x.is_contiguous()
    mean, var = torch.zeros(8, device=device), torch.ones(8, device=device)

    def run(function, *tensors):
        leaves = [t.detach().requires_grad_() for t in tensors[:2]]
        out = function(leaves[0], *tensors[2:], training=training, residual=leaves[1], act="relu")
        out.mean().backward()  # an expanded gradient
        return [out, *(leaf.grad for leaf in leaves)]

    actual = run(batch_norm_act, x, r, mean.clone(), var.clone())
    exact = run(torch_eager, *(t.double() for t in (x, r, mean, var)))
    for got, want in zip(actual, exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@both_modes
@pytest.mark.parametrize("shape", [(4, 12, 6, 6), (6, 40, 17, 9)], ids=["one launch", "two launches"])
def test_strided_vectors(device, training, shape):
    """Columns of a matrix as parameters and statistics: read and written where they are, and nowhere else."""
    inputs = batch_norm_inputs(shape, torch.float32, residual=True).map(lambda t: t.to(device))
    expected = run_batch_norm(batch_norm_act, inputs, training, "relu")
    columns = torch.full((shape[1], 8), 7.0, device=device)
    names = ("weight", "bias", "running_mean", "running_var")
    for column, name in enumerate(names):
        columns[:, 2 * column] = getattr(inputs, name)
    weight, bias, mean, var = (columns[:, 2 * column] for column in range(len(names)))
    out = batch_norm_act(inputs.input, mean, var, weight, bias, training, residual=inputs.residual, act="relu")
    assert torch.equal(out, expected["out"])
    assert torch.equal(mean, expected["running_mean"])
    assert torch.equal(var, expected["running_var"])
    assert columns[:, 1::2].eq(7).all()


def test_expanded_weight(device):
    x = torch.randn(4, 3, 5, 5, device=device)
    expanded = torch.full((1,), 2.0, device=device).expand(3)
    expected = batch_norm_act(x, None, None, expanded.clone(), training=True)
    assert torch.equal(batch_norm_act(x, None, None, expanded, training=True), expected)


@pytest.mark.parametrize("shape", [(4, 12, 6, 6), (6, 40, 17, 9)], ids=["one launch", "two launches"])
def test_huge_values(device, shape):
    """Beyond the square root of the largest float32 the moments stay finite as long as the variance is."""
    inputs = batch_norm_inputs(shape, torch.float32, tracking=True, mean=1e20, std=1e17)
    check_batch_norm(batch_norm_act, inputs, device, channels_last=True, training=True, act=None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_residual_that_no_kernel_covers(device, monkeypatch, dtype):
    """It takes the reference path with the right result, or is refused before anything is updated."""
    x = torch.randn(64, 3, 24, 24, device=device)
    residual = torch.randn(x.shape, device=device, dtype=dtype)
    mean, var, count = torch.zeros(3, device=device), torch.ones(3, device=device), torch.tensor(0, device=device)
    with pytest.raises(RuntimeError, match=f"no kernel for {dtype}"):
        batch_norm_act(x, mean, var, training=True, residual=residual, num_batches_tracked=count)
    assert not mean.any() and count == 0
    monkeypatch.setenv("FUSEDRES_BACKEND", "auto")
    out = batch_norm_act(x, mean, var, training=True, residual=residual, num_batches_tracked=count)
    expected = torch_eager(x, None, None, training=True, residual=residual)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("shape", [(4, 12, 6, 6), (6, 70, 17, 9)], ids=["one launch", "two launches"])
@both_layouts
def test_deterministic(device, channels_last, shape):
    """Bit for bit the same from run to run."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    inputs = batch_norm_inputs(shape, torch.bfloat16, residual=True).map(
        lambda t: (t.contiguous(memory_format=form) if t.dim() == 4 else t).to(device)
    )
    first, second = (run_batch_norm(batch_norm_act, inputs, True, "relu") for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@hypothesis.given(
    shape=st.tuples(st.integers(2, 6), st.integers(1, 40), st.integers(1, 20), st.integers(1, 20)),
    dtype=st.sampled_from(DTYPES),
    channels_last=st.booleans(),
    training=st.booleans(),
    residual=st.booleans(),
    act=st.sampled_from(["relu", None]),
)
@hypothesis.settings(
    max_examples=25, deadline=None, derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_random_shapes(device, shape, dtype, channels_last, training, residual, act):
    # Two values a channel normalise to ±1 whatever they are: their gradient is rounding noise in any implementation.
    hypothesis.assume(shape[0] * shape[2] * shape[3] > 4)
    inputs = batch_norm_inputs(shape, dtype, residual=residual)
    check_batch_norm(batch_norm_act, inputs, device, channels_last=channels_last, training=training, act=act)


@both_modes
def test_empty_batch(device, training):
    x = torch.randn(0, 3, 4, 4, device=device, requires_grad=True)
    mean, var, count = torch.zeros(3, device=device), torch.ones(3, device=device), torch.tensor(0, device=device)
    out = batch_norm_act(x, mean, var, training=training, act="relu", num_batches_tracked=count)
    out.backward(torch.empty_like(out))
    assert out.shape == x.shape
    assert x.grad is not None and x.grad.shape == x.shape
    assert not mean.any() and torch.equal(var, torch.ones_like(var))
    assert count.item() == int(training)


def test_float64_input_takes_the_reference(device, monkeypatch):
    monkeypatch.setenv("FUSEDRES_BACKEND", "auto")
    inputs = batch_norm_inputs((3, 4, 5, 5), torch.float64, residual=True, parameter_dtype=torch.float64)
    inputs = inputs.map(lambda t: t.to(device))
    actual = run_batch_norm(batch_norm_act, inputs, True, "relu")
    expected = run_batch_norm(torch_eager, inputs, True, "relu")
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name
    monkeypatch.setenv("FUSEDRES_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=r"no kernel for torch\.float64"):
        run_batch_norm(batch_norm_act, inputs, True, "relu")


def test_as_good_as_eager_is_sharp():
    """The rule itself: an error of three times eager's fails."""
    exact = {"out": torch.ones(8, dtype=torch.float64)}
    eager = {"out": torch.full((8,), 1 + 1e-3)}
    with pytest.raises(AssertionError, match=r"out: 2-norm error is 1\.5"):
        assert_as_good_as_eager({"out": torch.full((8,), 1 + 3e-3)}, [eager], exact)
