"""batch_norm_add_batch_norm_act against the oracle: both norms, both names of the output, and what is not fused."""

from __future__ import annotations

import functools
import itertools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from fusedres import reference
from fusedres.functional import (
    Norm,
    batch_norm_add_batch_norm_act,
    forked_batch_norm_add_batch_norm_act,
)
from fusedres.kernels import tiling
from fusedres.kernels.layout import rows
from tests.functional.join_parts import LEAVES, check_join, join_inputs, run_join
from tests.oracle import layout, to_double
from tests.parameters import BOTH, DTYPES, both_layouts, both_modes, covering, has_format, has_statistics

pytestmark = pytest.mark.usefixtures("triton_backend")

both_readers = pytest.mark.parametrize("fork", [False, True], ids=["plain", "fork"])
ON_CHIP, APART = (4, 16, 6, 6), (16, 8, 17, 9)
TILINGS = {"on-chip": ON_CHIP, "apart": APART}
both_tilings = pytest.mark.parametrize("shape", TILINGS.values(), ids=TILINGS)

run = functools.partial(run_join, forked_batch_norm_add_batch_norm_act)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@both_tilings
@both_layouts
def test_names_of_the_tilings(channels_last, shape, dtype):
    form = torch.channels_last if channels_last else torch.contiguous_format
    view = rows(torch.empty(shape, memory_format=form))
    assert (tiling.on_chip(view, dtype.itemsize, tensors=2) is not None) == (shape == ON_CHIP)


@pytest.mark.floor
@covering(fork=BOTH, training=BOTH, channels_last=BOTH, dtype=DTYPES)
def test_oracle(device, fork, training, channels_last, dtype):
    inputs = join_inputs((3, 12, 7, 5), dtype, fork=fork)
    check_join(inputs, device, channels_last=channels_last, training=training, act="relu")


@covering(fork=BOTH, training=BOTH, shape=TILINGS)
def test_without_activation(device, fork, training, shape):
    check_join(join_inputs(shape, torch.bfloat16, fork=fork), device, channels_last=True, training=training, act=None)


SHAPES = [
    (2, 1, 3, 3),  # one channel
    (5, 3, 1, 1),  # one pixel: the two formats are one
    (1, 67, 5, 3),  # odd C, one image
    (2, 1100, 3, 1),  # more channels than counters for tiles of one
    (5, 35, 17, 9),  # two launches, ragged in every direction
    (6, 10),  # (N, C)
    (4, 6, 11),  # (N, C, L)
    (2, 3, 4, 5, 2),  # (N, C, D, H, W)
]


@covering(has_format, training=BOTH, channels_last=BOTH, shape=SHAPES)
def test_shapes(device, training, channels_last, shape):
    inputs = join_inputs(shape, torch.bfloat16, fork=True)
    check_join(inputs, device, channels_last=channels_last, training=training, act="relu")


@covering(
    has_statistics,
    training=BOTH,
    shape=TILINGS,
    options=[{"affine": False}, {"bias": False}, {"tracking": False}, {"parameter_dtype": torch.bfloat16}],
)
def test_parameters(device, training, shape, options):
    inputs = join_inputs(shape, torch.bfloat16, **options)
    check_join(inputs, device, channels_last=True, training=training, act="relu")


@both_tilings
@both_modes
def test_norms_of_different_kinds(device, training, shape):
    """One has vectors in 16 bits and no counter, the other no parameters."""
    inputs = join_inputs(shape, torch.bfloat16, fork=True)
    for name in ("weight", "bias", "running_mean", "running_var"):
        setattr(inputs, name, getattr(inputs, name).to(torch.bfloat16))
    inputs.num_batches_tracked = inputs.other_weight = inputs.other_bias = None
    check_join(inputs, device, channels_last=True, training=training, act="relu")


@pytest.mark.parametrize("momentum", [(None, 0.3), (0.0, None), (None, None), (1.0, 0.1)], ids=str)
@both_tilings
def test_momentum(device, shape, momentum):
    inputs = join_inputs(shape, torch.float32)
    actual = check_join(inputs, device, channels_last=True, training=True, act=None, momentum=momentum)
    assert (actual["num_batches_tracked"].item(), actual["other_num_batches_tracked"].item()) == (4, 1)


@covering(channels_last=BOTH, dtype=DTYPES[:2], shape={"on-chip": ON_CHIP, "apart": (16, 20, 17, 9)})
def test_large_mean(device, channels_last, shape, dtype):
    std = 1.0 if dtype == torch.float32 else 8.0  # in bfloat16 a mean of 1000 leaves steps of 4
    inputs = join_inputs(shape, dtype, mean=1e3 * std, std=std)
    check_join(inputs, device, channels_last=channels_last, training=True, act=None)


