"""BatchNorm over two ranks equals one process with the whole batch: kernels and reference, forward and backward."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.instruments.meter import TrafficMeter
from fusedres import functional, reference
from fusedres.nn import SyncBatchNormAct
from tests.distributed.ranks import RANKS, run_ranks
from tests.oracle import (
    BatchNormInputs,
    Tensors,
    assert_as_good_as_eager,
    batch_norm_inputs,
    run_batch_norm,
    silence_boundary,
    to_double,
)

pytestmark = pytest.mark.floor
ROWS = {"sum", "out", "grad_input", "grad_residual"}  # a part on each rank
SHARES = {"grad_weight", "grad_bias"}  # a share on each rank, to be added


@dataclass(frozen=True)
class Case:
    """One layer; ``split`` is the number of samples on each rank."""

    split: tuple[int, int] = (3, 2)
    channels: int = 5
    size: tuple[int, ...] = (4, 3)
    dtype: torch.dtype = torch.float32
    residual_dtype: torch.dtype | None = None
    residual: bool = True
    added: bool = False
    act: str | None = "relu"
    momentum: float | None = 0.1
    tracking: bool = True
    affine: bool = True
    channels_last: bool = False
    mean: float = 0.5

    @property
    def backend(self) -> str:
        return "reference" if self.dtype == torch.float64 else "triton"

    @property
    def eager(self):
        return reference.add_batch_norm_act if self.added else reference.batch_norm_act

    def inputs(self) -> BatchNormInputs:
        """The whole batch, the same on every rank."""
        torch.manual_seed(0)
        inputs = batch_norm_inputs(
            (sum(self.split), self.channels, *self.size), self.dtype, residual=self.residual, tracking=self.tracking,
            affine=self.affine, residual_dtype=self.residual_dtype, mean=self.mean,
            parameter_dtype=torch.promote_types(self.dtype, torch.float32),
        )  # fmt: skip
        if self.act is not None:
            silence_boundary(inputs, True, added=self.added)
        return inputs if self.added else replace(inputs, grad_sum=None)

    def part(self, rank: int) -> BatchNormInputs:
        """The samples of ``rank``."""
        inputs, start = self.inputs(), sum(self.split[:rank])

        def rows(tensor: Tensor) -> Tensor:
            if tensor.shape != inputs.input.shape:
                return tensor
            form = torch.channels_last if self.channels_last else torch.contiguous_format
            return tensor[start : start + self.split[rank]].clone(memory_format=form)

        return inputs.map(rows)


DOUBLE = Case(dtype=torch.float64)
CASES = {
    "float64": DOUBLE,
    "float64-plain": replace(DOUBLE, residual=False, act=None, channels_last=True),
    "float64-act": replace(DOUBLE, residual=False),
    "float64-add": replace(DOUBLE, residual=True, act=None),
    "float64-added": replace(DOUBLE, added=True, split=(1, 4)),
    "float64-added-empty": replace(DOUBLE, added=True, split=(5, 0)),
    "float64-empty": replace(DOUBLE, split=(0, 5)),
    "float64-cumulative": replace(DOUBLE, momentum=None),
    "float64-untracked": replace(DOUBLE, tracking=False, affine=False),
    "float64-rows": replace(DOUBLE, size=()),
    "float32": Case(),
    "float32-plain": Case(residual=False, act=None),
    "float32-act": Case(residual=False, channels_last=True),
    "float32-add": Case(act=None, channels_last=True),
    "float32-added": Case(added=True),
    "float32-added-empty": Case(added=True, split=(0, 5)),
    "float32-empty": Case(split=(5, 0)),
    "float32-one-row": Case(split=(4, 1), size=(1, 1)),
    "float32-rows": Case(size=(), split=(40, 21)),
    "float32-large-mean": Case(mean=2000.0, size=(7, 6)),
    "float32-cumulative": Case(momentum=None, split=(2, 3)),
    "float32-untracked": Case(tracking=False, affine=False),
    "float32-many-channels": Case(channels=131, size=(2, 2), channels_last=True),
    "bfloat16": Case(dtype=torch.bfloat16, channels_last=True, channels=16, size=(6, 6)),
    "bfloat16-added": Case(dtype=torch.bfloat16, added=True),
    "bfloat16-float32-residual": Case(dtype=torch.bfloat16, residual_dtype=torch.float32),
    "float16-act": Case(dtype=torch.float16, residual=False),
}


def layer(case: Case, rank: int) -> Tensors:
    function = functional.add_batch_norm_act if case.added else functional.batch_norm_act
    part = case.part(rank)
    with mock.patch.dict(os.environ, FUSEDRES_BACKEND=case.backend):
        found = run_batch_norm(function, part, True, case.act, momentum=case.momentum, group=dist.group.WORLD)
    assert found["out"].stride() == part.input.stride()
    return found


def all_layers(rank: int) -> dict[str, Tensors]:
    return {name: layer(case, rank) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def found() -> list[dict[str, Tensors]]:
    return run_ranks(all_layers)


def joined(parts: list[Tensors]) -> Tensors:
    """What the ranks found, as one process would have; buffers are equal on all ranks bit for bit."""
    whole = {}
    for name, tensor in parts[0].items():
        tensors = [part[name] for part in parts]
        if name in ROWS:
            whole[name] = torch.cat(tensors)
        elif name in SHARES:
            whole[name] = torch.stack(tensors).sum(0)
        else:
            assert torch.equal(*tensors), name
            whole[name] = tensor
    return whole


@pytest.mark.parametrize("name", CASES)
def test_as_one_process(found, name):
    case = CASES[name]
    inputs, actual = case.inputs(), joined([results[name] for results in found])
    run = functools.partial(run_batch_norm, case.eager, training=True, act=case.act, momentum=case.momentum)
    exact = run(inputs.map(to_double))
    if case.dtype == torch.float64:
        for key, value in exact.items():
            torch.testing.assert_close(actual[key], value, rtol=1e-8, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}")
    else:
        last = inputs.map(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)
        assert_as_good_as_eager(actual, [run(inputs), run(last)], exact)


@pytest.fixture
def fake_group():
    """A world in which the other rank is never heard: enough to count what this one does."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield dist.group.WORLD
    dist.destroy_process_group()


