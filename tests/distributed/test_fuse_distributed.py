"""DDP, FSDP2 and mixed precision around a fused model, in one process."""

from __future__ import annotations

import copy
import functools
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fusedres
from fusedres import models
from fusedres.fusion import runtime
from tests.fusion.linear_parts import BUILDS, rows
from tests.zoo import TOLERANCE, assert_same_steps, counts, images, small


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def joins(model: nn.Module) -> int:
    """Blocks whose addition and ReLU are fused with what is in front of them."""
    return sum(count for pattern, count in counts(model).items() if "add" in pattern and "act" in pattern)


def test_fsdp(group):
    model, x = fusedres.fuse(small()), images()
    reference = copy.deepcopy(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for block in model.modules():
        if isinstance(block, models.Bottleneck):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert joins(model) == 3
    cotangent = torch.randn(2, 5, dtype=torch.float64)
    for candidate in (model, reference):
        candidate(x).backward(cotangent)
    for ours, its in zip(model.parameters(), reference.parameters(), strict=True):
        assert isinstance(ours.grad, DTensor)
        torch.testing.assert_close(ours.grad.full_tensor(), its.grad, **TOLERANCE)
    # A sharded block is of a class of FSDP's, under which fuse's stays; it still stands aside.
    for candidate in (model, reference):
        block = candidate.get_submodule("layer1.0")
        block.register_module("relu", nn.GELU())
    torch.testing.assert_close(model(x), reference(x), **TOLERANCE)
    assert joins(model) == 2
    torch.testing.assert_close(fusedres.unfuse(model)(x), reference(x), **TOLERANCE)


def test_predicted_bytes_of_wrapped_models(group):
    model, shape = fusedres.fuse(small().float()), tuple(images().shape)
    plain = copy.deepcopy(model)
    expected = fusedres.explain(model, input=shape)
    assert expected.bytes_saved > 0
    wrapped = fusedres.explain(DistributedDataParallel(copy.deepcopy(model)), input=shape)
    assert [row["bytes_saved"] for row in wrapped.rows] == [row["bytes_saved"] for row in expected.rows]
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for block in model.modules():
        if isinstance(block, models.Bottleneck):
            fully_shard(block, mesh=mesh)
    sharded = fusedres.explain(fully_shard(model, mesh=mesh), input=shape)
    # FSDP looks at the tensors between its blocks: they have one name, and none is averaged before it is there.
    apart = fusedres.explain(fusedres.fuse(fusedres.unfuse(plain), disable={"fork", "head"}), input=shape)
    saved = [{row["module"]: row["bytes_saved"] for row in found.rows} for found in (sharded, apart)]
    assert saved[0] == saved[1]


def assert_same_gradients(model: nn.Module, reference: nn.Module, x: torch.Tensor) -> None:
    cotangent = torch.randn_like(reference(x))
    for candidate in (model, reference):
        candidate(x).backward(cotangent)
    for ours, its in zip(model.parameters(), reference.parameters(), strict=True):
        grad = ours.grad.full_tensor() if isinstance(ours.grad, DTensor) else ours.grad
        torch.testing.assert_close(grad, its.grad, **TOLERANCE)


@pytest.mark.parametrize("build", BUILDS)
def test_ddp_of_linear_layers(group, build):
    model = fusedres.fuse(build())
    reference = copy.deepcopy(model)
    assert_same_gradients(DistributedDataParallel(model), reference, rows())


@pytest.mark.parametrize("fused_first", [True, False])
@pytest.mark.parametrize("build", BUILDS)
def test_fsdp_of_linear_layers(group, build, fused_first):
    model = build()
    reference = copy.deepcopy(model)
    if fused_first:
        fusedres.fuse(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for module in list(model.modules())[1:]:
        if type(module).__name__ in ("ResidualMLPBlock", "FunctionalMLPBlock"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert counts(model if fused_first else fusedres.fuse(model))
    with (
        mock.patch.object(runtime, "_layer", side_effect=AssertionError("not fused")) if fused_first else nullcontext()
    ):
        assert_same_gradients(model, reference, rows())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_eagers_dtypes(dtype, monkeypatch):
    monkeypatch.setenv("FUSEDRES_BACKEND", "reference")
    model, x = small().float(), images().float()
    reference = copy.deepcopy(model)
    fusedres.fuse(model)
    outputs = []
    for candidate in (model, reference):
        seen: list[torch.dtype] = []
        watched = candidate.get_submodule("layer1")
        watched.register_forward_hook(functools.partial(lambda seen, _, args, out: seen.append(out.dtype), seen))
        with torch.autocast("cpu", dtype):
            out = candidate(x)
        outputs.append((out, seen))
    assert outputs[0][1] == outputs[1][1]
    assert outputs[0][0].dtype == outputs[1][0].dtype
    torch.testing.assert_close(outputs[0][0], outputs[1][0])


def test_half_precision_parameters(monkeypatch):
    monkeypatch.setenv("FUSEDRES_BACKEND", "reference")
    model, x = small().bfloat16().eval(), images().bfloat16()
    reference = copy.deepcopy(model)
    torch.testing.assert_close(fusedres.fuse(model)(x), reference(x))


def test_channels_last():
    model = small().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    reference, x = copy.deepcopy(model), images().contiguous(memory_format=torch.channels_last)
    assert_same_steps(fusedres.fuse(model), reference, x)
