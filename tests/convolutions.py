"""What tests call batch_norm_act_conv2d with, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.oracle import Tensors, batch_norm_inputs, silence_boundary

LEAVES = ("input", "weight", "bias", "conv_weight", "conv_bias")
ONE_LAUNCH, TWO_LAUNCHES = (3, 8, 7, 5), (6, 3, 19, 19)


def conv_inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    training: bool = True,
    *,
    out: int = 6,
    kernel: tuple[int, int] = (3, 3),
    groups: int = 1,
) -> Tensors:
    """Random arguments; no value is so near to the ReLU's kink that rounding decides on its side.

    An oracle's cotangents can be silenced where that happens, but not through a convolution.
    """
    t = batch_norm_inputs(shape, dtype)
    places = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
    signs = torch.where(sum(places) % 2 == 0, -1.0, 1.0)  # in balance, so that the mean is far from all values
    running_var = torch.rand(shape[1]) * 0.2 + 1.4
    t = replace(
        t, input=(signs * (0.8 + torch.rand(shape))).to(dtype), weight=torch.rand(shape[1]) + 0.5,
        bias=torch.rand(shape[1]) * 0.2 - 0.1, running_mean=torch.rand(shape[1]) * 0.2 - 0.1, running_var=running_var,
        grad=torch.ones(shape, dtype=dtype),
    )  # fmt: skip
    silence_boundary(t, training)
    assert t.grad.all()
    named = {name: tensor for name, tensor in vars(t).items() if tensor is not None and name != "grad"}
    conv_weight = torch.randn(out, shape[1] // groups, *kernel) / (shape[1] // groups * kernel[0] * kernel[1]) ** 0.5
    return named | {"conv_weight": conv_weight.to(dtype), "conv_bias": torch.randn(out).to(dtype)}


def run(module: Any, given: Tensors, training: bool, **options: object) -> Tensors:
    """Output, gradients and buffers by name of ``module``'s function, of copies of the tensors."""
    copies = {name: t.detach().clone().requires_grad_(name in LEAVES) for name, t in given.items()}
    out = module.batch_norm_act_conv2d(**copies, training=training, **options)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator).to(torch.bfloat16)  # the same value in every dtype
    out.backward(cotangent.to(out.device, out.dtype))
    named = {
        name if name not in LEAVES else f"grad_{name}": t.grad if name in LEAVES else t for name, t in copies.items()
    }
    return {"out": out.detach()} | {name: t for name, t in named.items() if t is not None}


def layout(device: torch.device, channels_last: bool) -> Callable[[Tensor], Tensor]:
    """As ``Module.to(memory_format=...)`` has it: weights of convolutions too."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    return lambda t: (t.contiguous(memory_format=form) if t.dim() == 4 else t).to(device)


def mapped(function: Callable[[Tensor], Tensor], given: Tensors) -> Tensors:
    return {name: function(t) for name, t in given.items()}