BIT = 1 / 16
BUDGET = {"plain": (3, 5), "residual": (4 + BIT, 6 + BIT), "added": (5, 6)}  # passes, as with one rank


@pytest.mark.parametrize("form", BUDGET)
@pytest.mark.parametrize("channels_last", [True, False])
def test_bytes_and_launches(fake_group, triton_backend, form, channels_last):
    shape = (8, 32, 14, 14)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x, r, dy, ds = (torch.randn(shape).bfloat16().contiguous(memory_format=memory_format) for _ in range(4))
    x.requires_grad_()
    r.requires_grad_()
    weight, bias = torch.ones(32, requires_grad=True), torch.zeros(32, requires_grad=True)
    state = (torch.zeros(32), torch.ones(32), weight, bias, True)
    options = {"act": "relu", "num_batches_tracked": torch.tensor(0), "group": fake_group}
    forward, backward = TrafficMeter(x), TrafficMeter(x)
    with forward:
        if form == "added":
            outputs = functional.add_batch_norm_act(x, r, *state, **options)
        else:
            outputs = (functional.batch_norm_act(x, *state, residual=None if form == "plain" else r, **options),)
    leaves = [x, weight, bias] if form == "plain" else [x, r, weight, bias]
    with backward:
        torch.autograd.grad(outputs, leaves, [ds, dy] if form == "added" else [dy])
    for meter, budget, launches in zip((forward, backward), BUDGET[form], (3, 2), strict=True):
        assert meter.passes + meter.aten_passes <= 1.05 * budget
        assert len(meter.launches) == launches
        assert meter.stray_bytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(device, dtype):
    ops, check = torch.ops.fusedres, torch.library.opcheck
    x, r, g = (torch.randn(3, 4, 5, 3, device=device).to(dtype) for _ in range(3))
    vector = torch.rand(4, device=device) + 0.5
    messages = torch.rand(2, 9, device=device)
    messages[:, 8] = 45
    stats = torch.rand(4, 4, device=device)
    for residual in (None, r):
        check(ops.sync_moments.default, (x, residual))
        check(ops.sync_normalise.default, (x, residual, stats, "relu", True))
    counter = torch.tensor(0, device=device)
    check(ops.sync_merge.default, (messages, vector, None, vector.clone(), vector.clone(), counter, None, 1e-5))
    mask = torch.randint(0, 256, (6 * 4,), dtype=torch.uint8, device=device)
    for residual_dtype in (None, dtype):
        check(ops.sync_reduce.default, (g, x, stats, mask, "relu", residual_dtype))
    for grad_sum in (None, r):
        check(ops.sync_gradient.default, (g, grad_sum, x, stats, stats[:2].clone(), mask, "relu"))


