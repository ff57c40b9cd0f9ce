"""add_batch_norm_act against the oracle: both outputs, the two gradients that meet at the sum, and what is stored."""

from __future__ import annotations

import functools
import itertools
from unittest import mock

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from fusedres import reference
from fusedres.functional import add_batch_norm_act, batch_norm_act
from fusedres.kernels import tiling
from fusedres.kernels.layout import rows
from tests.oracle import Tensors, batch_norm_inputs, check_batch_norm, run_batch_norm, to_double
from tests.parameters import (
    BOTH,
    DTYPES,
    both_layouts,
    both_modes,
    covering,
    has_format,
    has_statistics,
)

pytestmark = pytest.mark.usefixtures("triton_backend")

MIXED = [(a, b) for a, b in itertools.product(DTYPES, DTYPES) if a != b]
ONE_LAUNCH, TWO_LAUNCHES = (4, 16, 6, 6), (16, 5, 17, 9)
TILINGS = {"one launch": ONE_LAUNCH, "two launches": TWO_LAUNCHES}
both_tilings = pytest.mark.parametrize("shape", TILINGS.values(), ids=TILINGS)

inputs_of = functools.partial(batch_norm_inputs, residual=True)
check = functools.partial(check_batch_norm, add_batch_norm_act, eager=reference.add_batch_norm_act)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@both_tilings
@both_layouts
def test_names_of_the_tilings(channels_last, shape, dtype):
    """The shapes below take as many launches as their names say, whatever the layout and the dtype."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    view = rows(torch.empty(shape, memory_format=form))
    assert (tiling.on_chip(view, dtype.itemsize) is not None) == (shape == ONE_LAUNCH)


@pytest.mark.floor
@covering(training=BOTH, channels_last=BOTH, dtype=DTYPES, act=["relu", None])
def test_oracle(device, training, channels_last, dtype, act):
    check(inputs_of((3, 12, 7, 5), dtype), device, channels_last=channels_last, training=training, act=act)


# The tiles are batch_norm_act's, whose tests have the other shapes.
EDGES = [(5, 3, 1, 1), (1, 67, 5, 3), (5, 70, 17, 9), (2, 3, 97, 61), (6, 10), (2, 3, 4, 5, 2)]


@covering(has_format, training=BOTH, channels_last=BOTH, shape=EDGES)
def test_shapes(device, training, channels_last, shape):
    check(inputs_of(shape, torch.bfloat16), device, channels_last=channels_last, training=training, act="relu")


OPTIONS = [
    {"affine": False},
    {"bias": False},
    {"tracking": False},
    {"affine": False, "tracking": False},
    {"parameter_dtype": torch.bfloat16},
]


@covering(has_statistics, training=BOTH, options=OPTIONS, shape=TILINGS)
def test_parameters(device, training, shape, options):
    inputs = inputs_of(shape, torch.bfloat16, **options)
    check(inputs, device, channels_last=True, training=training, act="relu")


@covering(training=BOTH, channels_last=BOTH, shape=TILINGS, dtypes=MIXED)
def test_mixed_dtypes(device, training, channels_last, shape, dtypes):
    """The sum is promoted, and each gradient has the dtype of its tensor."""
    dtype, residual_dtype = dtypes
    inputs = inputs_of(shape, dtype, residual_dtype=residual_dtype)
    actual = check(inputs, device, channels_last=channels_last, training=training, act="relu")
    assert actual["sum"].dtype == actual["out"].dtype == torch.float32
    assert (actual["grad_input"].dtype, actual["grad_residual"].dtype) == (dtype, residual_dtype)


@pytest.mark.parametrize("momentum", [None, 0.0, 0.3, 1.0])
@both_tilings
def test_momentum(device, shape, momentum):
    inputs = inputs_of(shape, torch.float32)
    actual = check(inputs, device, channels_last=True, training=True, act=None, momentum=momentum)
    assert actual["num_batches_tracked"].item() == 4


@covering(channels_last=BOTH, dtype=DTYPES[:2], shape={"one launch": ONE_LAUNCH, "two launches": (16, 20, 17, 9)})
def test_large_mean(device, channels_last, shape, dtype):
    std = 1.0 if dtype == torch.float32 else 8.0  # in bfloat16 a mean of 1000 leaves steps of 4
    inputs = inputs_of(shape, dtype, mean=1e3 * std, std=std)
    check(inputs, device, channels_last=channels_last, training=True, act=None)


@both_tilings
@both_modes
def test_the_sum_is_what_is_normalised(device, training, shape):
    """Not the unrounded one: here the residual is lost in the rounding, and must not move the mean either."""
    x = (256 + 2.0 * torch.randint(0, 8, shape)).to(torch.bfloat16).to(device)
    residual = torch.full_like(x, 0.75)
    mean, var = torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)
    total, out = add_batch_norm_act(x, residual, mean, var, training=training, momentum=1.0)
    assert torch.equal(total, x)
    if training:
        torch.testing.assert_close(mean, x.float().mean((0, 2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(out, batch_norm_act(total, mean, var, training=training))


@pytest.mark.parametrize(("dtype", "residual_dtype"), [*MIXED, *((d, d) for d in DTYPES)], ids=str)
@both_modes
def test_the_sum_is_eagers(device, training, dtype, residual_dtype):
    """To the last bit, in memory of its own, laid out like the input."""
    x = torch.randn(4, 8, 6, 5).to(device, dtype).contiguous(memory_format=torch.channels_last)
    residual = torch.randn(4, 8, 6, 5).to(device, residual_dtype)
    before = x.clone(), residual.clone()
    mean, var = torch.zeros(8, device=device), torch.ones(8, device=device)
    total, out = add_batch_norm_act(x, residual, mean, var, training=training, act="relu")
    assert total.dtype == out.dtype == torch.promote_types(dtype, residual_dtype)
    assert torch.equal(total, x + residual)
    assert total.stride() == out.stride() == x.stride()
    assert len({t.untyped_storage().data_ptr() for t in (x, residual, total, out)}) == 4
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@both_modes
def test_not_finite(device, training, value):
    inputs = inputs_of((3, 4, 5, 5), torch.float32)
    inputs.input[1, 2, 3, 3] = value
    inputs.residual[0, 1, 2, 2] = value
    actual = run_batch_norm(add_batch_norm_act, inputs.map(lambda t: t.to(device)), training, "relu")
    exact = run_batch_norm(reference.add_batch_norm_act, inputs.map(to_double), training, "relu")
    for name in ("sum", "out", "grad_input", "grad_residual"):
        assert torch.equal(actual[name].isnan().cpu(), exact[name].isnan()), name
    for name in ("sum", "out"):
        assert torch.equal(actual[name].isposinf().cpu(), exact[name].isposinf()), name
    # An infinity among the values of a channel leaves its moments undefined; eager's differ between devices.
    assert torch.equal(actual["running_mean"].isfinite().cpu(), exact["running_mean"].isfinite())


@both_layouts
def test_exact_zeros_pass_the_gradient_of_the_sum_only(device, channels_last):
    inputs = inputs_of((4, 6, 5, 5), torch.float32, affine=False)
    inputs.residual[:, 2] = -inputs.input[:, 2]
    actual = check(inputs, device, channels_last=channels_last, training=True, act="relu")
    assert not actual["out"][:, 2].any()
    assert torch.equal(actual["grad_input"][:, 2].cpu(), inputs.grad_sum[:, 2])


def gradients_of(device, inputs, training: bool, used: set[str], needed: set[str]) -> Tensors:
    """Gradients by name, with only the outputs ``used`` in the backward and the leaves ``needed`` in the graph."""
    given = inputs.map(lambda t: t.clone().to(device))
    leaves = {name: getattr(given, name) for name in ("input", "residual", "weight", "bias")}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in needed)
    total, out = add_batch_norm_act(
        given.input, given.residual, given.running_mean, given.running_var, given.weight, given.bias, training,
        act="relu",
    )  # fmt: skip
    grads = {"sum": (total, given.grad_sum), "out": (out, given.grad)}
    # The identity path needs a gradient where a term of it does, and not for the normalisation's sake.
    assert total.requires_grad == bool(needed & {"input", "residual"})
    torch.autograd.backward(*zip(*(grads[name] for name in used if grads[name][0].requires_grad), strict=True))
    for name, leaf in leaves.items():
        assert leaf.grad is None or name in needed, name
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


LEAVES = {"input", "residual", "weight", "bias"}


@covering(training=BOTH, shape=TILINGS, residual_dtype=[torch.bfloat16, torch.float32], needed=sorted(LEAVES))
def test_partial_gradients(device, training, shape, residual_dtype, needed):
    """One alone has the gradient that it has among all, and what needs none gets none."""
    inputs = inputs_of(shape, torch.bfloat16, residual_dtype=residual_dtype)
    everything = gradients_of(device, inputs, training, {"sum", "out"}, LEAVES)
    alone = gradients_of(device, inputs, training, {"sum", "out"}, {needed})
    assert alone.keys() == {needed}
    assert torch.equal(alone[needed], everything[needed])


@both_tilings
@both_modes
def test_only_the_activation_is_used(device, training, shape):
    """Then the sum has no gradient of its own; a gradient of zero gives the same."""
    inputs = inputs_of(shape, torch.float32)
    actual = gradients_of(device, inputs, training, {"out"}, LEAVES)
    inputs.grad_sum.zero_()
    expected = gradients_of(device, inputs, training, {"sum", "out"}, LEAVES)
    assert actual.keys() == LEAVES
    for name, grad in actual.items():
        assert torch.equal(grad, expected[name]), name


@both_modes
def test_only_the_sum_is_used(device, training):
    """Its gradient is that of both terms, and nothing is launched; the parameters take no part."""
    inputs = inputs_of(ONE_LAUNCH, torch.bfloat16, residual_dtype=torch.float32)
    with mock.patch("fusedres.kernels.batch_norm_backward.batch_norm_act_backward", side_effect=AssertionError):
        actual = gradients_of(device, inputs, training, {"sum"}, LEAVES)
    assert actual.keys() == {"input", "residual"}
    assert torch.equal(actual["residual"].cpu(), inputs.grad_sum)
    assert torch.equal(actual["input"].cpu(), inputs.grad_sum.to(torch.bfloat16))


@both_tilings
@both_modes
def test_the_input_is_the_residual(device, training, shape):
    """s = 2x, and the gradients of both terms add up."""
    inputs = inputs_of(shape, torch.float32)
    inputs.residual = inputs.input
    apart = gradients_of(device, inputs, training, {"sum", "out"}, LEAVES)
    x = inputs.input.to(device).requires_grad_()
    buffers = [t.to(device) for t in (inputs.running_mean, inputs.running_var, inputs.weight, inputs.bias)]
    total, out = add_batch_norm_act(x, x, *buffers, training, act="relu")
    torch.autograd.backward([total, out], [inputs.grad_sum.to(device), inputs.grad.to(device)])
    assert torch.equal(total, 2 * x)
    assert torch.equal(x.grad, apart["input"] + apart["residual"])


@pytest.mark.parametrize("layouts", ["strided", "mixed formats"])
@both_modes
def test_strided_activations(device, training, layouts):
    """Slices, expanded gradients and mixed memory formats: copied where needed, right always."""
    x = torch.randn(4, 16, 9, 14, device=device)[:, ::2, 1:, ::2]
    r = torch.randn(4, 8, 8, 7, device=device).to(memory_format=torch.channels_last)
    if layouts == "mixed formats":
        x = x.contiguous()
    else:
        assert not x.is_contiguous()
    mean, var = torch.zeros(8, device=device), torch.ones(8, device=device)
    cotangent = torch.randn(8, 1, 1, device=device)

    def run(function, x, r, mean, var, cotangent):
        leaves = [t.detach().requires_grad_() for t in (x, r)]
        total, out = function(*leaves, mean, var, training=training, act="relu")
        torch.autograd.backward([total, out], [cotangent.expand_as(total), cotangent.expand_as(out)])
        return [total, out, *(leaf.grad for leaf in leaves)]

    actual = run(add_batch_norm_act, x, r, mean.clone(), var.clone(), cotangent)
    exact = run(reference.add_batch_norm_act, *(t.double() for t in (x, r, mean, var, cotangent)))
    for got, want in zip(actual, exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@both_tilings
@both_modes
def test_strided_vectors(device, training, shape):
    """Columns of a matrix as parameters and statistics: read and written where they are, and nowhere else."""
    inputs = inputs_of(shape, torch.float32).map(lambda t: t.to(device))
    expected = run_batch_norm(add_batch_norm_act, inputs, training, "relu")
    columns = torch.full((shape[1], 8), 7.0, device=device)
    names = ("running_mean", "running_var", "weight", "bias")
    for column, name in enumerate(names):
        columns[:, 2 * column] = getattr(inputs, name)
    vectors = [columns[:, 2 * column] for column in range(len(names))]
    total, out = add_batch_norm_act(inputs.input, inputs.residual, *vectors, training, act="relu")
    for name, tensor in {"sum": total, "out": out, "running_mean": vectors[0], "running_var": vectors[1]}.items():
        assert torch.equal(tensor, expected[name]), name
    assert columns[:, 1::2].eq(7).all()


def test_a_sum_changed_in_place_is_noticed(device):
    """It is what the backward reads, as in eager."""
    x = torch.randn(3, 4, 5, 5, device=device, requires_grad=True)
    total, out = add_batch_norm_act(x, x.detach(), None, None, training=True, act="relu")
    total.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(torch.ones_like(out))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_residual_that_no_kernel_covers(device, monkeypatch, dtype):
    """It takes the reference path with the right result, or is refused before anything is updated."""
    x = torch.randn(64, 3, 24, 24, device=device)
    residual = torch.randn(x.shape, device=device, dtype=dtype)
    mean, var, count = torch.zeros(3, device=device), torch.ones(3, device=device), torch.tensor(0, device=device)
    given = {"training": True, "num_batches_tracked": count}
    error, message = (TypeError, "residual must be") if dtype.is_complex else (RuntimeError, f"no kernel for {dtype}")
    with pytest.raises(error, match=message):
        add_batch_norm_act(x, residual, mean, var, **given)
    assert not mean.any() and count == 0
    if dtype.is_complex:
        return
    monkeypatch.setenv("FUSEDRES_BACKEND", "auto")
    weight = torch.ones(3, device=device, dtype=dtype)  # of the sum's dtype
    total, out = add_batch_norm_act(x, residual, None, None, weight, **given)
    assert total.dtype == out.dtype == dtype
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(out, torch.nn.functional.batch_norm(x + residual, None, None, training=True))


@pytest.mark.floor
@hypothesis.given(
    shape=st.tuples(st.integers(2, 6), st.integers(1, 40), st.integers(1, 20), st.integers(1, 20)),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    channels_last=st.booleans(),
    training=st.booleans(),
    act=st.sampled_from(["relu", None]),
)
@hypothesis.settings(
    max_examples=12, deadline=None, derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_random_shapes(device, shape, dtypes, channels_last, training, act):
    # Two values a channel normalise to ±1 whatever they are: their gradient is rounding noise in any implementation.
    hypothesis.assume(shape[0] * shape[2] * shape[3] > 4)
    inputs = inputs_of(shape, dtypes[0], residual_dtype=dtypes[1])
    check(inputs, device, channels_last=channels_last, training=training, act=act)


@both_modes
def test_empty_batch(device, training):
    x, r = (torch.randn(0, 3, 4, 4, device=device, requires_grad=True) for _ in range(2))
    mean, var, count = torch.zeros(3, device=device), torch.ones(3, device=device), torch.tensor(0, device=device)
    total, out = add_batch_norm_act(x, r, mean, var, training=training, act="relu", num_batches_tracked=count)
    torch.autograd.backward([total, out], [torch.empty_like(out)] * 2)
    assert total.shape == out.shape == x.grad.shape == r.grad.shape == x.shape
    assert not mean.any() and torch.equal(var, torch.ones_like(var))
    assert count.item() == int(training)


def test_float64_input_takes_the_reference(device, monkeypatch):
    monkeypatch.setenv("FUSEDRES_BACKEND", "auto")
    inputs = inputs_of((3, 4, 5, 5), torch.float64, parameter_dtype=torch.float64).map(lambda t: t.to(device))
    actual = run_batch_norm(add_batch_norm_act, inputs, True, "relu")
    expected = run_batch_norm(reference.add_batch_norm_act, inputs, True, "relu")
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name
    monkeypatch.setenv("FUSEDRES_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=r"no kernel for torch\.float64"):
        run_batch_norm(add_batch_norm_act, inputs, True, "relu")
