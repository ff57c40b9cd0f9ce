"""batch_norm_act against the oracle: shapes, dtypes, layouts, modes, and what the kernels promise beside."""

from __future__ import annotations

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
from tests.parameters import (
    BOTH,
    DTYPES,
    SHAPES,
    both_layouts,
    both_modes,
    covering,
    has_format,
    has_statistics,
)

pytestmark = pytest.mark.usefixtures("triton_backend")

TILINGS = {"one launch": (4, 12, 6, 6), "two launches": (6, 40, 17, 9)}
both_tilings = pytest.mark.parametrize("shape", TILINGS.values(), ids=TILINGS)
residual_or_not = pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])


@pytest.mark.floor
@covering(training=BOTH, channels_last=BOTH, residual=BOTH, dtype=DTYPES, act=["relu", None])
def test_oracle(device, training, channels_last, residual, dtype, act):
    inputs = batch_norm_inputs((3, 12, 7, 5), dtype, residual=residual)
    check_batch_norm(batch_norm_act, inputs, device, channels_last=channels_last, training=training, act=act)


@covering(has_format, training=BOTH, channels_last=BOTH, residual=BOTH, shape=SHAPES)
def test_shapes(device, training, channels_last, residual, shape):
    inputs = batch_norm_inputs(shape, torch.bfloat16, residual=residual)
    check_batch_norm(batch_norm_act, inputs, device, channels_last=channels_last, training=training, act="relu")


OPTIONS = [
    {"affine": False},
    {"bias": False},
    {"tracking": False},
    {"affine": False, "tracking": False},
    {"parameter_dtype": torch.bfloat16},
    {"residual": True, "residual_dtype": torch.float32},
    {"residual": True, "residual_dtype": torch.float16},
]


@covering(has_statistics, training=BOTH, options=OPTIONS, shape=TILINGS)
def test_parameters_and_dtypes(device, training, options, shape):
    inputs = batch_norm_inputs(shape, torch.bfloat16, **options)
    check_batch_norm(batch_norm_act, inputs, device, channels_last=True, training=training, act="relu")


@both_layouts
def test_sixteen_bit_residual_of_float32_input(device, channels_last):
    """The gradient of the residual is rounded to its dtype, that of the input is not."""
    inputs = batch_norm_inputs((6, 40, 17, 9), torch.float32, residual=True, residual_dtype=torch.bfloat16)
    check_batch_norm(batch_norm_act, inputs, device, channels_last=channels_last, training=True, act="relu")


@both_tilings
@pytest.mark.parametrize("momentum", [None, 0.0, 0.3, 1.0])
def test_momentum(device, momentum, shape):
    inputs = batch_norm_inputs(shape, torch.float32)
    actual = check_batch_norm(
        batch_norm_act, inputs, device, channels_last=True, training=True, act=None, momentum=momentum
    )
    assert actual["num_batches_tracked"].item() == 4


@covering(channels_last=BOTH, dtype=DTYPES[:2], shape=[(4, 8, 9, 9), (6, 40, 17, 9)])
def test_large_mean(device, channels_last, dtype, shape):
    std = 1.0 if dtype == torch.float32 else 8.0  # in bfloat16 a mean of 1000 leaves steps of 4
    inputs = batch_norm_inputs(shape, dtype, mean=1e3 * std, std=std)
    check_batch_norm(batch_norm_act, inputs, device, channels_last=channels_last, training=True, act=None)


@pytest.mark.parametrize(("first", "channels_last"), [(1.0, True), (20.0, False), (1e4, True)])
def test_untypical_first_value(device, channels_last, first):
    """Moments are taken of differences to a channel's first value, which helps only where it is like the others."""
    inputs = batch_norm_inputs((6, 8, 40, 40), torch.float32, mean=0.0, std=1.0)
    assert inputs.running_mean is not None
    inputs.running_mean.zero_()  # so that nothing hides the error of the mean, which is near 0
    inputs.input[0, :, 0, 0] = first
    check_batch_norm(batch_norm_act, inputs, device, channels_last=channels_last, training=True, act=None)


@covering(value=[float("nan"), float("inf"), -float("inf")], training=BOTH, residual=BOTH)
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


LEAVES = ("input", "residual", "weight", "bias")


@covering(training=BOTH, shape=TILINGS, needed=LEAVES)
def test_partial_gradients(device, training, shape, needed):
    """One alone has the gradient that it has among all, and what needs none gets none."""
    inputs = batch_norm_inputs(shape, torch.float32, residual=True).map(lambda t: t.to(device))
    everything = run_batch_norm(batch_norm_act, inputs, training, "relu")
    given = inputs.map(lambda t: t.clone())
    leaves = {name: getattr(given, name).requires_grad_(name == needed) for name in LEAVES}
    out = batch_norm_act(
        given.input, given.running_mean, given.running_var, given.weight, given.bias, training,
        residual=given.residual, act="relu",
    )  # fmt: skip
    out.backward(given.grad)
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [needed]
    assert torch.equal(leaves[needed].grad, everything[f"grad_{needed}"])


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
@both_tilings
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


@both_tilings
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


@pytest.mark.floor
@hypothesis.given(
    shape=st.tuples(st.integers(2, 6), st.integers(1, 40), st.integers(1, 20), st.integers(1, 20)),
    dtype=st.sampled_from(DTYPES),
    channels_last=st.booleans(),
    training=st.booleans(),
    residual=st.booleans(),
    act=st.sampled_from(["relu", None]),
)
@hypothesis.settings(
    max_examples=15, deadline=None, derandomize=True,
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
