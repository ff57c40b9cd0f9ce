"""The launches of every BatchNorm layer of the report, and of a whole training step."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.instruments.codegen import Launch, recorded_launches
from fusedres.kernels.layout import Window
from fusedres.norm import Norm

SMS = 132  # tiled as for an H100
BATCH_NORM_SHAPES = (
    # The first needs two launches, the second fits on-chip; 67 channels allow no wide access.
    ((8, 64, 56, 56), True),
    ((8, 64, 56, 56), False),
    ((2, 256, 14, 14), True),
    ((2, 256, 14, 14), False),
    ((8, 67, 56, 56), True),
    ((2, 67, 14, 14), True),
)

POOL_SHAPES = (((8, 64, 112, 112), True), ((8, 64, 112, 112), False), ((8, 67, 56, 56), True))
STEM = Window(3, 3, 2, 2, 1, 1)
LARGE = Window(7, 7, 1, 1, 3, 3)  # not unrolled
HEAD_SHAPES = (
    # As in a ResNet, two launches and on-chip; then larger images than a tile, and 67 channels.
    ((32, 2048, 7, 7), True),
    ((32, 2048, 7, 7), False),
    ((8, 2048, 7, 7), True),
    ((8, 2048, 7, 7), False),
    ((8, 64, 56, 56), True),
    ((8, 64, 56, 56), False),
    ((32, 67, 7, 7), True),
)


def batch_norm_launches(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    channels_last: bool,
    residual: bool,
    training: bool,
    act: str | None = "relu",
    fork: bool = False,
) -> list[Launch]:
    """The launches of one layer's forward and backward, with two gradients where there is a ``fork``."""
    from fusedres.kernels.batch_norm_backward import Gradients, batch_norm_act_backward
    from fusedres.kernels.batch_norm_forward import batch_norm_act_forward, batch_norm_act_inference_forward

    x = _activation(shape, dtype, channels_last)
    other = torch.empty_like(x) if residual else None
    vector = torch.empty(shape[1])
    with recorded_launches() as launches:
        if training:
            out, stats, mask = batch_norm_act_forward(x, other, _norm(vector, training), act, residual)
        else:
            norm = _norm(vector, training)
            out, stats, mask = batch_norm_act_inference_forward(x, other, norm, act, True, residual)
        wanted = Gradients(torch.empty_like(x), other, vector, vector)
        saved = mask if mask.numel() else None
        batch_norm_act_backward(out, x, saved, stats, act, not training, wanted, out if fork else None, fork=fork)
    return launches


def recomputation_launches(shape: tuple[int, ...], dtype: torch.dtype, *, channels_last: bool) -> list[Launch]:
    """The launch that makes a convolution's input again, also where the forward's was on-chip."""
    from fusedres.kernels.batch_norm_forward import batch_norm_fwd_apply
    from fusedres.kernels.layout import rows

    x, stats = _activation(shape, dtype, channels_last), torch.empty(4, shape[1])
    with recorded_launches() as launches:
        batch_norm_fwd_apply(x, None, rows(x), stats, None, "relu", False)
    return launches


def add_batch_norm_launches(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    channels_last: bool,
    training: bool,
    residual_dtype: torch.dtype | None = None,
    act: str | None = "relu",
) -> list[Launch]:
    """The launches of one join of pre-activation blocks, forward and backward."""
    from fusedres.kernels.add_batch_norm import add_batch_norm_act_forward, add_batch_norm_act_inference_forward
    from fusedres.kernels.batch_norm_backward import Gradients, batch_norm_act_backward

    x = _activation(shape, dtype, channels_last)
    residual = _activation(shape, residual_dtype or dtype, channels_last)
    vector = torch.empty(shape[1])
    with recorded_launches() as launches:
        if training:
            s, out, stats = add_batch_norm_act_forward(x, residual, _norm(vector, training), act)
        else:
            s, out, stats = add_batch_norm_act_inference_forward(x, residual, _norm(vector, training), act, True)
        wanted = Gradients(torch.empty_like(s), None, vector, vector)
        batch_norm_act_backward(out, s, None, stats, act, not training, wanted, torch.empty_like(s))
    return launches


