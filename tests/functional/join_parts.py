"""The oracle rule for the join of projection blocks: inputs of both norms, runs, and the comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedres import functional, reference
from fusedres.functional import Norm
from tests.oracle import BOUNDARY, Tensors, assert_as_good_as_eager, layout, to_double

LEAVES = ("input", "other", "weight", "bias", "other_weight", "other_bias")
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
Join = Callable[..., Tensor | tuple[Tensor, Tensor]]


@dataclass
class JoinInputs:
    """The tensors of one call, and the cotangents of the output under both of its names."""

    input: Tensor
    other: Tensor
    weight: Tensor | None
    bias: Tensor | None
    other_weight: Tensor | None
    other_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    other_running_mean: Tensor | None
    other_running_var: Tensor | None
    other_num_batches_tracked: Tensor | None
    grad: Tensor
    grad_fork: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> JoinInputs:
        return JoinInputs(*(None if t is None else function(t) for t in vars(self).values()))  # type: ignore[arg-type]

    def norm(self, prefix: str, training: bool, momentum: float | None = 0.1, eps: float = 1e-5) -> Norm:
        given = vars(self)
        mean, var, weight, bias, count = (
            given[prefix + name] for name in ("running_mean", "running_var", "weight", "bias", "num_batches_tracked")
        )
        return Norm(mean, var, weight, bias, training, momentum, eps, count)


def join_inputs(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    fork: bool = False,
    affine: bool = True,
    bias: bool = True,
    tracking: bool = True,
    parameter_dtype: torch.dtype = torch.float32,
    other_dtype: torch.dtype | None = None,
    mean: float = 0.5,
    std: float = 2.0,
) -> JoinInputs:
    """Random inputs on the CPU, contiguous; the moments of ``input`` are ``mean`` and ``std``."""
    channels = shape[1]

    def parameter(offset: float, wanted: bool) -> Tensor | None:
        return (torch.randn(channels) * 0.5 + offset).to(parameter_dtype) if wanted else None

    def buffers(mean: float, std: float, count: int) -> tuple[Tensor | None, ...]:
        if not tracking:
            return None, None, None
        running = (torch.randn(channels) * 0.2 * std + mean, (torch.rand(channels) + 0.5) * std**2)
        return *(t.to(parameter_dtype) for t in running), torch.tensor(count)

    out_dtype = torch.promote_types(dtype, other_dtype or dtype)
    return JoinInputs(
        (torch.randn(shape) * std + mean).to(dtype),
        (torch.randn(shape) * 1.5 - 0.25).to(other_dtype or dtype),
        parameter(1.0, affine), parameter(0.0, affine and bias),
        parameter(-0.75, affine), parameter(0.0, affine and bias),
        *buffers(mean, std, 3), *buffers(-0.25, 1.5, 0),
        torch.randn(shape).to(out_dtype),
        torch.randn(shape).to(out_dtype) if fork else None,
    )  # fmt: skip


def run_join(
    function: Join,
    inputs: JoinInputs,
    training: bool,
    act: str | None,
    *,
    other_training: bool | None = None,
    momentum: tuple[float | None, float | None] = (0.1, 0.3),
    needed: Sequence[str] = LEAVES,
) -> Tensors:
    """Output, gradients and buffers by name, of copies of the inputs; two readers where there are two cotangents."""
    given = inputs.map(lambda t: t.detach().clone())
    for name in needed:
        if (leaf := getattr(given, name)) is not None:
            leaf.requires_grad_()
    norm = given.norm("", training, momentum[0])
    other_norm = given.norm("other_", training if other_training is None else other_training, momentum[1], 1e-3)
    results = function(given.input, given.other, norm, other_norm, act=act)
    out, second = (results, results) if isinstance(results, Tensor) else results
    if inputs.grad_fork is None:
        out.backward(inputs.grad.to(out.dtype))
    else:
        torch.autograd.backward([out, second], [inputs.grad.to(out.dtype), inputs.grad_fork.to(out.dtype)])
    named = {"out": out.detach()} | {
        f"grad_{name}": t.grad for name in LEAVES if (t := getattr(given, name)) is not None
    }
    named |= {prefix + name: getattr(given, prefix + name) for prefix in ("", "other_") for name in BUFFERS}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def silence_join_boundary(inputs: JoinInputs, training: bool, other_training: bool) -> None:
    """Zero the cotangents where rounding decides the side of the ReLU."""
    x = inputs.map(to_double)
    dims = [d for d in range(x.input.dim()) if d != 1]
    z, size = torch.zeros_like(x.input), torch.zeros_like(x.input)
    for value, norm in (
        (x.input, x.norm("", training)),
        (x.other, x.norm("other_", other_training, eps=1e-3)),
    ):
        mean, var = value.mean(dims), value.var(dims, correction=0)
        if not norm.training and norm.running_mean is not None and norm.running_var is not None:
            mean, var = norm.running_mean, norm.running_var
        scale = (1.0 if norm.weight is None else norm.weight) / (var + norm.eps).sqrt()
        shift = (0.0 if norm.bias is None else norm.bias) - mean * scale
        shape = [1, -1] + [1] * (value.dim() - 2)
        z += value * scale.view(shape) + shift.view(shape)
        size += (value * scale.view(shape)).abs() + shift.view(shape).abs()
    near = (z.abs() <= BOUNDARY * torch.finfo(inputs.grad.dtype).eps * size) & (z != 0)
    for grad in (inputs.grad, inputs.grad_fork):
        if grad is not None:
            grad[near] = 0


def check_join(
    inputs: JoinInputs,
    device: torch.device,
    *,
    channels_last: bool,
    training: bool,
    act: str | None,
    other_training: bool | None = None,
    momentum: tuple[float | None, float | None] = (0.1, 0.3),
) -> Tensors:
    """The oracle rule for one call, forked where there are two cotangents; returns what the fused function gave."""
    if act is not None:
        silence_join_boundary(inputs, training, training if other_training is None else other_training)
    plain, forked = functional.batch_norm_add_batch_norm_act, functional.forked_batch_norm_add_batch_norm_act
    eager = reference.batch_norm_add_batch_norm_act

    def run(function: Join, given: JoinInputs) -> Tensors:
        return run_join(function, given, training, act, other_training=other_training, momentum=momentum)

    actual = run(plain if inputs.grad_fork is None else forked, inputs.map(layout(device, channels_last)))
    eagers = [run(eager, inputs.map(layout(device, last))) for last in (True, False)]
    assert_as_good_as_eager(actual, eagers, run(eager, inputs.map(to_double)))
    for name in ("out", "grad_input", "grad_other"):
        assert actual[name].stride() == eagers[0 if channels_last else 1][name].stride(), name
    return actual
