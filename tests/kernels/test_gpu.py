"""What only hardware can show: ordering, streams, graphs, devices, addresses beyond 2³¹ elements."""

from __future__ import annotations

import copy
import fcntl
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from fusedres import reference
from fusedres.functional import add_batch_norm_act, batch_norm_act, batch_norm_act_global_avg_pool2d
from fusedres.nn import BasicBlock, BatchNormAct2d, PreActBasicBlock
from tests.oracle import batch_norm_inputs, check_batch_norm

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("triton_backend")]
TWO_LAUNCHES = (16, 256, 28, 28)
LAUNCHES, LAUNCH_SECONDS = 100_000, 30  # of the long test: whichever ends first


def activation(shape=TWO_LAUNCHES, dtype=torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)


class PreActChain(nn.Module):
    """Two pre-activated blocks whose sums are normalised as they are made."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PreActBasicBlock(64, 64) for _ in range(2))
        self.norm = BatchNormAct2d(64, act="relu")

    def forward(self, x: Tensor) -> Tensor:
        residual = None
        for block in self.blocks:
            assert isinstance(block, PreActBasicBlock)
            x, residual = block.operands(x, residual)
        assert residual is not None
        return self.norm.add(x, residual)[1]


def basic_block() -> nn.Module:
    return BasicBlock(64, 64)


FAMILIES = (basic_block, PreActChain)


@pytest.fixture
def whole_memory() -> Iterator[None]:
    """One such test at a time, whatever the number of processes."""
    with (Path(tempfile.gettempdir()) / "fusedres-gpu-memory.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        yield
        torch.cuda.empty_cache()


def test_statistics_bit_for_bit(record_property):
    """10⁵ launches of the last-arriver reduction: a store that overtakes its atomic would show here."""
    from fusedres.kernels.batch_norm_statistics import batch_norm_fwd_stats
    from fusedres.kernels.layout import rows
    from fusedres.norm import Norm

    x = activation()

    def stats() -> Tensor:
        return batch_norm_fwd_stats(x, rows(x), Norm(None, None, training=True))

    first = stats()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    launches, end = 0, time.monotonic() + LAUNCH_SECONDS
    while launches < LAUNCHES and time.monotonic() < end:
        for _ in range(1000):
            wrong += (stats() != first).any()
        torch.cuda.synchronize()
        launches += 1000
    record_property("launches", launches)
    assert wrong.item() == 0


def test_backward_reduction_bit_for_bit():
    x, grad, residual = activation(), activation(), activation().requires_grad_()
    x.requires_grad_()
    weight = torch.rand(x.shape[1], device="cuda", requires_grad=True)
    out = batch_norm_act(x, None, None, weight, training=True, residual=residual, act="relu")
    leaves = [x, residual, weight]
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(2_000):
        for got, want in zip(torch.autograd.grad(out, leaves, grad, retain_graph=True), first, strict=True):
            wrong += (got != want).any()
    assert wrong.item() == 0


@pytest.mark.parametrize("shape", [TWO_LAUNCHES, (4, 256, 7, 7)], ids=["two launches", "one launch"])
def test_sum_bit_for_bit(shape):
    """Both outputs, the running statistics and all gradients of a join, launch after launch."""
    x, residual, grad, grad_sum = (activation(shape) for _ in range(4))
    weight = torch.rand(shape[1], device="cuda").requires_grad_()
    leaves = [x.requires_grad_(), residual.requires_grad_(), weight]

    def join() -> list[Tensor]:
        mean, var = torch.zeros(shape[1], device="cuda"), torch.ones(shape[1], device="cuda")
        outputs = add_batch_norm_act(x, residual, mean, var, weight, training=True, act="relu")
        return [*outputs, mean, var, *torch.autograd.grad(outputs, leaves, [grad_sum, grad])]

    first = join()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(2_000):
        for got, want in zip(join(), first, strict=True):
            wrong += (got != want).any()
    assert wrong.item() == 0


@pytest.mark.parametrize("shape", [(64, 512, 7, 7), (8, 512, 7, 7)], ids=["two launches", "one launch"])
def test_head_bit_for_bit(shape):
    x, residual = activation(shape).requires_grad_(), activation(shape).requires_grad_()
    weight, grad = torch.rand(shape[1], device="cuda").requires_grad_(), activation((*shape[:2], 1, 1))

    def head() -> list[Tensor]:
        out = batch_norm_act_global_avg_pool2d(x, None, None, weight, training=True, residual=residual, act="relu")
        return [out, *torch.autograd.grad(out, [x, residual, weight], grad)]

    first = head()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(2_000):
        for got, want in zip(head(), first, strict=True):
            wrong += (got != want).any()
    assert wrong.item() == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    ("dtype", "residual_dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("shape", [(8, 64, 56, 56), (4, 256, 7, 7), (4, 67, 28, 28)], ids=str)
def test_sum_oracle(shape, dtype, residual_dtype, channels_last, training):
    """At the sizes of a network, where every thread and many programs have work."""
    inputs = batch_norm_inputs(shape, dtype, residual=True, residual_dtype=residual_dtype)
    check_batch_norm(
        add_batch_norm_act, inputs, torch.device("cuda"), channels_last=channels_last, training=training, act="relu",
        eager=reference.add_batch_norm_act,
    )  # fmt: skip


def step(block: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    out = block(leaf)
    grads = torch.autograd.grad(out, [leaf, *block.parameters()], grad)
    return [out.detach(), *grads]


@pytest.mark.parametrize("build", FAMILIES)
def test_two_streams(build):
    """Reductions that run at once on two streams do not share their counters."""
    blocks = [build().cuda().to(memory_format=torch.channels_last) for _ in range(2)]
    inputs = [activation((32, 64, 56, 56), torch.float32) for _ in range(2)]
    grads = [torch.randn_like(x) for x in inputs]
    torch.backends.cudnn.deterministic = True
    expected = [step(*given) for given in zip(blocks, inputs, grads, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(50):
        results = []
        for stream, *given in zip(streams, blocks, inputs, grads, strict=True):
            with torch.cuda.stream(stream):
                results.append(step(*given))
        torch.cuda.synchronize()
        for result, wanted in zip(results, expected, strict=True):
            for got, want in zip(result, wanted, strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(8, 64, 28, 28), (4, 64, 4, 4)], ids=["two launches", "one launch"])
@pytest.mark.parametrize("build", FAMILIES)
def test_cuda_graph(build, shape):
    """A captured training step, replayed on new data and beside other work, moves the statistics as eager does."""
    block = build().cuda().to(memory_format=torch.channels_last)
    torch.backends.cudnn.deterministic = True
    x, grad = activation(shape, torch.float32), activation(shape, torch.float32)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(block, x, grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(block, x, grad)
    twin = copy.deepcopy(block)
    other = build().cuda()
    for _ in range(5):
        x.copy_(activation(shape, torch.float32))
        grad.copy_(activation(shape, torch.float32))
        with torch.cuda.stream(side):
            step(other, activation(shape, torch.float32), activation(shape, torch.float32))
        graph.replay()
        for got, want in zip(captured, step(twin, x, grad), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for got, want in zip(block.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got, want)


def test_two_graphs_at_once():
    x = activation()
    graphs, outputs = [], []
    for _ in range(2):
        batch_norm_act(x, None, None, training=True, act="relu")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(batch_norm_act(x, None, None, training=True, act="relu"))
        graphs.append(graph)
    expected = batch_norm_act(x, None, None, training=True, act="relu")
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(200):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for output in outputs:
            assert torch.equal(output, expected)


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    x = activation()
    expected = batch_norm_act(x, None, None, training=True, act="relu")
    with torch.cuda.device(0):
        elsewhere = batch_norm_act(x.to("cuda:1"), None, None, training=True, act="relu")
    assert elsewhere.device.index == 1
    torch.testing.assert_close(elsewhere.cpu(), expected.cpu())


@pytest.mark.usefixtures("whole_memory")
@pytest.mark.parametrize("channels_last", [True, False])
def test_beyond_int32(channels_last):
    """More than 2³¹ elements: the ends of every tensor are right, and so are the statistics."""
    shape = (33_000, 64, 32, 32)
    needed = 8 * 2 * shape[0] * shape[1] * shape[2] * shape[3]
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory")
    form = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=form).normal_(1.0, 2.0).requires_grad_()
    residual = torch.empty_like(x).normal_().detach().requires_grad_()
    mean, var = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
    out = batch_norm_act(x, mean, var, training=True, momentum=1.0, residual=residual, act="relu")
    torch.testing.assert_close(mean, torch.full_like(mean, 1.0), rtol=0, atol=1e-2)
    torch.testing.assert_close(var, torch.full_like(var, 4.0), rtol=1e-2, atol=0)
    out.backward(torch.ones_like(out))
    for part in (slice(0, 4), slice(-4, None)):
        z = torch.nn.functional.batch_norm(x[part].detach().float(), mean, var, eps=1e-5) + residual[part].float()
        torch.testing.assert_close(out[part].float(), z.relu(), rtol=0.02, atol=0.02)
        agree = (residual.grad[part] > 0) == (z > 0)
        assert agree.float().mean() > 0.999  # the rest lies within rounding of zero
    assert x.grad.isfinite().all()


def test_no_host_synchronisation():
    """Not even for the cumulative average, for which PyTorch's own module reads its counter on the host."""
    block = BasicBlock(64, 64).cuda()
    block.bn1.momentum = block.bn2.momentum = None
    x = activation((8, 64, 28, 28), torch.float32)
    step(block, x, torch.randn_like(x))
    grad = torch.randn_like(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(block, x, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode):
    torch._dynamo.reset()
    block = BasicBlock(64, 64).cuda().to(memory_format=torch.channels_last)
    twin = copy.deepcopy(block)
    compiled = torch.compile(twin, fullgraph=True, mode=mode)
    for _ in range(4):
        x = activation((8, 64, 14, 14), torch.float32)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        for run, leaf in zip((block, compiled), leaves, strict=True):
            run(leaf).backward(torch.ones_like(x) + x.detach())
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(twin.bn1.running_var, block.bn1.running_var)


def test_peak_memory_of_a_residual_layer():
    """Forward keeps the output and one bit an element; eager keeps the BatchNorm's output beside them."""
    x, residual = activation().requires_grad_(), activation().requires_grad_()
    batch_norm_act(x, None, None, training=True, residual=residual, act="relu")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = batch_norm_act(x, None, None, training=True, residual=residual, act="relu")
    grown = torch.cuda.max_memory_allocated() - before
    assert grown <= 1.1 * out.numel() * out.itemsize * (1 + 1 / 16)