@pytest.mark.parametrize(
    ("dtype", "other_dtype"), [(a, b) for a, b in itertools.product(DTYPES, DTYPES) if a != b], ids=str
)
@both_modes
def test_mixed_dtypes(device, training, dtype, other_dtype):
    """Two operations; the sum is promoted, and each gradient has the dtype of its tensor."""
    inputs = join_inputs(ON_CHIP, dtype, other_dtype=other_dtype, fork=True)
    actual = check_join(inputs, device, channels_last=True, training=training, act="relu")
    assert actual["out"].dtype == torch.float32
    assert (actual["grad_input"].dtype, actual["grad_other"].dtype) == (dtype, other_dtype)


@pytest.mark.parametrize("training", [True, False])
@both_readers
def test_one_norm_is_frozen(device, fork, training):
    inputs = join_inputs(APART, torch.bfloat16, fork=fork)
    check_join(inputs, device, channels_last=True, training=training, other_training=not training, act="relu")


@pytest.mark.parametrize("aliased", [False, True], ids=["same tensors", "aliases"])
@both_readers
def test_one_norm_for_both(device, fork, aliased):
    """A shared module: its statistics move twice, for the input first."""
    inputs = join_inputs(ON_CHIP, torch.float32, fork=fork).map(lambda t: t.to(device))
    results = []
    function = forked_batch_norm_add_batch_norm_act if fork else batch_norm_add_batch_norm_act
    for join in (function, reference.batch_norm_add_batch_norm_act):
        given = inputs.map(torch.clone)
        norm = given.norm("", True, 0.75)
        other_norm = norm._replace(running_mean=norm.running_mean.view(-1)) if aliased else norm
        join(given.input, given.other, norm, other_norm, act="relu")
        results.append(norm)
    mine, theirs = results
    torch.testing.assert_close(mine.running_mean, theirs.running_mean)
    torch.testing.assert_close(mine.running_var, theirs.running_var)
    assert mine.num_batches_tracked == theirs.num_batches_tracked == 5
    newest = inputs.other.mean((0, 2, 3))
    assert (mine.running_mean - newest).norm() < (mine.running_mean - inputs.input.mean((0, 2, 3))).norm()


