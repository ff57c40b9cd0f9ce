"""batch_norm_act_global_avg_pool2d against the oracle: shapes, dtypes, layouts, modes, and what is saved."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
from torch import Tensor

from benchmarks.instruments.saved import saved_for_backward
from fusedres import reference
from fusedres.functional import batch_norm_act_global_avg_pool2d
from fusedres.kernels import tiling
from fusedres.kernels.layout import rows
from tests.oracle import (
    BatchNormInputs,
    Tensors,
    batch_norm_inputs,
    check_batch_norm,
    layout,
    run_batch_norm,
    to_double,
)
from tests.parameters import BOTH, DTYPES, both_layouts, both_modes, compiled_modes, covering, has_statistics

pytestmark = pytest.mark.usefixtures("triton_backend")

ONE_LAUNCH, TWO_LAUNCHES = (4, 16, 7, 7), (34, 5, 9, 7)
TWO_LAST = (9, 5, 9, 7)  # two launches in channels-last only
residual_or_not = pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
PATHS = {"one launch": (ONE_LAUNCH, True), "two launches": (TWO_LAUNCHES, True), "eval": (TWO_LAST, False)}
PATHS_LAST = PATHS | {"two launches": (TWO_LAST, True)}
every_path_channels_last = pytest.mark.parametrize(("shape", "training"), PATHS_LAST.values(), ids=PATHS_LAST)


def inputs_of(shape, dtype, training: bool, **options) -> BatchNormInputs:
    """With a cotangent [N, C, 1, 1], and no value so near 0 that rounding decides on its side of the ReLU."""
    inputs = batch_norm_inputs(shape, dtype, **options)
    inputs.grad, inputs.grad_sum = torch.randn(*shape[:2], 1, 1).to(inputs.grad.dtype), None
    moved = inputs.input if inputs.residual is None else inputs.residual
    for _ in range(20):
        near = _near(inputs, training, inputs.grad.dtype)
        if not near.any():
            return inputs
        moved[near] = (moved[near].double() + torch.rand(int(near.sum())).double() * 4 - 2).to(moved.dtype)
    raise AssertionError("values are near 0 still")


def _near(inputs: BatchNormInputs, training: bool, dtype: torch.dtype, eps: float = 1e-5) -> Tensor:
    x = inputs.map(to_double)
    if training or x.running_mean is None or x.running_var is None:
        var, mean = torch.var_mean(x.input, (0, 2, 3), correction=0)
    else:
        mean, var = x.running_mean, x.running_var
    scale = (1.0 if x.weight is None else x.weight) / (var + eps).sqrt()
    shift = ((0.0 if x.bias is None else x.bias) - mean * scale).view(-1, 1, 1)
    scaled, r = x.input * scale.view(-1, 1, 1), 0.0 if x.residual is None else x.residual
    size = scaled.abs() + shift.abs() + abs(r)
    return ((scaled + shift + r).abs() <= 8 * torch.finfo(dtype).eps * size).expand(x.input.shape)


def check(inputs: BatchNormInputs, device, **options) -> Tensors:
    given = {**options, "act": None}  # nothing to silence, the cotangent has no pixels

    def call(act=None, **arguments):
        return batch_norm_act_global_avg_pool2d(act=options["act"], **arguments)

    def eager(act=None, **arguments):
        return reference.batch_norm_act_global_avg_pool2d(act=options["act"], **arguments)

    return check_batch_norm(call, inputs, device, eager=eager, **given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@both_layouts
def test_names_of_the_tilings(channels_last, dtype):
    """The shapes above take as many launches as their names say, whatever the layout and the dtype."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    for shape in (ONE_LAUNCH, TWO_LAUNCHES, *([TWO_LAST] if channels_last else [])):
        view = rows(torch.empty(shape, memory_format=form))
        assert (tiling.images_on_chip(view, dtype.itemsize) is not None) == (shape == ONE_LAUNCH)


@pytest.mark.floor
@covering(path=PATHS, channels_last=BOTH, residual=BOTH, dtype=DTYPES)
def test_oracle(device, path, channels_last, residual, dtype):
    shape, training = path
    inputs = inputs_of(shape, dtype, training, residual=residual)
    check(inputs, device, channels_last=channels_last, training=training, act="relu")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(32, 2048, 7, 7), (8, 2048, 7, 7), (8, 67, 28, 28), (256, 64, 7, 7)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@residual_or_not