def test_saved_for_backward(fake_group, triton_backend):
    """The input, vectors of the channels, and a bit an element where there is a residual."""
    x, r = torch.randn(2, 8, 6, 6, requires_grad=True), torch.randn(2, 8, 6, 6, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        functional.batch_norm_act(x, None, None, training=True, residual=r, act="relu", group=fake_group)
    assert sum(t.nbytes for t in saved if t.data_ptr() != x.data_ptr()) == 4 * 6 * 8 + 9 * 8


def test_one_value_is_refused_alone_only(fake_group):
    x = torch.randn(1, 3, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value"):
        functional.batch_norm_act(x, None, None, training=True)
    functional.batch_norm_act(x, None, None, training=True, group=fake_group)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_all_batches_empty(fake_group, monkeypatch, device, backend):
    """Nothing is learnt, as by one process; the batch is counted."""
    monkeypatch.setenv("FUSEDRES_BACKEND", backend)
    norm = SyncBatchNormAct(3).to(device)
    x = torch.randn(0, 3, 2, 2, device=device, requires_grad=True)
    norm(x, x).sum().backward()
    assert x.grad is not None and norm.weight.grad is not None
    assert norm.weight.grad.tolist() == [0, 0, 0]
    assert norm.running_mean is not None and norm.running_mean.tolist() == [0, 0, 0]
    assert norm.running_var is not None and norm.running_var.tolist() == [1, 1, 1]
    assert norm.num_batches_tracked == 1


def test_outside_of_the_group_it_is_plain(fake_group):
    x, plain = torch.randn(2, 3, 2, 2, dtype=torch.float64), nn.BatchNorm2d(3).double()
    norm = SyncBatchNormAct(3, act=None, process_group=dist.new_group([1])).double()
    for candidate in (norm, torch.compile(norm, backend="eager", fullgraph=True)):
        assert torch.equal(candidate(x), plain(x))
    assert torch.equal(norm.running_var, plain.running_var)


@pytest.mark.parametrize("added", [False, True])
def test_batch_size_in_the_data(fake_group, triton_backend, added):
    """Down to an empty batch, in one graph."""
    torch._dynamo.reset()
    function = functional.add_batch_norm_act if added else functional.batch_norm_act

    def picked(x: Tensor, keep: Tensor) -> Any:
        return function(x[keep], residual=x[keep], running_mean=None, running_var=None, training=True, act="relu",
                        group=dist.group.WORLD)  # fmt: skip

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(picked, backend=counter, fullgraph=True)
    with mock.patch("torch._dynamo.config.capture_dynamic_output_shape_ops", True):
        for kept in (3, 5, 0, 2):
            x, keep = torch.randn(5, 3, 2, 2, requires_grad=True), torch.arange(5) < kept
            grads = []
            for candidate in (compiled, picked):
                out = candidate(x, keep)
                out = out[1] if added else out
                grads.append((out, *torch.autograd.grad(out, x, torch.ones_like(out))))
            torch.testing.assert_close(grads[0], grads[1])
    assert counter.frame_count == 1


def test_double_backward_is_refused(fake_group):
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    out = functional.batch_norm_act(x, None, None, training=True, group=fake_group)
    with pytest.raises(NotImplementedError, match="several ranks has no double backward"):
        torch.autograd.grad(out.square().sum(), x, create_graph=True)
