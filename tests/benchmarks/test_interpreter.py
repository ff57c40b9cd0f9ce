"""The interpreter that stands in for a GPU: its casts are the hardware's."""

from __future__ import annotations

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false
import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.floor


@triton.jit
def _cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets).to(y_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_casts_round_to_nearest_even(device, dtype):
    """Every exponent, subnormals, ties, overflow to infinity and NaN; and back without a change."""
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), dtype=torch.int64).to(torch.int32)
    bits[::4] &= ~0x7FFF  # ties of bfloat16, for one bit in two
    bits[1::64] = 0x7F7FFFFF
    bits[2::64] = 0x7F800001  # a NaN whose payload is in the lowest bits
    x = bits.view(torch.float32).to(device)
    y, back = torch.empty_like(x, dtype=dtype), torch.empty_like(x)
    _cast_kernel[(1,)](x, y, x.numel())
    _cast_kernel[(1,)](y, back, x.numel())
    torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