@both_layouts
@both_modes
def test_oracle_at_the_size_of_a_network(shape, training, channels_last, residual, dtype):
    inputs = inputs_of(shape, dtype, training, residual=residual)
    check(inputs, torch.device("cuda"), channels_last=channels_last, training=training, act="relu")


@covering(path=PATHS, channels_last=BOTH, residual=BOTH)
def test_without_activation(device, path, channels_last, residual):
    shape, training = path
    inputs = inputs_of(shape, torch.bfloat16, training, residual=residual)
    check(inputs, device, channels_last=channels_last, training=training, act=None)


SHAPES = [
    (1, 67, 7, 7),  # odd C, one image
    (2, 1, 3, 3),  # one channel
    (9, 8, 1, 1),  # an average of one
    (3, 40, 2, 3),  # many images in a tile
    (65, 3, 3, 3),  # more images than a tile has
    (2, 3, 41, 27),  # larger than a tile, and not a multiple of eight pixels
    (1, 8, 32, 32),  # larger than a tile, of whole tiles
]


@covering(training=BOTH, residual=BOTH, channels_last=BOTH, shape=SHAPES)
def test_shapes(device, training, channels_last, residual, shape):
    inputs = inputs_of(shape, torch.bfloat16, training, residual=residual)
    check(inputs, device, channels_last=channels_last, training=training, act="relu")


OPTIONS = [
    {"affine": False},
    {"bias": False},
    {"tracking": False},
    {"parameter_dtype": torch.bfloat16},
    {"residual": True, "residual_dtype": torch.float32},
    {"residual": True, "residual_dtype": torch.float16},
]


@covering(lambda path, options: has_statistics(training=path[1], options=options), path=PATHS_LAST, options=OPTIONS)
def test_parameters_and_dtypes(device, path, options):
    shape, training = path
    inputs = inputs_of(shape, torch.bfloat16, training, **options)
    check(inputs, device, channels_last=True, training=training, act="relu")


@every_path_channels_last
def test_sixteen_bit_residual_of_float32_input(device, shape, training):
    inputs = inputs_of(shape, torch.float32, training, residual=True, residual_dtype=torch.bfloat16)
    check(inputs, device, channels_last=True, training=training, act="relu")


@pytest.mark.parametrize("momentum", [None, 0.3])
@pytest.mark.parametrize("shape", [ONE_LAUNCH, TWO_LAST], ids=["one launch", "two launches"])
def test_momentum(device, shape, momentum):
    inputs = inputs_of(shape, torch.float32, True)
    actual = check(inputs, device, channels_last=True, training=True, act=None, momentum=momentum)
    assert actual["num_batches_tracked"].item() == 4


@pytest.mark.parametrize("shape", [(4, 40, 7, 7), (34, 20, 9, 7)], ids=["one launch", "two launches"])
@both_layouts
def test_large_mean(device, channels_last, shape):
    """An average keeps what rounding did to the channel's mean: much or little by chance, so over many channels."""
    inputs = inputs_of(shape, torch.float32, True, mean=1e3, std=1.0)
    check(inputs, device, channels_last=channels_last, training=True, act=None)


def test_the_activation_is_rounded_before_it_is_averaged(device):
    """Halves of the last bit would add up otherwise: eager averages what it has stored."""
    x = torch.zeros(2, 4, 5, 5, device=device, dtype=torch.bfloat16)
    residual = torch.full_like(x, 256.0)
    bias = torch.full((4,), 0.75, device=device)
    out = batch_norm_act_global_avg_pool2d(x, None, None, None, bias, training=True, residual=residual)
    assert out.eq(256.0).all()


@residual_or_not
@every_path_channels_last
def test_not_finite(device, shape, training, residual):
    inputs = inputs_of(shape, torch.float32, training, residual=residual)
    inputs.input[1, 2, 3, 3] = float("nan")
    inputs.grad[0, 1], inputs.grad[2, 3] = float("inf"), float("nan")
    if inputs.residual is not None:
        inputs.residual[0, 1, 2, 2] = float("nan")
    actual = run_batch_norm(batch_norm_act_global_avg_pool2d, inputs.map(layout(device, True)), training, "relu")
    exact = run_batch_norm(reference.batch_norm_act_global_avg_pool2d, inputs.map(to_double), training, "relu")
    for name in ("out", "grad_input", *(["grad_residual"] if residual else [])):
        assert torch.equal(actual[name].isnan().cpu(), exact[name].isnan()), name
        assert torch.equal(actual[name].isinf().cpu(), exact[name].isinf()), name


