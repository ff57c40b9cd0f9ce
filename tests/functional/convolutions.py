"""What tests call batch_norm_act_conv2d and add_batch_norm_act_conv2d with, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusedres import functional, reference
from tests.oracle import Tensors, assert_as_good_as_eager, batch_norm_inputs, layout, silence_boundary, to_double

LEAVES = ("input", "residual", "weight", "bias", "conv_weight", "conv_bias")
ONE_LAUNCH, TWO_LAUNCHES = (3, 8, 7, 5), (6, 3, 19, 19)


def conv_inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    training: bool = True,
    *,
    out: int = 6,
    kernel: tuple[int, int] = (3, 3),
    groups: int = 1,
    residual: torch.dtype | None = None,
) -> Tensors:
    """Random arguments; with ``residual``, the dtype of one, those of the function of a sum.

    No value is so near to the ReLU's kink that rounding decides on its side: an oracle's cotangents can be silenced
    where that happens, but not through a convolution.
    """
    t = batch_norm_inputs(shape, dtype)
    places = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
    signs = torch.where(sum(places) % 2 == 0, -1.0, 1.0)  # in balance, so that the mean is far from all values
    running_var = torch.rand(shape[1]) * 0.2 + 1.4
    x, other = signs * (0.8 + torch.rand(shape)), None if residual is None else torch.randn(shape).to(residual)
    total = dtype if residual is None else torch.promote_types(dtype, residual)
    t = replace(
        t, input=(x if other is None else x - other).to(dtype), residual=other, weight=torch.rand(shape[1]) + 0.5,
        bias=torch.rand(shape[1]) * 0.2 - 0.1, running_mean=torch.rand(shape[1]) * 0.2 - 0.1, running_var=running_var,
        grad=torch.ones(shape, dtype=total),
    )  # fmt: skip
    silence_boundary(t, training, added=other is not None)
    assert t.grad.all()
    named = {name: tensor for name, tensor in vars(t).items() if tensor is not None and name != "grad"}
    conv_weight = torch.randn(out, shape[1] // groups, *kernel) / (shape[1] // groups * kernel[0] * kernel[1]) ** 0.5
    return named | {"conv_weight": conv_weight.to(total), "conv_bias": torch.randn(out).to(total)}


def run(module: Any, given: Tensors, training: bool, **options: object) -> Tensors:
    """Outputs, gradients and buffers by name of ``module``'s function, of copies of the tensors."""
    copies = {name: t.detach().clone().requires_grad_(name in LEAVES) for name, t in given.items()}
    if "residual" in given:
        total, out = module.add_batch_norm_act_conv2d(**copies, training=training, **options)
        results = {"sum": total, "out": out}
    else:
        results = {"out": module.batch_norm_act_conv2d(**copies, training=training, **options)}
    torch.autograd.backward(list(results.values()), [cotangent(t) for t in results.values()])
    named = {f"grad_{name}" if name in LEAVES else name: t.grad if name in LEAVES else t for name, t in copies.items()}
    return {name: t.detach() for name, t in (results | named).items() if t is not None}


def cotangent(out: Tensor) -> Tensor:
    """Random, of the same value in every dtype."""
    values = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    return values.to(out.device, out.dtype)


def mapped(function: Callable[[Tensor], Tensor], given: Tensors) -> Tensors:
    return {name: function(t) for name, t in given.items()}


def check(given: Tensors, device: torch.device, training: bool, channels_last: bool, **options: object) -> Tensors:
    """The oracle rule for one call, and the strides that eager has.

    Against eager in the same memory format, not the better of two: what the library's convolution rounds off in its
    gradients depends on the format and on the processor, and is the same for both where the format is.
    """
    actual = run(functional, mapped(layout(device, channels_last), given), training, **options)
    eager = run(reference, mapped(layout(device, channels_last), given), training, **options)
    exact = run(reference, mapped(to_double, given), training, **options)
    assert_as_good_as_eager(actual, [eager], exact)
    for name, tensor in actual.items():
        assert tensor.stride() == eager[name].stride(), name
    return actual
