"""What right means: errors against float64 eager PyTorch, compared with those of eager in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusedres import functional, reference

EPS_SLACK = 4  # in units of the dtype's eps
BOUNDARY = 8  # likewise: elements this near zero before the ReLU may fall on either side

Tensors = dict[str, Tensor]


def errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """(‖a − r‖₂ / ‖r‖₂, max|a − r| / max|r|); NaN and infinity must stand where the oracle has them."""
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    finite = exact.isfinite()
    if not torch.equal(actual.isfinite(), finite) or not torch.equal(actual.isnan(), exact.isnan()):
        return float("inf"), float("inf")
    if not torch.equal(actual[exact.isinf()], exact[exact.isinf()]):
        return float("inf"), float("inf")
    difference, exact = (actual - exact)[finite], exact[finite]
    if difference.numel() == 0 or not difference.any():
        return 0.0, 0.0
    tiny = torch.finfo(torch.float64).tiny
    return (
        float(difference.norm() / exact.norm().clamp_min(tiny)),
        float(difference.abs().max() / exact.abs().max().clamp_min(tiny)),
    )


def shares(
    actual: Mapping[str, Tensor], eagers: Sequence[Mapping[str, Tensor]], exact: Tensors
) -> dict[tuple[str, str], float]:
    """The error of every tensor, in both norms, as a share of what it may be: twice the better eager's plus 4 eps."""
    assert actual.keys() == exact.keys()
    used = {}
    for name, value in actual.items():
        assert value.shape == exact[name].shape, name
        assert value.dtype == eagers[0][name].dtype, name
        slack = EPS_SLACK * torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
        theirs = [errors(eager[name], exact[name]) for eager in eagers]
        for norm, error, *others in zip(("2-norm", "maximum"), errors(value, exact[name]), *theirs, strict=True):
            allowed = 2 * min(others) + slack
            used[name, norm] = error / allowed if allowed else float(error > 0)
    return used


def assert_as_good_as_eager(
    actual: Mapping[str, Tensor], eagers: Sequence[Mapping[str, Tensor]], exact: Tensors
) -> None:
    """Every tensor's error is at most twice the better eager's, plus 4 eps of its own dtype."""
    for (name, norm), share in shares(actual, eagers, exact).items():
        assert share <= 1, f"{name}: {norm} error is {share:.2f} times what it may be"


def assert_network_as_good_as_eager(
    actual: Mapping[str, Tensor], eagers: Sequence[Mapping[str, Tensor]], exact: Tensors
) -> None:
    """The rule for a deep network, where rounding errors grow by chance: eager's own two formats break it.

    The geometric mean over all tensors keeps the rule, and no tensor exceeds it by more than 4 times. Seen over ten
    runs of 36 layers, as multiples of the better eager's error: ours 0.93 to 1.16 in the mean and at most 5.4 for
    one tensor, the other eager's 1.5 to 3.9 in the mean and at least 13 for some tensor.
    """
    used = shares(actual, eagers, exact)
    for (name, norm), share in used.items():
        assert share <= 4, f"{name}: {norm} error is {share:.2f} times what it may be"
    nonzero = [share for share in used.values() if share]
    mean = math.exp(sum(map(math.log, nonzero)) / max(len(nonzero), 1))
    assert mean <= 1, f"the errors are {mean:.2f} times what they may be"


@dataclass
class BatchNormInputs:
    """The tensors of one batch_norm_act or add_batch_norm_act call, and the cotangents of its outputs."""

    input: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    grad: Tensor
    grad_sum: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> BatchNormInputs:
        return BatchNormInputs(*(None if t is None else function(t) for t in vars(self).values()))  # type: ignore[arg-type]


def batch_norm_inputs(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    residual: bool = False,
    affine: bool = True,
    bias: bool = True,
    tracking: bool = True,
    parameter_dtype: torch.dtype = torch.float32,
    residual_dtype: torch.dtype | None = None,
    mean: float = 0.5,
    std: float = 2.0,
) -> BatchNormInputs:
    """Random inputs on the CPU, contiguous; the moments of ``input`` are ``mean`` and ``std``."""
    channels = shape[1]
    x = (torch.randn(shape) * std + mean).to(dtype)
    r = torch.randn(shape).to(residual_dtype or dtype) if residual else None
    out_dtype = dtype if r is None else torch.promote_types(dtype, r.dtype)
    return BatchNormInputs(
        x,
        r,
        (torch.randn(channels) * 0.5 + 1).to(parameter_dtype) if affine else None,
        torch.randn(channels).to(parameter_dtype) if affine and bias else None,
        (torch.randn(channels) * 0.2 * std + mean).to(parameter_dtype) if tracking else None,
        ((torch.rand(channels) + 0.5) * std**2).to(parameter_dtype) if tracking else None,
        torch.tensor(3) if tracking else None,
        torch.randn(shape).to(out_dtype),
        torch.randn(shape).to(out_dtype) if residual else None,
    )