@residual_or_not
@both_layouts
def test_exact_zeros_get_no_gradient(device, channels_last, residual):
    inputs = inputs_of((4, 6, 5, 5), torch.float32, True, residual=residual, affine=False)
    for t in (inputs.input, inputs.residual):
        if t is not None:
            t[:, 2] = 0
    actual = run_batch_norm(batch_norm_act_global_avg_pool2d, inputs.map(lambda t: t.to(device)), True, "relu")
    assert not actual["out"][:, 2].any() and not actual["grad_input"][:, 2].any()
    assert not residual or not actual["grad_residual"][:, 2].any()


LEAVES = ("input", "residual", "weight", "bias")


@covering(path=PATHS_LAST, act=["relu", None], needed=LEAVES)
def test_partial_gradients(device, path, act, needed):
    """One alone has the gradient that it has among all, and what needs none gets none."""
    shape, training = path
    inputs = inputs_of(shape, torch.float32, training, residual=True).map(layout(device, True))
    everything = run_batch_norm(batch_norm_act_global_avg_pool2d, inputs, training, act)
    given = inputs.map(lambda t: t.clone())
    leaves = {name: getattr(given, name).requires_grad_(name == needed) for name in LEAVES}
    out = batch_norm_act_global_avg_pool2d(
        given.input, given.running_mean, given.running_var, given.weight, given.bias, training,
        residual=given.residual, act=act,
    )  # fmt: skip
    out.backward(given.grad)
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [needed]
    assert torch.equal(leaves[needed].grad, everything[f"grad_{needed}"])


@both_modes
def test_strided(device, training):
    """Slices, mixed memory formats, an expanded gradient, and vectors that are columns of a matrix."""
    x = torch.randn(4, 16, 9, 14, device=device)[:, ::2, 1:, ::2]
    r = torch.randn(4, 8, 8, 7, device=device).to(memory_format=torch.channels_last)
    columns = torch.rand(8, 8, device=device)
    weight, bias, mean, var = (columns[:, 2 * i] for i in range(4))
    beside = columns[:, 1::2].clone()
    leaves = [t.detach().requires_grad_() for t in (x, r)]
    exact = [t.detach().double().requires_grad_() for t in (x, r)]
    buffers = [t.double() for t in (mean, var)]
    expected = reference.batch_norm_act_global_avg_pool2d(
        exact[0], *buffers, weight.double(), bias.double(), training, residual=exact[1], act="relu"
    )
    actual = batch_norm_act_global_avg_pool2d(
        leaves[0], mean, var, weight, bias, training, residual=leaves[1], act="relu"
    )
    for out in (actual, expected):
        out.mean().backward()
    pairs = [(actual, expected), (mean, buffers[0]), (var, buffers[1])]
    for got, want in [*pairs, *((mine.grad, its.grad) for mine, its in zip(leaves, exact, strict=True))]:
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(columns[:, 1::2], beside)


@both_modes
def test_empty_batch(device, training):
    x = torch.randn(0, 3, 4, 4, device=device, requires_grad=True)
    mean, var, count = torch.zeros(3, device=device), torch.ones(3, device=device), torch.tensor(0, device=device)
    out = batch_norm_act_global_avg_pool2d(x, mean, var, training=training, act="relu", num_batches_tracked=count)
    out.backward(torch.empty_like(out))
    assert out.shape == (0, 3, 1, 1) and x.grad.shape == x.shape
    assert not mean.any() and count.item() == int(training)