def batch_norm_pool_launches(
    shape: tuple[int, ...], dtype: torch.dtype, *, channels_last: bool, window: Window = STEM, fork: bool = False
) -> list[Launch]:
    """The launches of a stem, forward and backward: in training, and without a ``fork`` in evaluation too."""
    from fusedres.kernels.batch_norm_backward import Gradients
    from fusedres.kernels.batch_norm_pool import (
        batch_norm_act_max_pool2d_forward,
        batch_norm_act_max_pool2d_inference_forward,
    )
    from fusedres.kernels.batch_norm_pool_backward import batch_norm_act_max_pool2d_backward

    x, vector = _activation(shape, dtype, channels_last), torch.empty(shape[1])
    wanted = Gradients(torch.empty_like(x), None, vector, vector)
    with recorded_launches() as launches:
        out, stats, winner = batch_norm_act_max_pool2d_forward(x, window, _norm(vector, True), "relu", True)
        batch_norm_act_max_pool2d_backward(out, out if fork else None, x, stats, winner, window, False, wanted)
        if not fork:
            for save in (True, False):
                batch_norm_act_max_pool2d_inference_forward(x, window, _norm(vector, False), "relu", save)
            batch_norm_act_max_pool2d_backward(out, None, x, stats, winner, window, True, wanted)
    return launches


def batch_norm_head_launches(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    channels_last: bool,
    residual: bool,
    training: bool,
    act: str | None = "relu",
) -> list[Launch]:
    """The launches of one head's forward and backward."""
    from fusedres.kernels.batch_norm_backward import Gradients
    from fusedres.kernels.batch_norm_head import batch_norm_head_forward, batch_norm_head_inference_forward
    from fusedres.kernels.batch_norm_head_backward import batch_norm_head_backward

    x = _activation(shape, dtype, channels_last)
    other = torch.empty_like(x) if residual else None
    vector = torch.empty(shape[1])
    with recorded_launches() as launches:
        if training:
            pooled, stats, mask = batch_norm_head_forward(x, other, _norm(vector, training), act, residual)
        else:
            norm = _norm(vector, training)
            pooled, stats, mask = batch_norm_head_inference_forward(x, other, norm, act, True, residual)
        wanted = Gradients(torch.empty_like(x), other, vector, vector)
        saved = mask if mask.numel() else None
        batch_norm_head_backward(pooled, x, saved, stats, act, not training, wanted)
    return launches


def sync_batch_norm_launches(
    shape: tuple[int, ...], dtype: torch.dtype, *, channels_last: bool, residual: bool
) -> list[Launch]:
    """Those of the forward around what ranks exchange; the others are as on one rank."""
    from fusedres.kernels.sync_batch_norm import merge, moments

    x, vector = _activation(shape, dtype, channels_last), torch.empty(shape[1])
    with recorded_launches() as launches:
        moments(x, x if residual else None)
        messages = torch.empty(8, 2 * shape[1] + 1)
        merge(messages, _norm(vector, True))
    return launches


def join_launches(
    shape: tuple[int, ...], dtype: torch.dtype, *, channels_last: bool, training: bool, fork: bool = False,
    act: str | None = "relu",
) -> list[Launch]:  # fmt: skip
    """The launches of one join of a projection block, forward and backward."""
    from fusedres.kernels.batch_norm_join import batch_norm_join_forward, batch_norm_join_inference_forward
    from fusedres.kernels.batch_norm_join_backward import Gradients, batch_norm_join_backward

    a, vector = _activation(shape, dtype, channels_last), torch.empty(shape[1])
    norm = _norm(vector, training)
    with recorded_launches() as launches:
        if training:
            y, stats, other_stats = batch_norm_join_forward(a, a, norm, norm, act)
        else:
            y, stats, other_stats = batch_norm_join_inference_forward(a, a, norm, norm, act, True)
        wanted = Gradients(a, a, torch.empty(4, shape[1]))
        batch_norm_join_backward(y, y if fork else None, a, a, stats, other_stats, act, not training, wanted)
    return launches


