"""layer_norm_linear_act and linear_layer_norm_act against the oracle, and what they promise beside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime import interpreter

from fusedres import functional, reference
from tests.oracle import (
    LINEAR_LN,
    LN_LINEAR,
    LinearInputs,
    assert_as_good_as_eager,
    check_linear,
    linear_inputs,
    run_linear,
    silence_linear_boundary,
    to_double,
)
from tests.parameters import DTYPES, covering

pytestmark = pytest.mark.usefixtures("triton_backend")

ORDERS = [LN_LINEAR, LINEAR_LN]
PATHS = {"one kernel": (40, 52), "vendor product": (1100, 24)}
both_orders = pytest.mark.parametrize("order", ORDERS)
both_paths = pytest.mark.parametrize("features", PATHS.values(), ids=PATHS)


@pytest.fixture
def tf32() -> Iterator[None]:
    """float32 products in TF32, which an interpreter and a CPU compute in float32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@contextmanager
def recorded_kernels() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Names and arguments of the kernels that are interpreted."""
    seen: list[tuple[str, dict[str, Any]]] = []
    run = interpreter.GridExecutor.__call__

    def record(executor, *args, **kwargs):
        seen.append((executor.fn.__name__, dict(zip(executor.arg_names, args, strict=False)) | kwargs))
        return run(executor, *args, **kwargs)

    with mock.patch.object(interpreter.GridExecutor, "__call__", record):
        yield seen


@pytest.mark.floor
@covering(features=PATHS, order=ORDERS, dtype=DTYPES, act=["relu", None])
@pytest.mark.usefixtures("tf32")
def test_oracle(device, order, features, dtype, act):
    check_linear(order, linear_inputs(order, (33,), features, dtype), device, act)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [(24, 52), (40, 52), (64, 33), (65, 33)], ids=str)
@both_orders
def test_float32_products(device, order, features, dtype):
    """On both sides of the widths up to which a kernel multiplies float32 exactly."""
    check_linear(order, linear_inputs(order, (21,), features, dtype), device, "relu")


@covering(features=PATHS, act=["relu", None], dtype=DTYPES, residual_dtype=DTYPES)
@pytest.mark.usefixtures("tf32")
def test_residual(device, features, act, dtype, residual_dtype):
    inputs = linear_inputs(LINEAR_LN, (9,), features, dtype, residual=True, residual_dtype=residual_dtype)
    actual = check_linear(LINEAR_LN, inputs, device, act)
    assert actual["out"].dtype == torch.promote_types(dtype, residual_dtype)


@covering(features=PATHS, order=ORDERS, lead=[(), (1,), (2, 3), (2, 1, 3, 5), (129,)])
def test_leading_shapes(device, order, features, lead):
    actual = check_linear(order, linear_inputs(order, lead, features, torch.bfloat16), device, "relu")
    assert actual["out"].shape == (*lead, features[0])


SHAPES = [  # rows, and features out and in
    (5, (1, 1)),  # one value a row
    (7, (1, 300)),  # one feature out
    (7, (300, 1)),  # one feature in
    (70, (3, 5)),  # smaller than a tile in either direction
    (70, (17, 67)),  # odd, and several row tiles
    (150, (102, 96)),  # several tiles in every direction, the last ragged
    (3, (512, 512)),  # the widest for one kernel, whole tiles
    (20, (100, 1000)),  # one kernel's longest sums, near enough
    (2, (8192, 24)),  # the widest rows, out
    (3, (24, 8192)),  # and in
    (3, (67, 5003)),  # wide and odd
    (3, (5003, 67)),
]


@covering(order=ORDERS, dtype=DTYPES[:2], shape=SHAPES)
@pytest.mark.usefixtures("tf32")
def test_shapes(device, order, shape, dtype):
    rows, features = shape
    check_linear(order, linear_inputs(order, (rows,), features, dtype), device, "relu")


@pytest.mark.slow
def test_long_sums_of_many_rows(device):
    """LayerNorm first, more than 1024 features in are for one kernel again from 1024 rows on."""
    check_linear(LN_LINEAR, linear_inputs(LN_LINEAR, (1025,), (10, 1030), torch.bfloat16), device, "relu")


OPTIONS = [
    {"bias": False},
    {"affine": False},
    {"ln_bias": False},
    {"bias": False, "affine": False},
    {"parameter_dtype": torch.float32},
]


@covering(features=PATHS, order=ORDERS, options=OPTIONS)
def test_parameters(device, order, features, options):
    inputs = linear_inputs(order, (33,), features, torch.bfloat16, **options)
    # Eager on a GPU does not mix the dtypes of input and parameters, on a CPU it does.
    check_linear(order, inputs, device, "relu", torch.device("cpu"))


@covering(features=PATHS, order=ORDERS, dtype=DTYPES)
@pytest.mark.usefixtures("tf32")
def test_large_mean(device, order, features, dtype):
    """|mean|/std of 1e3, where 16 bits leave that much of the values."""
    std = {torch.float32: 1.0, torch.float16: 1.0, torch.bfloat16: 8.0}[dtype]
    inputs = linear_inputs(order, (33,), features, dtype, mean=1e3 * std, std=std)
    check_linear(order, inputs, device, None)


@covering(features=PATHS, order=ORDERS, affine=[True, False], value=[0.0, 300.0, 60000.0])
def test_constant_rows(device, order, features, affine, value):
    """rstd is at its largest; columns that only the tile has must not come in."""
    inputs = linear_inputs(order, (6,), features, torch.float16, affine=affine)
    if order == LN_LINEAR:
        inputs.input.fill_(value)
    else:
        inputs.weight.zero_()
        assert inputs.bias is not None
        inputs.bias.fill_(value)
    actual = run_linear(functional, order, inputs.map(lambda t: t.to(device)), None)
    exact = run_linear(reference, order, inputs.map(to_double), None)
    torch.testing.assert_close(actual["out"].double().cpu(), exact["out"], rtol=4e-3, atol=4e-3)
    assert all(tensor.isfinite().all() for tensor in actual.values())


@covering(features=PATHS, order=ORDERS, value=[float("nan"), float("inf"), -float("inf")])
def test_not_finite(device, order, features, value):
    inputs = linear_inputs(order, (6,), features, torch.bfloat16, residual=order == LINEAR_LN)
    inputs.input[2, 3] = value
    actual = run_linear(functional, order, inputs.map(lambda t: t.to(device)), "relu")
    exact = run_linear(reference, order, inputs.map(to_double), "relu")
    assert actual["out"].isnan().any()
    for name in ("out", "grad_input", "grad_weight"):
        assert torch.equal(actual[name].isnan().cpu(), exact[name].isnan()), name


NAMES = ("input", "weight", "bias", "ln_weight", "ln_bias", "residual")


def call(order: str, given: LinearInputs, act: str | None = "relu") -> Tensor:
    if order == LN_LINEAR:
        return functional.layer_norm_linear_act(
            given.input, given.ln_weight, given.ln_bias, given.weight, given.bias, act=act
        )
    return functional.linear_layer_norm_act(
        given.input, given.weight, given.bias, given.ln_weight, given.ln_bias, act=act, residual=given.residual
    )


@covering(
    lambda order, needed, **_: (order, needed) != (LN_LINEAR, "residual"),  # which there is none in this order
    order=ORDERS,
    needed=NAMES,
    act=["relu", None],
)
def test_partial_gradients(device, order, needed, act):
    """One alone has the gradient that it has among all, and what needs none gets none."""
    inputs = linear_inputs(order, (9,), (40, 52), torch.float32, residual=order == LINEAR_LN)
    inputs = inputs.map(lambda t: t.to(device))
    everything = run_linear(functional, order, inputs, act)
    given = inputs.map(lambda t: t.clone())
    getattr(given, needed).requires_grad_()
    call(order, given, act).backward(inputs.grad)
    leaves = {name: getattr(given, name) for name in NAMES}
    assert [name for name, leaf in leaves.items() if leaf is not None and leaf.grad is not None] == [needed]
    assert torch.equal(leaves[needed].grad, everything[f"grad_{needed}"])


@both_orders
@both_paths
def test_strided(device, order, features):
    """Transposed weights, slices and expanded gradients and vectors: copied where needed, right always."""
    dense = linear_inputs(order, (4, 6), features, torch.float32, residual=order == LINEAR_LN)

    def spread(t: Tensor) -> Tensor:
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), 7.0)
        wide[..., ::2] = t
        return wide[..., ::2]

    strided = dense.map(lambda t: spread(t).to(device))
    strided.weight = dense.weight.t().contiguous().t().to(device)
    strided.input = strided.input.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.weight.is_contiguous()
    leaves = strided.map(lambda t: t.detach().requires_grad_())
    out = call(order, leaves)
    out.mean().backward()
    dense.grad = torch.full_like(dense.grad, 1 / out.numel())
    exact = run_linear(reference, order, dense.map(to_double), "relu")
    torch.testing.assert_close(out.double().cpu(), exact["out"], rtol=1e-5, atol=1e-5)
    for name in NAMES:
        leaf = getattr(leaves, name)
        if leaf is not None:
            torch.testing.assert_close(leaf.grad.double().cpu(), exact[f"grad_{name}"], rtol=1e-4, atol=1e-6)


@both_orders
@pytest.mark.parametrize("lead", [(0,), (3, 0)], ids=str)
def test_no_rows(device, order, lead):
    inputs = linear_inputs(order, lead, (5, 7), torch.float32, residual=order == LINEAR_LN)
    actual = run_linear(functional, order, inputs.map(lambda t: t.to(device)), "relu")
    assert actual["out"].shape == (*lead, 5)
    assert not actual["grad_weight"].any() and not actual["grad_ln_weight"].any()


@hypothesis.given(
    order=st.sampled_from([LN_LINEAR, LINEAR_LN]),
    rows=st.integers(1, 80),
    features=st.tuples(st.integers(2, 150), st.integers(2, 150)),
    dtype=st.sampled_from(DTYPES),
    act=st.sampled_from(["relu", None]),
    residual=st.booleans(),
    bias=st.booleans(),
)
@hypothesis.settings(
    max_examples=15, deadline=None, derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)  # fmt: skip
@pytest.mark.usefixtures("tf32")
def test_random_shapes(device, order, rows, features, dtype, act, residual, bias):
    # Two values normalise to ±1 whatever they are: their gradient is rounding noise in any implementation.
    hypothesis.assume((features[1] if order == LN_LINEAR else features[0]) > 3)
    inputs = linear_inputs(order, (rows,), features, dtype, bias=bias, residual=residual and order == LINEAR_LN)
    check_linear(order, inputs, device, act)


@both_orders
def test_more_features_than_a_row_kernel_holds(device, order, monkeypatch):
    features = (4, 8193) if order == LN_LINEAR else (8193, 4)
    inputs = linear_inputs(order, (2,), features, torch.float32).map(lambda t: t.to(device))
    with pytest.raises(RuntimeError, match="more than 8192 features"):
        run_linear(functional, order, inputs, "relu")
    monkeypatch.setenv("FUSEDRES_BACKEND", "auto")
    actual, expected = (run_linear(module, order, inputs, "relu") for module in (functional, reference))
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("order", "features", "kernels"),
    [
        (LN_LINEAR, (40, 52), ["_layer_norm_linear_fwd_kernel"]),
        (LN_LINEAR, (1100, 24), ["_layer_norm_fwd_kernel"]),
        (LINEAR_LN, (40, 52), ["_linear_layer_norm_fwd_kernel"]),
        (LINEAR_LN, (1100, 24), ["_layer_norm_fwd_kernel"]),
    ],
)
def test_launches(order, features, kernels):
    """One launch forward; the mask and the bias gradient one, LayerNorm's gradients one and a small one."""
    inputs = linear_inputs(order, (9,), features, torch.bfloat16)
    with recorded_kernels() as seen:
        run_linear(functional, order, inputs, "relu")
    masks = ["_relu_bias_bwd_kernel"] if order == LN_LINEAR else []
    assert [name for name, _ in seen] == [*kernels, *masks, "_layer_norm_bwd_kernel", "_column_sums_kernel"]


