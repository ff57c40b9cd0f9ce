"""forked_batch_norm_act: one output under two names, whose two gradients meet inside the backward."""

from __future__ import annotations

import functools
from unittest import mock

import pytest
import torch
import torch._dynamo
from torch import Tensor

from benchmarks.instruments.saved import saved_for_backward
from fusedres import functional, reference
from fusedres.functional import Norm, batch_norm_act, forked_batch_norm_act
from fusedres.kernels import batch_norm_backward, tiling
from fusedres.kernels.layout import rows
from tests.oracle import (
    BatchNormInputs,
    Tensors,
    batch_norm_inputs,
    check_batch_norm,
    run_batch_norm,
    silence_boundary,
)
from tests.parameters import BOTH, DTYPES, both_layouts, both_modes, compiled_modes, covering

pytestmark = pytest.mark.usefixtures("triton_backend")

ONE_LAUNCH, TWO_LAUNCHES = (4, 16, 6, 6), (16, 5, 17, 9)
TILINGS = {"one launch": ONE_LAUNCH, "two launches": TWO_LAUNCHES}
both_tilings = pytest.mark.parametrize("shape", TILINGS.values(), ids=TILINGS)
PATHS = {"one launch": (ONE_LAUNCH, True), "two launches": (TWO_LAUNCHES, True), "eval": (ONE_LAUNCH, False)}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)  # a shape, and whether it is in training
ACTS = ["relu", None]
residual_or_not = pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])


def split(input: Tensor, running_mean, running_var, weight, bias, residual, act, **options) -> tuple[Tensor, Tensor]:
    """As the oracle calls a function: the arguments by name, two outputs."""
    norm = Norm(running_mean, running_var, weight, bias, **options)
    return forked_batch_norm_act(input, norm, residual=residual, act=act)


def eager(**arguments) -> tuple[Tensor, Tensor]:
    out = reference.batch_norm_act(**arguments)
    return out, out


def inputs_of(shape, dtype, **options) -> BatchNormInputs:
    """With a cotangent for either name."""
    inputs = batch_norm_inputs(shape, dtype, **options)
    inputs.grad_sum = torch.randn(shape).to(inputs.grad.dtype)
    return inputs


