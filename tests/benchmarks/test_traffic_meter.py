"""The traffic meter counts what a kernel of known traffic moves, and sees what must not be missed."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402

from benchmarks.instruments.meter import TrafficMeter  # noqa: E402

pytestmark = [
    pytest.mark.floor,
    pytest.mark.skipif(not knobs.runtime.interpret, reason="counts in Triton's interpreter"),
]
N, BLOCK = 1000, 64  # the last block is masked


@triton.jit
def _scale_kernel(x_ptr, scale_ptr, y_ptr, count_ptr, n, READS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask)
    for _ in range(READS - 1):
        x = tl.load(x_ptr + offs, mask=mask)
    tl.store(y_ptr + offs, x * tl.load(scale_ptr), mask=mask)
    tl.atomic_add(count_ptr, 1)


def scale(x: torch.Tensor, reads: int = 1) -> torch.Tensor:
    y = torch.empty_like(x)
    factor, count = torch.full((1,), 2.0), torch.zeros(1, dtype=torch.int32)
    _scale_kernel[(triton.cdiv(N, BLOCK),)](x, factor, y, count, x.numel(), reads, BLOCK)
    return y


@torch.library.custom_op("fusedres_tests::scale", mutates_args=())
def scale_op(x: torch.Tensor, copy: bool) -> torch.Tensor:
    return scale(x.clone() if copy else x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_counts_bytes_under_the_mask(dtype: torch.dtype) -> None:
    x = torch.randn(N, dtype=dtype)
    with TrafficMeter(x) as meter:
        y = scale(x)
    torch.testing.assert_close(y, 2 * x)
    [launch] = meter.launches
    traffic = {tensor.name: tensor for tensor in launch.tensors}
    programs = triton.cdiv(N, BLOCK)
    assert launch.kernel == "_scale_kernel"
    assert (traffic["x_ptr"].issued_read, traffic["x_ptr"].issued_written) == (N * x.element_size(), 0)
    assert (traffic["y_ptr"].issued_read, traffic["y_ptr"].issued_written) == (0, N * x.element_size())
    assert traffic["scale_ptr"].issued_read == 4 * programs
    assert traffic["count_ptr"].issued == 8 * programs, "an atomic reads and writes"
    assert meter.passes == 2
    assert meter.vector_bytes == 12 * programs
    assert (meter.stray_bytes, meter.aten) == (0, [])


@triton.jit
def _copy_kernel(x_ptr, y_ptr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs * STRIDE))


@pytest.mark.parametrize(("stride", "start", "sectors"), [(1, 0, 8), (2, 0, 16), (8, 0, 64), (16, 0, 64), (1, 4, 9)])
def test_sectors_show_uncoalesced_access(stride: int, start: int, sectors: int) -> None:
    x, y = torch.randn(1024 + start)[start:], torch.empty(1024)
    with TrafficMeter(x) as meter:
        _copy_kernel[(1,)](x, y, stride, BLOCK)
    [traffic, _] = meter.launches[0].tensors
    assert (traffic.issued, traffic.sectors) == (4 * BLOCK, 32 * sectors)
    assert meter.sector_bytes == 32 * (sectors + 8)


def test_a_second_pass_is_issued_but_not_distinct() -> None:
    x = torch.randn(N)
    with TrafficMeter(x) as meter:
        scale(x, reads=2)
    assert (meter.passes, meter.distinct_passes) == (3, 2)


def test_bytes_outside_of_the_arguments_are_stray() -> None:
    x, y = torch.randn(N), torch.empty(N)
    with TrafficMeter(x) as meter:
        _scale_kernel[(1,)](x[:8], torch.ones(1), y, torch.zeros(1, dtype=torch.int32), BLOCK, 1, BLOCK)
    assert meter.stray_bytes == 4 * (BLOCK - 8)


def test_masks_count_as_passes_and_partials_do_not() -> None:
    meter = TrafficMeter(torch.empty(64, 32, dtype=torch.bfloat16))
    assert meter.kind(torch.empty(8, 32, dtype=torch.uint8)) == "mask"
    assert meter.kind(torch.empty(64, 32)) == "activation"
    assert meter.kind(torch.empty(2, 3, 32)) == "vector"
    assert meter.kind(torch.empty(4, dtype=torch.int32)) == "vector"


def test_aten_work_beside_the_kernels_is_seen() -> None:
    x = torch.randn(10, 100)
    with TrafficMeter(x) as meter:
        x.contiguous()
        x.view(100, 10).t().detach()
        torch.empty_like(x)
        x.t().contiguous()  # a copy: read and write
        total = x + 1
        total.add_(x)  # reads both, writes one
        torch.zeros_like(x).copy_(x)  # writes, then reads one and writes the other
        x.sum().expand(10, 100).mul(2.0)  # the expanded scalar is one element
    assert [call.bytes / meter.nbytes for call in meter.aten] == pytest.approx([2, 2, 3, 1, 2, 1, 1], abs=0.01)
    assert meter.launches == []


def test_a_copy_inside_an_operator_is_seen() -> None:
    x = torch.randn(N)
    for copy in (False, True):
        with TrafficMeter(x) as meter:
            scale_op(x, copy)
        assert len(meter.launches) == 1
        assert meter.passes == 2
        assert meter.aten_passes == (2 if copy else 0)


def test_gradient_accumulation_is_seen() -> None:
    x = torch.randn(N, requires_grad=True)
    y = x.sigmoid() + x.tanh()
    with TrafficMeter(x) as meter:
        y.backward(torch.ones(N))
    assert "aten.add.Tensor" in [call.op for call in meter.aten]


def test_everything_is_restored() -> None:
    from triton.runtime import interpreter

    x = torch.randn(N)
    load, run = interpreter._interpreter.load, interpreter.GridExecutor.__call__
    meter = TrafficMeter(x)
    with pytest.raises(ZeroDivisionError), meter:
        raise ZeroDivisionError
    torch.add(x, 1)
    assert interpreter._interpreter.load is load
    assert interpreter.GridExecutor.__call__ is run
    assert meter.aten == []