@pytest.mark.parametrize("switch", ["fp32_precision", "allow_tf32", "set_float32_matmul_precision"])
@both_orders
def test_tf32_follows_pytorch(order, switch):
    inputs = linear_inputs(order, (9,), (24, 52), torch.float32)

    def precisions() -> set[str]:
        with recorded_kernels() as seen, torch.no_grad():
            call(order, inputs)
        return {arguments["PRECISION"] for _, arguments in seen}

    matmul = torch.backends.cuda.matmul
    assert precisions() == {"ieee"}
    try:
        if switch == "fp32_precision":
            matmul.fp32_precision = "tf32"
        elif switch == "allow_tf32":
            matmul.allow_tf32 = True
        else:
            torch.set_float32_matmul_precision("high")
        assert precisions() == {"tf32"}
    finally:
        matmul.fp32_precision = "ieee"
    assert precisions() == {"ieee"}


@covering(
    lambda order, residual_dtype, **_: order == LINEAR_LN or residual_dtype is None,
    features=PATHS,
    order=ORDERS,
    input_dtype=DTYPES[:2],
    residual_dtype=[None, *DTYPES[:2]],
)
def test_autocast(device, order, features, input_dtype, residual_dtype):
    """Dtypes of the output and of every gradient are eager's; parameters stay float32."""
    inputs = linear_inputs(
        order, (33,), features, torch.float32, residual=residual_dtype is not None, residual_dtype=residual_dtype
    )
    inputs.input = inputs.input.to(input_dtype)
    silence_linear_boundary(order, inputs, torch.bfloat16)
    given = inputs.map(lambda t: t.to(device))
    with torch.autocast(device.type, torch.bfloat16):
        actual, eager = (run_linear(module, order, given, "relu") for module in (functional, reference))
    exact = run_linear(reference, order, inputs.map(to_double), "relu")
    assert {name: t.dtype for name, t in actual.items()} == {name: t.dtype for name, t in eager.items()}
    products = [{name: t.bfloat16() for name, t in tensors.items()} for tensors in (actual, eager)]
    assert_as_good_as_eager(products[0], products[1:], exact)


def test_autocast_of_sixteen_bit_parameters(device):
    """LayerNorm's parameters and the bias in bfloat16, the weight and the input in float32."""
    inputs = linear_inputs(LINEAR_LN, (9,), (40, 52), torch.float32)
    given = inputs.map(lambda t: t.to(device, torch.bfloat16))
    given.input, given.weight = inputs.input.to(device), inputs.weight.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        actual, eager = (run_linear(module, LINEAR_LN, given, None) for module in (functional, reference))
    for name, tensor in actual.items():
        assert tensor.dtype == eager[name].dtype, name
    torch.testing.assert_close(actual["out"], eager["out"], rtol=0.05, atol=0.05)