def check(inputs: BatchNormInputs, device, **options) -> Tensors:
    """The oracle rule; where rounding decides the side of the ReLU, both cotangents are zero."""
    if options["act"] is not None:
        silence_boundary(inputs, options["training"])
        inputs.grad_sum[inputs.grad == 0] = 0
    return check_batch_norm(split, inputs, device, eager=eager, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@both_tilings
@both_layouts
def test_names_of_the_tilings(channels_last, shape, dtype):
    """The shapes below take as many launches as their names say, whatever the layout and the dtype."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    view = rows(torch.empty(shape, memory_format=form))
    assert (tiling.on_chip(view, dtype.itemsize) is not None) == (shape == ONE_LAUNCH)


@pytest.mark.floor
@covering(path=PATHS, channels_last=BOTH, residual=BOTH, dtype=DTYPES)
def test_oracle(device, path, channels_last, residual, dtype):
    shape, training = path
    inputs = inputs_of(shape, dtype, residual=residual)
    check(inputs, device, channels_last=channels_last, training=training, act="relu")


@residual_or_not
@every_path
def test_without_activation(device, path, residual):
    """The gradient of a residual is then the sum of the two, which nothing else has written."""
    shape, training = path
    inputs = inputs_of(shape, torch.bfloat16, residual=residual)
    check(inputs, device, channels_last=True, training=training, act=None)


@covering(training=BOTH, residual=BOTH, shape=[(2, 1, 3, 3), (5, 3, 1, 1), (1, 67, 5, 3), (6, 10), (2, 3, 4, 5, 2)])
def test_shapes(device, training, residual, shape):
    inputs = inputs_of(shape, torch.bfloat16, residual=residual)
    check(inputs, device, channels_last=True, training=training, act="relu")


MIXED = [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)]


@covering(path=PATHS, act=ACTS, dtypes=MIXED)
def test_mixed_dtypes(device, path, act, dtypes):
    (shape, training), (dtype, residual_dtype) = path, dtypes
    inputs = inputs_of(shape, dtype, residual=True, residual_dtype=residual_dtype)
    actual = check(inputs, device, channels_last=True, training=training, act=act)
    assert (actual["grad_input"].dtype, actual["grad_residual"].dtype) == (dtype, residual_dtype)


def outputs_of(inputs: BatchNormInputs, training: bool, act: str | None, needed: set[str]) -> tuple[Tensors, Tensors]:
    """Leaves and outputs by name, of copies of the inputs."""
    given = inputs.map(lambda t: t.clone())
    leaves = {name: getattr(given, name) for name in ("input", "residual", "weight", "bias")}
    leaves = {name: leaf.requires_grad_(name in needed) for name, leaf in leaves.items() if leaf is not None}
    norm = Norm(given.running_mean, given.running_var, given.weight, given.bias, training)
    out, fork = forked_batch_norm_act(given.input, norm, residual=given.residual, act=act)
    return leaves, {"out": out, "fork": fork}


LEAVES = {"input", "residual", "weight", "bias"}


@covering(training=BOTH, residual=BOTH, used=["out", "fork"], act=ACTS)
def test_one_gradient(device, training, residual, used, act):
    """The other is None: an ordinary backward, bit for bit."""
    inputs = inputs_of(ONE_LAUNCH, torch.bfloat16, residual=residual).map(lambda t: t.to(device))
    expected = run_batch_norm(batch_norm_act, inputs, training, act)
    leaves, outputs = outputs_of(inputs, training, act, LEAVES)
    outputs[used].backward(inputs.grad)
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, expected[f"grad_{name}"]), name


@covering(path=PATHS, act=ACTS, needed=sorted(LEAVES))
def test_partial_gradients(device, path, act, needed):
    """One alone has the gradient that it has among all, and what needs none gets none."""
    shape, training = path
    inputs = inputs_of(shape, torch.float32, residual=True).map(lambda t: t.to(device))
    grads = [inputs.grad, inputs.grad_sum]
    everything, outputs = outputs_of(inputs, training, act, LEAVES)
    torch.autograd.backward(list(outputs.values()), grads)
    alone, outputs = outputs_of(inputs, training, act, {needed})
    torch.autograd.backward(list(outputs.values()), grads)
    assert [name for name, leaf in alone.items() if leaf.grad is not None] == [needed]
    assert torch.equal(alone[needed].grad, everything[needed].grad)


def test_no_gradient_at_all(device):
    inputs = inputs_of(ONE_LAUNCH, torch.float32).map(lambda t: t.to(device))
    _, outputs = outputs_of(inputs, True, "relu", set())
    assert outputs["out"] is outputs["fork"] and not outputs["out"].requires_grad
    with torch.no_grad():
        _, outputs = outputs_of(inputs, True, "relu", LEAVES)
    assert outputs["out"] is outputs["fork"] and not outputs["out"].requires_grad


def test_the_reference_forks_nothing(device, monkeypatch):
    monkeypatch.setenv("FUSEDRES_BACKEND", "reference")
    inputs = inputs_of(ONE_LAUNCH, torch.float32).map(lambda t: t.to(device))
    _, outputs = outputs_of(inputs, True, "relu", LEAVES)
    assert outputs["out"] is outputs["fork"]


def test_one_memory_under_two_names(device):
    inputs = inputs_of(ONE_LAUNCH, torch.float32, residual=True).map(lambda t: t.to(device))
    _, outputs = outputs_of(inputs, True, "relu", LEAVES)
    out, fork = outputs.values()
    assert out.data_ptr() == fork.data_ptr() and out.stride() == fork.stride()
    assert out.grad_fn is fork.grad_fn and out.output_nr != fork.output_nr


@pytest.mark.parametrize(
    ("kind", "shape"), [("expanded", ONE_LAUNCH), ("other layout", TWO_LAUNCHES), ("slice", ONE_LAUNCH)]
)
def test_second_gradient_of_another_layout(device, shape, kind):
    """Right whichever of the two it is; autograd hands both on as they come."""
    inputs = inputs_of(shape, torch.float32, residual=True)
    inputs = inputs.map(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)
    inputs = inputs.map(lambda t: t.to(device))
    odd = {
        "expanded": torch.randn(1, shape[1], 1, 1, device=device).expand(shape),
        "other layout": inputs.grad_sum.contiguous(),
        "slice": torch.randn(*shape[:3], 2 * shape[3], device=device)[..., ::2],
    }[kind]
    for grads in ([inputs.grad, odd], [odd, inputs.grad], [odd, odd]):
        found = []
        for dense in (False, True):
            leaves, outputs = outputs_of(inputs, True, "relu", LEAVES)
            given = [torch.empty_like(outputs["out"]).copy_(g) if dense else g for g in grads]
            torch.autograd.backward(list(outputs.values()), given)
            found.append(leaves)
        for name, leaf in found[0].items():
            assert torch.equal(leaf.grad, found[1][name].grad), name


def test_second_gradient_of_another_dtype(device):
    """Of the operator itself; autograd casts to the output's."""
    x, stats = torch.randn(2, *ONE_LAUNCH, device=device)[0], torch.rand(4, ONE_LAUNCH[1], device=device)
    grad, other = torch.randn(2, *ONE_LAUNCH, device=device).to(torch.bfloat16)
    found = [
        torch.ops.fusedres.batch_norm_act_backward(
            grad, fork, x, stats, None, "relu", False, True, x.dtype, None, torch.float32, None
        )
        for fork in (other, other.float())
    ]
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


@residual_or_not
@every_path
def test_not_finite(device, path, residual):
    """NaN and infinity of either gradient arrive where eager's sum has them, and nothing passes a closed ReLU."""
    shape, training = path
    inputs = inputs_of(shape, torch.float32, residual=residual)
    inputs.grad[1, 2, 3, 3], inputs.grad_sum[0, 1, 2, 2] = float("nan"), float("inf")
    inputs.grad[2, 3, 1, 1], inputs.grad_sum[2, 3, 1, 1] = float("inf"), -float("inf")
    actual = run_batch_norm(split, inputs.map(lambda t: t.to(device)), training, "relu")
    expected = run_batch_norm(eager, inputs, training, "relu")
    for name in ("grad_input", "grad_bias", *(["grad_residual"] if residual else [])):
        assert torch.equal(actual[name].isnan().cpu(), expected[name].isnan()), name


@both_modes
def test_empty_batch(device, training):
    x = torch.randn(0, 3, 4, 4, device=device, requires_grad=True)
    norm = Norm(torch.zeros(3, device=device), torch.ones(3, device=device), training=training)
    outputs = forked_batch_norm_act(x, norm, residual=x, act="relu")
    torch.autograd.backward(outputs, [torch.empty_like(x)] * 2)
    assert x.grad.shape == x.shape


@residual_or_not
@both_modes
def test_saved_bytes(device, training, residual):
    """As without a fork: the second name is no second memory."""
    inputs = inputs_of((3, 4, 5, 3), torch.bfloat16, residual=residual).map(lambda t: t.to(device))
    for leaf in (inputs.input, inputs.residual, inputs.weight, inputs.bias):
        if leaf is not None:
            leaf.requires_grad_()
    norm = Norm(inputs.running_mean, inputs.running_var, inputs.weight, inputs.bias, training)
    owned = [t for t in (inputs.input, inputs.residual, *norm.tensors) if t is not None]

    def apart():
        return batch_norm_act(inputs.input, *norm[:7], residual=inputs.residual, act="relu")

    def squared():
        """Both names are saved by what reads them."""
        out, fork = forked_batch_norm_act(inputs.input, norm, residual=inputs.residual, act="relu")
        return out.square() + fork.square()

    def forked():
        return forked_batch_norm_act(inputs.input, norm, residual=inputs.residual, act="relu")[1]

    plain, names = saved_for_backward(apart, owned), saved_for_backward(forked, owned)
    assert names == plain
    both = saved_for_backward(squared, owned)
    assert both.saved == plain.saved + inputs.input.numel() * inputs.input.itemsize


@pytest.mark.parametrize("changed", ["out", "fork"])
@pytest.mark.parametrize("saved", ["out", "fork"])
def test_a_name_changed_in_place_is_noticed(device, saved, changed):
    """By whoever saved the memory, under whichever name, as in eager."""
    inputs = inputs_of(ONE_LAUNCH, torch.float32, residual=True).map(lambda t: t.to(device))
    _, outputs = outputs_of(inputs, True, "relu", LEAVES)
    squared = outputs[saved].square()
    with torch.no_grad():
        outputs[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()


def test_double_backward_is_refused(device):
    inputs = inputs_of(ONE_LAUNCH, torch.float32).map(lambda t: t.to(device))
    for used in (["out"], ["fork"], ["out", "fork"]):
        leaves, outputs = outputs_of(inputs, True, "relu", LEAVES)
        with pytest.raises(NotImplementedError, match="double backward"):
            torch.autograd.grad(
                [outputs[name] for name in used], leaves["input"], [inputs.grad] * len(used), create_graph=True
            )


def test_what_is_refused(device):
    x = torch.randn(2, 3, 4, 4, device=device)
    with pytest.raises(ValueError, match="act must be one of"):
        forked_batch_norm_act(x, Norm(None, None, training=True), act="gelu")
    assert "forked_batch_norm_act" not in functional.__all__


@residual_or_not
@both_modes
def test_opcheck(device, training, residual):
    """With a fork; test_ops has the operators without."""
    t = inputs_of((3, 4, 5, 3), torch.float32, residual=residual).map(lambda t: t.to(device))
    for leaf in (t.input, t.residual, t.weight, t.bias):
        if leaf is not None:
            leaf.requires_grad_()
    given = (t.input, t.residual, t.weight, t.bias, t.running_mean, t.running_var)
    if training:
        arguments = (*given, t.num_batches_tracked, 0.1, 1e-5, "relu", True, True)
        torch.library.opcheck(torch.ops.fusedres.batch_norm_act.default, arguments)
    else:
        arguments = (*given, 1e-5, "relu", True, True)
        torch.library.opcheck(torch.ops.fusedres.batch_norm_act_inference.default, arguments)


@pytest.mark.parametrize("act", ["relu", None])
@pytest.mark.parametrize("frozen", [True, False])
def test_opcheck_backward(device, frozen, act):
    grad, fork, x = torch.randn(3, 3, 4, 5, 3, device=device)
    stats = torch.rand(4, 4, device=device)
    mask = torch.randint(0, 256, (6 * 4,), dtype=torch.uint8, device=device)
    torch.library.opcheck(
        torch.ops.fusedres.batch_norm_act_backward.default,
        (grad, fork, x, stats, mask, act, frozen, True, x.dtype, x.dtype, torch.float32, None),
    )


def two_readers(x: Tensor, residual: Tensor, *buffers: Tensor, training: bool) -> Tensor:
    """Two layers: both names of the first are read, by the layer behind it and by its skip."""
    first, second = (Norm(*pair, training=training) for pair in (buffers[:2], buffers[2:]))
    out, fork = forked_batch_norm_act(x, first, residual=residual, act="relu")
    return batch_norm_act(out.square(), *second[:7], residual=fork, act="relu")


@compiled_modes
def test_compiled(device, training, backend):
    """fullgraph, and the two gradients still arrive apart."""
    torch._dynamo.reset()
    calls = []
    run = functools.partial(two_readers, training=training)
    x, residual, grad = torch.randn(3, 4, 8, 5, 5, device=device)
    found = []
    for function in (run, torch.compile(run, fullgraph=True, backend=backend)):
        leaves = [t.clone().requires_grad_() for t in (x, residual)]
        buffers = [make(8, device=device) for make in (torch.zeros, torch.ones) * 2]
        with mock.patch.object(
            batch_norm_backward, "batch_norm_act_backward", wraps=batch_norm_backward.batch_norm_act_backward
        ) as noted:
            function(*leaves, *buffers).backward(grad)
        calls.append([call.kwargs["fork"] for call in noted.call_args_list])
        found.append([*(leaf.grad for leaf in leaves), *buffers])
    assert calls == [[False, True]] * 2
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("used", [("out",), ("fork",), ("out", "fork")], ids="+".join)
def test_compiled_outputs(device, used):
    """Names that leave the graph: wherever the gradients are added, their sum is right."""
    torch._dynamo.reset()

    def run(x: Tensor) -> dict[str, Tensor]:
        out, fork = forked_batch_norm_act(x, Norm(None, None, training=True), act="relu")
        return {"out": out, "fork": fork}

    x, *grads = torch.randn(3, *ONE_LAUNCH, device=device)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for function, leaf in zip((run, torch.compile(run, fullgraph=True, backend="aot_eager")), leaves, strict=True):
        outputs = function(leaf)
        torch.autograd.backward([outputs[name] for name in used], grads[: len(used)])
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