def run_batch_norm(
    function: Callable[..., Tensor | tuple[Tensor, Tensor]],
    inputs: BatchNormInputs,
    training: bool,
    act: str | None,
    **options: object,
) -> Tensors:
    """Outputs (``sum`` where there are two), gradients and buffers by name, of copies of the inputs."""

    def leaf(t: Tensor) -> Tensor:
        return t.detach().clone().requires_grad_(t.is_floating_point())

    given = inputs.map(leaf)
    buffers = [None if t is None else t.detach() for t in (given.running_mean, given.running_var)]
    count = given.num_batches_tracked
    results = function(
        input=given.input, residual=given.residual, running_mean=buffers[0], running_var=buffers[1],
        weight=given.weight, bias=given.bias, training=training, act=act, num_batches_tracked=count, **options,
    )  # fmt: skip
    total, out = (None, results) if isinstance(results, Tensor) else results
    pairs = [(out, inputs.grad.to(out.dtype))]
    if total is not None and inputs.grad_sum is not None:
        pairs.append((total, inputs.grad_sum.to(total.dtype)))
    torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])
    named = {
        "sum": None if total is None else total.detach(),
        "out": out.detach(),
        "grad_input": given.input.grad,
        "grad_residual": None if given.residual is None else given.residual.grad,
        "grad_weight": None if given.weight is None else given.weight.grad,
        "grad_bias": None if given.bias is None else given.bias.grad,
        "running_mean": buffers[0],
        "running_var": buffers[1],
        "num_batches_tracked": count,
    }
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def to_double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def layout(device: torch.device, channels_last: bool) -> Callable[[Tensor], Tensor]:
    """As ``Module.to(memory_format=...)`` has it: weights of convolutions too."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    return lambda t: (t.contiguous(memory_format=form) if t.dim() == 4 else t).to(device)


def silence_boundary(inputs: BatchNormInputs, training: bool, *, added: bool = False, eps: float = 1e-5) -> None:
    """Zero the cotangent where rounding decides the side of the ReLU, so that the side does not matter.

    ``added``: the residual comes in before the normalisation.
    """
    x = inputs.map(to_double)
    if added:
        assert x.residual is not None
        x = replace(x, input=x.input + x.residual, residual=None)
    dims = [d for d in range(x.input.dim()) if d != 1]
    shape = [1, -1] + [1] * (x.input.dim() - 2)
    if training or x.running_mean is None or x.running_var is None:
        mean, var = x.input.mean(dims), x.input.var(dims, correction=0)
    else:
        mean, var = x.running_mean, x.running_var
    scale = (1.0 if x.weight is None else x.weight) / (var + eps).sqrt()
    shift = (0.0 if x.bias is None else x.bias) - mean * scale
    scaled, shift = x.input * scale.view(shape), shift.view(shape)
    r = torch.zeros_like(x.input) if x.residual is None else x.residual
    z = scaled + shift + r
    unit = torch.finfo(inputs.grad.dtype).eps
    near = z.abs() <= BOUNDARY * unit * (scaled.abs() + shift.abs() + r.abs())
    inputs.grad[near & (z != 0)] = 0


def check_batch_norm(
    function: Callable[..., Tensor | tuple[Tensor, Tensor]],
    inputs: BatchNormInputs,
    device: torch.device,
    *,
    channels_last: bool,
    training: bool,
    act: str | None,
    eager: Callable[..., Tensor | tuple[Tensor, Tensor]] = reference.batch_norm_act,
    **options: object,
) -> Tensors:
    """The oracle rule for one call; returns what ``function`` gave. Layouts of outputs follow the input's."""
    if act is not None:
        silence_boundary(inputs, training, added=eager is reference.add_batch_norm_act)

    actual = run_batch_norm(function, inputs.map(layout(device, channels_last)), training, act, **options)
    eagers = [
        run_batch_norm(eager, inputs.map(layout(device, last)), training, act, **options) for last in (True, False)
    ]
    exact = run_batch_norm(eager, inputs.map(to_double), training, act, **options)
    assert_as_good_as_eager(actual, eagers, exact)
    for name in ("sum", "out", "grad_input", "grad_residual"):
        if name in actual:
            assert actual[name].stride() == eagers[0 if channels_last else 1][name].stride(), name
    return actual


