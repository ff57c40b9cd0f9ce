"""How an activation (N, C, *) is seen by the kernels: M = N·S rows by C channels, C or S contiguous."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The row view of a dense activation; S is the product of the dimensions behind C."""

    M: int
    C: int
    S: int
    channels_last: bool

    @property
    def align(self) -> int:
        """Of the contiguous extent, see :func:`alignment`."""
        return alignment(self.C if self.channels_last else self.S)

    @property
    def images(self) -> int:
        return self.M // self.S

    @property
    def mask_bytes(self) -> int:
        """Bytes of a 1-bit mask, eight rows to a byte."""
        return (self.M + 7) // 8 * self.C

    @property
    def image_mask_bytes(self) -> int:
        """The same with eight pixels of one image to a byte."""
        return self.images * ((self.S + 7) // 8) * self.C


def alignment(length: int) -> int:
    """The largest power of two up to 16 that divides the length of a row: it bounds the vector width."""
    return gcd(length, 16)


def is_channels_last(x: Tensor) -> bool:
    """Whether C is the contiguous dimension and nothing is skipped (S = 1 counts: rows of C)."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()


def dense(x: Tensor) -> Tensor:
    """``x`` itself where the kernels can walk it, else a copy in the memory format that its strides suggest."""
    if x.is_contiguous() or is_channels_last(x):
        return x
    if x.stride(1) == 1:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()


def dense_like(x: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``x`` with the strides of the dense tensor ``like``, in its own dtype or ``dtype``: itself, or a copy."""
    if x.stride() == like.stride() and dtype in (None, x.dtype):
        return x
    return torch.empty_like(like, dtype=dtype or x.dtype).copy_(x)


def pooled_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised (N, C, 1, 1) of a dense ``x``, its strides those that eager's pooling leaves; [N, C] in memory."""
    N, C = x.shape[:2]
    return x.new_empty_strided((N, C, 1, 1), (C, 1, 1, 1) if x.is_contiguous() else (C, 1, C, C), dtype=dtype)


def contiguous(vector: Tensor | None) -> Tensor | None:
    """A vector of parameters or statistics as the kernels read it, at unit stride."""
    return None if vector is None else vector.contiguous()


def rows(x: Tensor) -> Rows:
    """The row view of ``x``, which must be dense."""
    N, C = x.shape[0], x.shape[1]
    M = x.numel() // C
    return Rows(M, C, M // N, M == N or is_channels_last(x))


MAX_WINDOW = 255  # elements of a pooling window: a byte says which is the maximum, or that there is none


class Window(NamedTuple):
    """A pooling window: its size, its stride, and the padding around the input."""

    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int

    @classmethod
    def of(cls, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Window:
        return cls(*kernel_size, *stride, *padding)

    def pooled(self, H: int, W: int) -> tuple[int, int]:
        """Height and width of the output."""
        return (
            (H + 2 * self.padding_h - self.kernel_h) // self.stride_h + 1,
            (W + 2 * self.padding_w - self.kernel_w) // self.stride_w + 1,
        )


class Planes(NamedTuple):
    """A dense activation (N, C, H, W) and what pools it: seen by outputs, or by cells of a stride's size."""

    N: int
    C: int
    H: int
    W: int
    channels_last: bool
    window: Window

    @property
    def outputs(self) -> Rows:
        return self._rows(*self.window.pooled(self.H, self.W))

    @property
    def cells(self) -> Rows:
        return self._rows(-(-self.H // self.window.stride_h), -(-self.W // self.window.stride_w))

    def _rows(self, height: int, width: int) -> Rows:
        return Rows(self.N * height * width, self.C, height * width, self.channels_last)

    def pooled(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """An uninitialised output, in the input's memory format, on the device of ``like``."""
        shape = (self.N, self.C, *self.window.pooled(self.H, self.W))
        form = torch.channels_last if self.channels_last else torch.contiguous_format
        return torch.empty(shape, dtype=dtype, device=like.device, memory_format=form)


def planes(x: Tensor, window: Window) -> Planes:
    """The view of ``x`` [N, C, H, W], which must be dense. Where both formats are one, it is not channels-last."""
    N, C, H, W = x.shape
    return Planes(N, C, H, W, is_channels_last(x) and not x.is_contiguous(), window)
