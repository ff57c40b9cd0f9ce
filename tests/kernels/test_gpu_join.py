"""The projection join on hardware: ordering, graphs, and the sizes of a network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusedres.functional import forked_batch_norm_add_batch_norm_act
from tests.functional.join_parts import JoinInputs, check_join, join_inputs, run_join

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("triton_backend")]
SHAPES = [(16, 256, 28, 28), (4, 256, 7, 7)]
both_tilings = pytest.mark.parametrize("shape", SHAPES, ids=["apart", "on-chip"])


def on_gpu(shape: tuple[int, ...]) -> JoinInputs:
    def move(t: Tensor) -> Tensor:
        return (t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t).cuda()

    return join_inputs(shape, torch.bfloat16, fork=True).map(move)


@both_tilings
def test_bit_for_bit(shape):
    """Output, running statistics and all gradients, launch after launch."""
    inputs = on_gpu(shape)
    first = run_join(forked_batch_norm_add_batch_norm_act, inputs, True, "relu")
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1_000):
        for name, got in run_join(forked_batch_norm_add_batch_norm_act, inputs, True, "relu").items():
            wrong += (got != first[name]).any()
    assert wrong.item() == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fork", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape", [(8, 256, 56, 56), (8, 512, 28, 28), (8, 1024, 14, 14), (8, 2048, 7, 7), (4, 67, 28, 28)], ids=str
)
def test_oracle(shape, dtype, channels_last, fork, training):
    """The four joins of a ResNet-50, and rows that allow no wide access."""
    inputs = join_inputs(shape, dtype, fork=fork)
    check_join(inputs, torch.device("cuda"), channels_last=channels_last, training=training, act="relu")


@both_tilings
def test_cuda_graph(shape):
    """A captured forward and backward, replayed on new data, also moves the statistics and both batch counters."""
    inputs, norms = on_gpu(shape), []
    leaves = [t.requires_grad_() for t in (inputs.input, inputs.other, inputs.weight, inputs.other_bias)]

    def step(norms: list) -> list[Tensor]:
        outs = forked_batch_norm_add_batch_norm_act(inputs.input, inputs.other, *norms, act="relu")
        return [outs[0], *torch.autograd.grad(outs, leaves, [inputs.grad, inputs.grad_fork])]

    norms = [inputs.norm("", True, None), inputs.norm("other_", True, 0.1)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(norms)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(norms)
    own = ("running_mean", "running_var", "num_batches_tracked")
    twins = [norm._replace(**{name: getattr(norm, name).clone() for name in own}) for norm in norms]
    for _ in range(3):
        with torch.no_grad():
            inputs.input.normal_()
            inputs.other.normal_()
        graph.replay()
        for got, want in zip(captured, step(twins), strict=True):
            assert torch.equal(got, want)
    for norm, twin in zip(norms, twins, strict=True):
        assert all(torch.equal(getattr(norm, name), getattr(twin, name)) for name in own)