@dataclass
class LinearInputs:
    """The tensors of one call of either MLP function, and its cotangent."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    ln_weight: Tensor | None
    ln_bias: Tensor | None
    residual: Tensor | None
    grad: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> LinearInputs:
        return LinearInputs(*(None if t is None else function(t) for t in vars(self).values()))  # type: ignore[arg-type]


LN_LINEAR, LINEAR_LN = "layer_norm_linear_act", "linear_layer_norm_act"


def linear_inputs(
    order: str,
    lead: Sequence[int],
    features: tuple[int, int],
    dtype: torch.dtype,
    *,
    bias: bool = True,
    affine: bool = True,
    ln_bias: bool = True,
    residual: bool = False,
    residual_dtype: torch.dtype | None = None,
    parameter_dtype: torch.dtype | None = None,
    mean: float = 0.5,
    std: float = 2.0,
) -> LinearInputs:
    """Random inputs on the CPU; ``mean`` and ``std`` are those of the rows that are normalised."""
    n, k = features
    first = order == LN_LINEAR
    normalised = k if first else n
    x = torch.randn(*lead, k) * std + mean if first else torch.randn(*lead, k)
    b = torch.randn(n) if first else torch.randn(n) * 0.3 * std + mean
    r = torch.randn(*lead, n).to(residual_dtype or dtype) if residual else None
    return LinearInputs(
        x.to(dtype),
        (torch.randn(n, k) / math.sqrt(k) * (1.0 if first else std)).to(dtype),
        b.to(dtype) if bias else None,
        (torch.randn(normalised) * 0.5 + 1).to(parameter_dtype or dtype) if affine else None,
        torch.randn(normalised).to(parameter_dtype or dtype) if affine and ln_bias else None,
        r,
        torch.randn(*lead, n).to(dtype if r is None else torch.promote_types(dtype, r.dtype)),
    )


def run_linear(module: object, order: str, inputs: LinearInputs, act: str | None) -> Tensors:
    """Output and gradients by name of ``module``'s function ``order``, of copies of the inputs."""
    given = inputs.map(lambda t: t.detach().clone().requires_grad_())
    function = getattr(module, order)
    if order == LN_LINEAR:
        out = function(given.input, given.ln_weight, given.ln_bias, given.weight, given.bias, act=act)
    else:
        out = function(
            given.input, given.weight, given.bias, given.ln_weight, given.ln_bias, act=act, residual=given.residual
        )  # fmt: skip
    out.backward(inputs.grad.to(out.dtype))
    named = {f"grad_{name}": t.grad for name, t in vars(given).items() if t is not None and name != "grad"}
    return {"out": out.detach()} | {name: tensor for name, tensor in named.items() if tensor is not None}


def silence_linear_boundary(order: str, inputs: LinearInputs, dtype: torch.dtype, eps: float = 1e-5) -> None:
    """Zero the cotangent where rounding to ``dtype`` decides the side of the ReLU.

    A sum of many products counts with the root of the sum of their squares.
    """
    x = inputs.map(to_double)

    def normalise(z: Tensor, error: Tensor | float) -> tuple[Tensor, Tensor]:
        gamma = torch.ones(()) if x.ln_weight is None else x.ln_weight
        beta = torch.zeros(()) if x.ln_bias is None else x.ln_bias
        mean, rstd = z.mean(-1, keepdim=True), (z.var(-1, correction=0, keepdim=True) + eps).rsqrt()
        return (z - mean) * rstd * gamma + beta, (z.abs() + mean.abs() + error) * rstd * gamma.abs() + beta.abs()

    def linear(z: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        offset = torch.zeros(()) if x.bias is None else x.bias
        return z @ x.weight.t() + offset, (size.square() @ x.weight.t().square()).sqrt() + offset.abs()

    if order == LN_LINEAR:
        z, size = linear(*normalise(x.input, 0.0))
    else:
        z, size = normalise(*linear(x.input, x.input.abs()))
    near = z.abs() <= BOUNDARY * torch.finfo(dtype).eps * size
    inputs.grad[near & (z != 0)] = 0


def check_linear(
    order: str, inputs: LinearInputs, device: torch.device, act: str | None, eager_device: torch.device | None = None
) -> Tensors:
    """The oracle rule for one call; returns what the fused function gave."""
    if act is not None:
        silence_linear_boundary(order, inputs, inputs.input.dtype)
    actual = run_linear(functional, order, inputs.map(lambda t: t.to(device)), act)
    eager = run_linear(reference, order, inputs.map(lambda t: t.to(eager_device or device)), act)
    exact = run_linear(reference, order, inputs.map(to_double), act)
    assert_as_good_as_eager(actual, [eager], exact)
    return actual