def _norm(vector: torch.Tensor, training: bool) -> Norm:
    count = torch.tensor(0) if training else None
    return Norm(vector, vector, vector, vector, training, num_batches_tracked=count)


def _activation(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> torch.Tensor:
    form = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, memory_format=form)


# Every BatchNorm layer of the report; float32 with a residual in 16 bits, and the reverse, differ in the forward only.
BATCH_NORM_LAYERS = (
    functools.partial(batch_norm_launches, residual=True),
    functools.partial(batch_norm_launches, residual=False),
    functools.partial(batch_norm_launches, residual=True, fork=True),
    functools.partial(batch_norm_launches, residual=False, fork=True),
    add_batch_norm_launches,
    functools.partial(add_batch_norm_launches, residual_dtype=torch.float32),
    functools.partial(add_batch_norm_launches, residual_dtype=torch.bfloat16),
    join_launches,
    functools.partial(join_launches, fork=True),
)


def batch_norm_layers(dtypes: Sequence[torch.dtype]) -> Iterator[list[Launch]]:
    """The launches of every layer."""
    modes = (True, False)
    for (shape, channels_last), dtype, layer, training in product(BATCH_NORM_SHAPES, dtypes, BATCH_NORM_LAYERS, modes):
        yield layer(shape, dtype, channels_last=channels_last, training=training)
    for (shape, channels_last), dtype in product(BATCH_NORM_SHAPES, dtypes):
        yield recomputation_launches(shape, dtype, channels_last=channels_last)
    for (shape, channels_last), dtype, fork in product(POOL_SHAPES, dtypes, modes):
        yield batch_norm_pool_launches(shape, dtype, channels_last=channels_last, fork=fork)
    for dtype in dtypes:
        yield batch_norm_pool_launches((8, 64, 56, 56), dtype, channels_last=True, window=LARGE)
    for (shape, channels_last), dtype, residual, training in product(HEAD_SHAPES, dtypes, modes, modes):
        yield batch_norm_head_launches(
            shape, dtype, channels_last=channels_last, residual=residual, training=training
        )  # fmt: skip
    for (shape, channels_last), dtype, residual in product(BATCH_NORM_SHAPES[:2], dtypes, modes):
        yield sync_batch_norm_launches(shape, dtype, channels_last=channels_last, residual=residual)


def training_step_launches(model: nn.Module, images: tuple[int, ...], dtype: torch.dtype) -> list[Launch]:
    """The launches of one channels-last training step of a fused model in ``dtype``, on meta tensors."""
    model.to("meta", dtype, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.float()
    x = torch.empty(images, dtype=dtype, device="meta", memory_format=torch.channels_last)
    gpu, convolve = SimpleNamespace(multi_processor_count=SMS), nn.Conv2d._conv_forward

    def keep_format(*args: Any) -> torch.Tensor:
        return convolve(*args).to(memory_format=torch.channels_last)  # which a meta tensor's convolution forgets

    with (
        recorded_launches() as launches,
        mock.patch("fusedres.ops.dispatch.refusal", lambda *_: None),
        mock.patch.object(nn.Conv2d, "_conv_forward", keep_format),
        mock.patch("torch.cuda.get_device_properties", lambda _: gpu),
        mock.patch("torch.cuda.current_device", lambda: x.device.index),
        mock.patch("torch.cuda.is_current_stream_capturing", lambda: True),  # whose counters are not kept
    ):
        model(x).sum().backward()
    return launches
