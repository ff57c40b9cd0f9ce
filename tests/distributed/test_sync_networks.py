"""Whole networks over two ranks equal one process with the whole batch: DDP, FSDP2, subgroups.

Compiled ones are in test_sync_training.py, compiled layers in test_sync_batch_norm.py.
"""

from __future__ import annotations

import collections
import copy
import os
from collections.abc import Callable
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
from torch.utils._python_dispatch import TorchDispatchMode

import fusedres
from fusedres import models
from fusedres.nn import SyncBatchNormAct
from tests.distributed.ranks import RANKS, run_ranks
from tests.fusion.trained import Decided
from tests.oracle import assert_network_as_good_as_eager
from tests.zoo import TOLERANCE, counts, images, randomise, small

SPLIT = (3, 2)
NORMS = {"small": 12, "preact": 7}


def preact() -> nn.Module:
    return randomise(models.PreActResNet(models.PreActBasicBlock, [1, 2], 5, width=8, small_input=True))


def batch(rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Images and cotangents, of all ranks or of one."""
    torch.manual_seed(1)
    x, cotangent = images(sum(SPLIT), 3, 8, 8), torch.randn(sum(SPLIT), 5, dtype=torch.float64)
    if rank is None:
        return x, cotangent
    start = sum(SPLIT[:rank])
    return x[start : start + SPLIT[rank]], cotangent[start : start + SPLIT[rank]]


def train(model: nn.Module, x: Tensor, cotangent: Tensor, average: int = 1) -> dict[str, Tensor]:
    """Output, gradients and buffers of a second step; ``average`` is over how many ranks gradients are averaged."""
    model(x).backward(cotangent)
    model.zero_grad()
    out = model(x)
    out.backward(cotangent)
    values = {"output": out.detach()}
    for name, parameter in model.named_parameters():
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        values[f"grad {_bare(name)}"] = grad * average
    values |= {f"buffer {_bare(name)}": buffer.clone() for name, buffer in model.named_buffers()}
    return values | {"evaluated": model.eval()(x).detach()}


def _bare(name: str) -> str:
    return name.removeprefix("module.")


def build(name: str) -> nn.Module:
    torch.manual_seed(2)  # 0 and 1 have values at the edge of a ReLU
    return {"small": small, "preact": preact}[name]()


def converted(name: str) -> nn.Module:
    return fusedres.convert_sync_batchnorm(fusedres.fuse(build(name)))


def fused_after(name: str) -> nn.Module:
    return fusedres.fuse(fusedres.convert_sync_batchnorm(build(name)))


def unfused(name: str) -> nn.Module:
    return fusedres.convert_sync_batchnorm(build(name))


def unfused_again(name: str) -> nn.Module:
    return fusedres.unfuse(converted(name))


WAYS: tuple[Callable[[str], nn.Module], ...] = (converted, fused_after, unfused, unfused_again)
IN_DDP = [*(("small", way) for way in WAYS), ("preact", converted), ("preact", fused_after)]


def in_ddp(rank: int) -> dict[str, Any]:
    return {
        f"{name} {way.__name__}": train(DistributedDataParallel(way(name)), *batch(rank), RANKS) for name, way in IN_DDP
    }


def in_fsdp(rank: int) -> dict[str, Any]:
    model = converted("small")
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in model.modules():
        if isinstance(block, models.Bottleneck):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert counts(model)["bn_add_act"] == 3
    return {"small FSDP2": train(model, *batch(rank), RANKS)}


def with_subgroups(rank: int) -> dict[str, Any]:
    """A group of both, and one of each rank alone: the latter is plain BatchNorm."""
    both, *alone = [dist.new_group(ranks) for ranks in ([0, 1], [0], [1])]
    model = fusedres.fuse(fusedres.convert_sync_batchnorm(build("small"), both))
    results = {"small group": train(DistributedDataParallel(model), *batch(rank), RANKS)}
    own = train(fusedres.convert_sync_batchnorm(fusedres.fuse(build("small")), alone[rank]), *batch(rank))
    for name, value in train(build("small"), *batch(rank)).items():
        torch.testing.assert_close(own[name], value, **TOLERANCE)
    return results


def with_kernels(rank: int) -> dict[str, Tensor]:
    """In float32, interpreted, without fallback."""
    model = converted("preact").float()
    x, cotangent = (tensor.float() for tensor in batch(rank))
    with mock.patch.dict(os.environ, FUSEDRES_BACKEND="triton"):
        return train(DistributedDataParallel(model), x, cotangent, RANKS)


def collectives(rank: int) -> dict[str, dict[str, int]]:
    """How many of each a step of the bare network has."""
    seen = {}
    for name in NORMS:
        model = converted(name)
        x, cotangent = batch(rank)
        with _Collectives() as mode:
            model(x).backward(cotangent)
        seen[name] = dict(mode.counts)
    return seen


class _Collectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func.name().partition("::")
        if "c10d" in namespace and name != "wait_tensor":
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@mock.patch.dict(os.environ, FUSEDRES_BACKEND="reference")
def everything(rank: int) -> dict[str, Any]:
    networks = in_ddp(rank) | in_fsdp(rank) | with_subgroups(rank)
    return {"networks": networks, "kernels": with_kernels(rank), "collectives": collectives(rank)}


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_ranks(everything)


RUNS = [*(f"{name} {way.__name__}" for name, way in IN_DDP), "small FSDP2", "small group"]


@pytest.mark.parametrize("run", RUNS)
def test_as_one_process(found, run):
    parts = [results["networks"][run] for results in found]
    for name, value in train(build(run.split()[0]), *batch()).items():
        if name in ("output", "evaluated"):
            ours = torch.cat([part[name] for part in parts])
        else:
            ours = parts[0][name]
            assert torch.equal(ours, parts[1][name]), name
        torch.testing.assert_close(ours, value, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def test_kernels_as_one_process(found):
    x, cotangent = batch()
    with Decided():
        exact = train(build("preact"), x.float().double(), cotangent.float().double())
    eager = train(build("preact").float(), x.float(), cotangent.float())
    one, other = (results["kernels"] for results in found)
    ours = {
        name: torch.cat((value, other[name])) if value.shape != exact[name].shape else value
        for name, value in one.items()
    }
    assert_network_as_good_as_eager(ours, [eager], exact)


@pytest.mark.parametrize("name", NORMS)
def test_two_collectives_a_layer(found, name):
    for results in found:
        assert results["collectives"][name] == {"all_gather_into_tensor": NORMS[name], "all_reduce": NORMS[name]}


def test_the_same_modules():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm2d(4), fusedres.nn.BatchNormAct2d(4), nn.SyncBatchNorm(4))
    norms, state = list(model), {name: value.clone() for name, value in model.state_dict().items()}
    parameters, seen = list(model.parameters()), []
    norms[1].register_forward_hook(lambda *args: seen.append(1))
    assert fusedres.convert_sync_batchnorm(model) is model
    assert list(model) == norms
    assert all(type(norm) is SyncBatchNormAct and isinstance(norm, nn.BatchNorm2d) for norm in norms)
    assert [norm.act for norm in norms] == [None, None, "relu", None]
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    assert {name: value.shape for name, value in model.state_dict().items()} == {n: v.shape for n, v in state.items()}
    model.load_state_dict(state)
    norms[1](torch.randn(2, 4, 3, 3))
    assert seen == [1]
    assert type(copy.deepcopy(model)[1]) is SyncBatchNormAct


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 2), (2, 3, 2, 2, 2)])
def test_alone_it_is_plain(shape, training):
    x = torch.randn(shape, dtype=torch.float64)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    norm = kind(3).double().train(training)
    ours = fusedres.convert_sync_batchnorm(copy.deepcopy(norm))
    assert torch.equal(ours(x), norm(x))
    assert torch.equal(ours(x, x, act="relu"), torch.relu(norm(x) + x))
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        ours(torch.randn(3))


def test_what_else_a_norm_does_is_not_lost():
    class Own(nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input).tanh()

    model = nn.Sequential(nn.BatchNorm2d(4), Own(4))
    with pytest.raises(TypeError, match="1 is a Own"):
        fusedres.convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d


@pytest.mark.parametrize(("way", "name"), [(converted, "small"), (fused_after, "small"), (converted, "preact")])
def test_fused_as_before(way, name):
    """But for what takes two BatchNorms, or their output and a pooling."""
    model = way(name)
    found = counts(model)
    assert found == counts(fusedres.fuse(build(name), disable={"stem", "join", "fork", "head"}))
    assert counts(fusedres.fuse(model)) == found


def test_pytorchs_converter_keeps_every_relu():
    model, x = converted("small").eval(), batch()[0]
    plain = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert sum(type(module) is nn.SyncBatchNorm for module in plain.modules()) == NORMS["small"]
    torch.testing.assert_close(plain(x), model(x), **TOLERANCE)
    with pytest.raises(RuntimeError, match="drop its activation"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(SyncBatchNormAct(4, act="relu")))