@residual_or_not
@both_modes
def test_saved_bytes(device, training, residual):
    """The statistics, and with a residual one bit an element, of whole bytes for every image; no activation."""
    inputs = inputs_of((3, 4, 5, 3), torch.bfloat16, training, residual=residual).map(lambda t: t.to(device))
    owned = [t.requires_grad_() for t in (inputs.input, inputs.residual, inputs.weight, inputs.bias) if t is not None]
    owned += [inputs.running_mean, inputs.running_var]

    def forward() -> Tensor:
        return batch_norm_act_global_avg_pool2d(
            inputs.input, *owned[-2:], inputs.weight, inputs.bias, training, residual=inputs.residual, act="relu"
        )

    assert saved_for_backward(forward, owned).saved == 4 * 4 * 4 + (3 * 2 * 4 if residual else 0)


def test_what_is_refused(device, monkeypatch):
    x = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="4 dimensions"):
        batch_norm_act_global_avg_pool2d(x[0], None, None, training=True)
    with pytest.raises(ValueError, match="act must be one of"):
        batch_norm_act_global_avg_pool2d(x, None, None, training=True, act="gelu")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm_act_global_avg_pool2d(x[:1, :, :1, :1], None, None, training=True)
    with pytest.raises(RuntimeError, match=r"no kernel for torch\.float64"):
        batch_norm_act_global_avg_pool2d(x.double(), None, None, training=True)
    out = batch_norm_act_global_avg_pool2d(x, None, None, training=True, act="relu")
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(out, x, torch.randn_like(out), create_graph=True)
    monkeypatch.setenv("FUSEDRES_BACKEND", "auto")
    wide = x.detach().double().requires_grad_()
    out = batch_norm_act_global_avg_pool2d(wide, None, None, training=True, act="relu")
    assert out.dtype == torch.float64 and torch.autograd.gradcheck(
        lambda t: batch_norm_act_global_avg_pool2d(t, None, None, training=True), wide
    )


def test_version_counters(device):
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
    before = mean._version, var._version
    batch_norm_act_global_avg_pool2d(torch.randn(2, 4, 3, 3, device=device), mean, var, training=True)
    assert (mean._version, var._version) == (before[0] + 1, before[1] + 1)


@covering(training=BOTH, channels_last=BOTH, residual=BOTH, grad=BOTH)
def test_opcheck(device, training, channels_last, residual, grad):
    t = inputs_of((3, 4, 5, 3), torch.float32, training, residual=residual).map(layout(device, channels_last))
    for leaf in (t.input, t.residual, t.weight, t.bias):
        if leaf is not None:
            leaf.requires_grad_(grad)
    given = (t.input, t.residual, t.weight, t.bias, t.running_mean, t.running_var)
    name = "batch_norm_act_global_avg_pool2d" + ("" if training else "_inference")
    operator = getattr(torch.ops.fusedres, name).default
    torch.library.opcheck(operator, (*given, *((t.num_batches_tracked, 0.1) if training else ()), 1e-5, "relu", grad))


@pytest.mark.parametrize("frozen", [True, False])
def test_opcheck_backward(device, frozen):
    x, stats = torch.randn(3, 4, 5, 3, device=device), torch.rand(4, 4, device=device)
    mask = torch.randint(0, 256, (3 * 2 * 4,), dtype=torch.uint8, device=device)
    torch.library.opcheck(
        torch.ops.fusedres.batch_norm_act_global_avg_pool2d_backward.default,
        (
            torch.randn(3, 4, 1, 1, device=device),
            None,
            x,
            stats,
            mask,
            "relu",
            frozen,
            *2 * [x.dtype],
            torch.float32,
            None,
        ),
    )


@compiled_modes
def test_compiled(device, training, backend):
    """fullgraph, running statistics included, and no recompilation from step to step."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)

    def run(x: Tensor, residual: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return batch_norm_act_global_avg_pool2d(x, mean, var, training=training, residual=residual, act="relu") * 2

    functions = run, torch.compile(run, fullgraph=True, backend=counter)
    buffers = [[torch.zeros(8, device=device), torch.ones(8, device=device)] for _ in functions]
    for _ in range(2):
        x, residual = torch.randn(2, 4, 8, 5, 5, device=device)
        found = []
        for function, pair in zip(functions, buffers, strict=True):
            leaves = [t.clone().requires_grad_() for t in (x, residual)]
            out = function(*leaves, *pair)
            out.backward(x.mean((2, 3), keepdim=True))
            found.append([out, *(leaf.grad for leaf in leaves), *pair])
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert counter.frame_count == 1
