"""Training over several ranks as users set it up: DDP's options, accumulation and compilation."""

from __future__ import annotations

import contextlib
import os
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fusedres
from tests import zoo
from tests.distributed.ranks import RANKS, run_ranks
from tests.fusion.captured import Recorder
from tests.zoo import TOLERANCE, counts, images, randomise

SPLIT = (5, 0)  # the second rank takes part in every collective all the same
DDP_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "static graph": {"static_graph": True},
    "unused parameters": {
        "find_unused_parameters": True,
        "broadcast_buffers": False,
        "gradient_as_bucket_view": True,
        "bucket_cap_mb": 0.0001,
    },
}


class Net(nn.Module):
    """A stem, a residual block and a head; ``spare`` is a part that no forward reads."""

    def __init__(self, spare: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(zoo.conv(3, 4), nn.BatchNorm2d(4), nn.ReLU())
        self.block = zoo.ResBlock(4, 4)
        self.head = nn.Linear(4, 5)
        self.spare = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) if spare else None

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).mean((2, 3)))


def build(spare: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return randomise(Net(spare))


def synchronised(spare: bool = False) -> nn.Module:
    model = fusedres.convert_sync_batchnorm(fusedres.fuse(build(spare)))
    assert counts(model)["bn_add_act"] == 1
    return model


def rows(tensor: Tensor, rank: int | None, split: tuple[int, ...] = SPLIT) -> Tensor:
    """Those of ``rank``, or all."""
    return tensor if rank is None else tensor.split(split)[rank]


def train(model: nn.Module, rank: int | None = None, average: int = 1, always: bool = False) -> dict[str, Tensor]:
    """State after two steps of two micro-batches, of which DDP and FSDP2 communicate the last one alone.

    ``average``: over how many ranks gradients are averaged. ``always``: communicate after each.
    """
    torch.manual_seed(1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        for last in (False, True):
            x, cotangent = images(sum(SPLIT), 3, 6, 6), torch.randn(sum(SPLIT), 5, dtype=torch.float64)
            if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
                model.set_requires_gradient_sync(last)  # pyright: ignore[reportCallIssue]
            alone = isinstance(model, DistributedDataParallel) and not last and not always
            with model.no_sync() if alone else contextlib.nullcontext():  # pyright: ignore[reportAttributeAccessIssue]
                model(rows(x, rank)).backward(rows(cotangent, rank) * average)
        optimizer.step()
    state = {name.removeprefix("module."): value.detach().clone() for name, value in model.state_dict().items()}
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def in_ddp(rank: int) -> dict[str, Any]:
    results = {}
    for name, options in DDP_OPTIONS.items():
        model = DistributedDataParallel(synchronised(name == "unused parameters"), **options)
        # PyTorch's no_sync and static_graph do not go together, with any model.
        results[name] = train(model, rank, RANKS, always=name == "static graph")
    return results


def in_fsdp(rank: int) -> dict[str, Any]:
    model = synchronised()
    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(model.get_submodule("block"), mesh=mesh)
    return {"FSDP2": train(fully_shard(model, mesh=mesh), rank, RANKS)}


def in_pieces(model: nn.Module, backend: Any) -> nn.Module:
    """Compiled with DDP around it, which torch.compile cuts between DDP's buckets."""
    model = DistributedDataParallel(model, bucket_cap_mb=0.0001)
    model.compile(backend=backend)
    return model


def compiled(rank: int) -> dict[str, Any]:
    inside, recorder = synchronised(), Recorder("aot_eager")
    inside.compile(backend=recorder, fullgraph=True)
    results = {"compiled in DDP": train(DistributedDataParallel(inside), rank, RANKS)}
    assert len(recorder.graphs) == 1, "micro-batches and steps share a graph"
    with mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 64):
        return results | {"DDP compiled": train(in_pieces(synchronised(), "aot_eager"), rank, RANKS)}


def captured(rank: int) -> list[dict[str, int]]:
    """What the backend finds in the pieces of a network that fuse has not seen; as without it."""
    recorder, expected = Recorder("aot_eager"), train(DistributedDataParallel(build()), rank, RANKS)
    with mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 64):
        for name, value in train(in_pieces(build(), recorder), rank, RANKS).items():
            torch.testing.assert_close(value, expected[name], **TOLERANCE, msg=name)
    return recorder.graphs


def evaluated_alone(rank: int) -> bool:
    """A rank that evaluates takes no part in any collective, so the other need not."""
    model = synchronised()
    if rank == 0:
        model.eval()(images())
    train(DistributedDataParallel(model.train()), rank, RANKS)
    return True


def on_two_paths(rank: int) -> dict[str, Tensor]:
    """In float32, on rank 0 by the kernels and on rank 1 by the reference."""
    with mock.patch.dict(os.environ, FUSEDRES_BACKEND=("triton", "reference")[rank]):
        torch.manual_seed(1)
        model, x = synchronised().float(), images(sum(SPLIT), 3, 6, 6).float()
        model(rows(x, rank, (3, 2))).square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for grad in grads.values():
        dist.all_reduce(grad)
    return grads | dict(model.named_buffers())


@mock.patch.dict(os.environ, FUSEDRES_BACKEND="reference")
def everything(rank: int) -> dict[str, Any]:
    return {
        "states": in_ddp(rank) | in_fsdp(rank) | compiled(rank), "captured": captured(rank),
        "evaluated": evaluated_alone(rank), "paths": on_two_paths(rank),
    }  # fmt: skip


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_ranks(everything)


RUNS = [*DDP_OPTIONS, "FSDP2", "compiled in DDP", "DDP compiled"]


@pytest.mark.parametrize("run", RUNS)
def test_trained_as_by_one_process(found, run):
    for name, value in train(build(run == "unused parameters")).items():
        for results in found:
            torch.testing.assert_close(results["states"][run][name], value, **TOLERANCE, msg=f"{run}: {name}")


def test_pieces_of_a_compiled_ddp_are_fused(found):
    for results in found:
        patterns = {pattern for graph in results["captured"] for pattern in graph}
        assert len(results["captured"]) > 1 and "bn_act" in patterns
        assert any("add" in pattern for pattern in patterns)


def test_a_rank_evaluates_alone(found):
    assert all(results["evaluated"] for results in found)


def test_ranks_on_two_paths(found):
    torch.manual_seed(1)
    model, x = build().float(), images(sum(SPLIT), 3, 6, 6).float()
    model(x).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()} | dict(model.named_buffers())
    for results in found:
        for name, value in expected.items():
            torch.testing.assert_close(results["paths"][name], value, rtol=1e-4, atol=1e-4, msg=name)