@both_tilings
@both_modes
def test_one_input_for_both(device, training, shape):
    inputs = join_inputs(shape, torch.float32).map(lambda t: t.to(device))
    inputs.other = inputs.input
    apart = run_join(batch_norm_add_batch_norm_act, inputs, training, "relu")
    x = inputs.input.clone().requires_grad_()
    norms = inputs.norm("", training), inputs.norm("other_", training, 0.3, 1e-3)
    out = batch_norm_add_batch_norm_act(x, x, *norms, act="relu")
    out.backward(inputs.grad)
    assert torch.equal(out, apart["out"])
    assert torch.equal(x.grad, apart["grad_input"] + apart["grad_other"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@both_modes
def test_not_finite(device, training, value):
    inputs = join_inputs((3, 4, 5, 5), torch.float32, fork=True)
    inputs.input[1, 2, 3, 3] = value
    inputs.other[0, 1, 2, 2] = value
    actual = run(inputs.map(lambda t: t.to(device)), training, "relu")
    exact = run_join(reference.batch_norm_add_batch_norm_act, inputs.map(to_double), training, "relu")
    for name in ("out", "grad_input", "grad_other"):
        assert torch.equal(actual[name].isnan().cpu(), exact[name].isnan()), name
    assert torch.equal(actual["out"].isposinf().cpu(), exact["out"].isposinf())


@covering(fork=BOTH, channels_last=BOTH, shape=TILINGS)
def test_exact_zeros_have_no_gradient(device, fork, shape, channels_last):
    """Both normalisations cancel, to the last bit, in the forward and in the backward."""
    inputs = join_inputs(shape, torch.float32, fork=fork, bias=False)
    inputs.other = inputs.input.clone()
    inputs.other_weight = -inputs.weight
    given = inputs.map(layout(device, channels_last))
    leaves = [given.input.requires_grad_(), given.other.requires_grad_()]
    norms = given.norm("", True), given.norm("other_", True)
    out, second = forked_batch_norm_add_batch_norm_act(*leaves, *norms, act="relu")
    assert not out.any()
    torch.autograd.backward([out, second] if fork else [out], [given.grad, given.grad_fork] if fork else [given.grad])
    assert all(not leaf.grad.any() for leaf in leaves)


@covering(fork=BOTH, training=BOTH, shape=TILINGS, needed=LEAVES)
def test_partial_gradients(device, fork, training, shape, needed):
    """One alone has the gradient that it has among all, and what needs none gets none."""
    inputs = join_inputs((shape[0], 4, *shape[2:]), torch.bfloat16, fork=fork).map(lambda t: t.to(device))
    everything = run(inputs, training, "relu")
    alone = run(inputs, training, "relu", needed=[needed])
    assert [name for name in alone if name.startswith("grad_")] == [f"grad_{needed}"]
    assert torch.equal(alone[f"grad_{needed}"], everything[f"grad_{needed}"])


@covering(used=[0, 1], training=BOTH, shape=TILINGS)
def test_one_reader_of_a_fork(device, training, shape, used):
    """An ordinary backward, whichever name was read."""
    inputs = join_inputs(shape, torch.bfloat16).map(lambda t: t.to(device))

    def one(*args, **kwargs):
        return forked_batch_norm_add_batch_norm_act(*args, **kwargs)[used]

    actual, expected = (run_join(join, inputs, training, "relu") for join in (one, batch_norm_add_batch_norm_act))
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@covering(training=BOTH, shape=TILINGS, dtype=DTYPES[:2])
def test_two_readers_are_their_sum(device, training, shape, dtype):
    """To the last bit."""
    inputs = join_inputs(shape, dtype, fork=True).map(lambda t: t.to(device))
    actual = run(inputs, training, "relu")
    assert inputs.grad_fork is not None
    inputs.grad, inputs.grad_fork = inputs.grad + inputs.grad_fork, None
    expected = run_join(batch_norm_add_batch_norm_act, inputs, training, "relu")
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@both_modes
def test_both_names_are_one_memory(device, training):
    inputs = join_inputs(ON_CHIP, torch.float32).map(lambda t: t.to(device))
    norms = inputs.norm("", training), inputs.norm("other_", training)
    out, second = forked_batch_norm_add_batch_norm_act(inputs.input, inputs.other, *norms)
    assert out is second  # no gradient is needed
    out, second = forked_batch_norm_add_batch_norm_act(inputs.input.requires_grad_(), inputs.other, *norms)
    assert out.data_ptr() == second.data_ptr() and out is not second
    assert out.requires_grad and second.requires_grad
    plain = batch_norm_add_batch_norm_act(inputs.input, inputs.other, *norms)
    assert plain.requires_grad


@both_modes
def test_strided_activations(device, training):
    """Slices, mixed memory formats, expanded gradients of two layouts: copied where needed, right always."""
    x = torch.randn(4, 16, 9, 14, device=device)[:, ::2, 1:, ::2]
    y = torch.randn(4, 8, 8, 7, device=device).to(memory_format=torch.channels_last)
    tensors = [x, y, torch.randn(8, 1, 1, device=device), torch.randn_like(y)]

    def results(join, x, y, grad, grad_fork):
        leaves = [t.detach().requires_grad_() for t in (x, y)]
        norms = [Norm(*(f(8, dtype=x.dtype, device=device) for f in (torch.zeros, torch.ones))) for _ in "ab"]
        outs = join(*leaves, *(norm._replace(training=training) for norm in norms), act="relu")
        outs = (outs, outs) if isinstance(outs, torch.Tensor) else outs
        torch.autograd.backward(outs, [grad.expand_as(outs[0]), grad_fork])
        return [outs[0], *(leaf.grad for leaf in leaves)]

    actual = results(forked_batch_norm_add_batch_norm_act, *tensors)
    exact = results(reference.batch_norm_add_batch_norm_act, *(t.double() for t in tensors))
    for got, want in zip(actual, exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@both_tilings
@both_modes
def test_strided_vectors(device, training, shape):
    """Columns of a matrix as parameters and statistics: read and written where they are, and nowhere else."""
    inputs = join_inputs(shape, torch.float32).map(lambda t: t.to(device))
    expected = run_join(batch_norm_add_batch_norm_act, inputs, training, "relu")
    names = [prefix + name for prefix in ("", "other_") for name in ("running_mean", "running_var", "weight", "bias")]
    columns = torch.full((shape[1], 2 * len(names)), 7.0, device=device)
    for column, name in enumerate(names):
        columns[:, 2 * column] = getattr(inputs, name)
        setattr(inputs, name, columns[:, 2 * column])
    norms = inputs.norm("", training), inputs.norm("other_", training, 0.3, 1e-3)
    out = batch_norm_add_batch_norm_act(inputs.input, inputs.other, *norms, act="relu")
    assert torch.equal(out, expected["out"])
    for name in ("running_mean", "running_var", "other_running_mean", "other_running_var"):
        assert torch.equal(getattr(inputs, name), expected[name]), name
    assert columns[:, 1::2].eq(7).all()


@pytest.mark.floor
@hypothesis.given(
    shape=st.tuples(st.integers(2, 6), st.integers(1, 40), st.integers(1, 16), st.integers(1, 16)),
    dtype=st.sampled_from(DTYPES),
    channels_last=st.booleans(),
    training=st.booleans(),
    fork=st.booleans(),
    act=st.sampled_from(["relu", None]),
)
@hypothesis.settings(
    max_examples=12, deadline=None, derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_random_shapes(device, shape, dtype, channels_last, training, fork, act):
    # Two values a channel normalise to ±1 whatever they are: their gradient is rounding noise in any implementation.
    hypothesis.assume(shape[0] * shape[2] * shape[3] > 4)
    inputs = join_inputs(shape, dtype, fork=fork)
    check_join(inputs, device, channels_last=channels_last, training=training, act=act)


@both_modes
def test_empty_batch(device, training):
    inputs = join_inputs((0, 3, 4, 4), torch.float32, fork=True).map(lambda t: t.to(device))
    inputs.running_mean, inputs.running_var = torch.zeros(3, device=device), torch.ones(3, device=device)
    actual = run(inputs, training, "relu")
    assert actual["out"].shape == actual["grad_input"].shape == actual["grad_other"].shape == inputs.input.shape
    assert not actual["running_mean"].any() and actual["running_var"].eq(1).all()
    assert actual["num_batches_tracked"].item() == 3 + training
    assert actual["other_num_batches_tracked"].item() == int(training)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"other": torch.zeros(3, 4, 5, 1)}, ValueError, r"other must have shape \(3, 4, 5, 5\)"),
        ({"other": torch.zeros(3, 4, 5, 5, dtype=torch.int32)}, TypeError, "other must be floating"),
        ({"other": torch.zeros(3, 4, 5, 5, dtype=torch.complex64)}, TypeError, "other must be floating"),
        ({"input": torch.zeros(3, 4, 5, 5, dtype=torch.int32)}, TypeError, "input must be floating"),
        ({"other_weight": torch.zeros(3)}, ValueError, r"other_norm\.weight must have shape"),
        ({"running_var": torch.zeros(3)}, ValueError, r"norm\.running_var must have shape"),
        ({"other_running_mean": None}, ValueError, r"other_norm\.running_mean and other_norm\.running_var must both"),
        ({"other_num_batches_tracked": torch.zeros(2)}, ValueError, r"other_norm\.num_batches_tracked must be one"),
        ({"other": torch.zeros(3, 4, 5, 5, device="meta")}, ValueError, "other must be on"),
    ],
    ids=str,
)
def test_refused_before_anything_is_updated(device, change, error, message):
    inputs = join_inputs((3, 4, 5, 5), torch.float32).map(lambda t: t.to(device))
    before = inputs.map(torch.clone)
    for name, value in change.items():
        setattr(inputs, name, value if value is None or value.is_meta else value.to(device))
    with pytest.raises(error, match=message):
        batch_norm_add_batch_norm_act(inputs.input, inputs.other, inputs.norm("", True), inputs.norm("other_", True))
    for name in {"running_mean", "num_batches_tracked", "other_running_var"} - change.keys():
        assert torch.equal(getattr(inputs, name), getattr(before, name)), name


@pytest.mark.parametrize("norm", ["norm", "other_norm"])
def test_statistics_that_are_missing(norm):
    x, state = torch.randn(3, 4, 5, 5), Norm(torch.zeros(4), torch.ones(4))
    norms = {"norm": state, "other_norm": state} | {norm: Norm(None, None)}
    with pytest.raises(ValueError, match=rf"^{norm}\.running_mean .* when {norm}\.training is False"):
        batch_norm_add_batch_norm_act(x, x, **norms)


def test_float64_takes_the_reference(device, monkeypatch):
    inputs = join_inputs((3, 4, 5, 5), torch.float64, fork=True, parameter_dtype=torch.float64)
    inputs = inputs.map(lambda t: t.to(device))
    with pytest.raises(RuntimeError, match=r"no kernel for torch\.float64"):
        run(inputs, True, "relu")
    monkeypatch.setenv("FUSEDRES_BACKEND", "auto")
    expected = run_join(reference.batch_norm_add_batch_norm_act, inputs, True, "relu")
    for name, tensor in run(inputs, True, "relu").items():
        assert torch.equal(tensor, expected[name]), name
