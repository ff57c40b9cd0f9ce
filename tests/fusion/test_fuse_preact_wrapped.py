"""torch.compile, export, autocast, DDP and FSDP2 of fused pre-activation networks."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fusedres
from tests import zoo
from tests.distributed.test_fuse_distributed import group as group
from tests.fusion.test_fuse_compile import assert_two_graphs
from tests.fusion.test_fuse_preact import Listed, Projection, hand, native
from tests.zoo import TOLERANCE, assert_same_steps, counts, images, randomise

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


# Sums that go from block to block through user code, through our modules, and through a loop over a list.
@pytest.mark.parametrize(
    "build", [lambda: hand(Projection, (1, 1)), lambda: native(fusedres.nn.PreActBasicBlock, (1, 1)), Listed]
)
def test_compiles_to_one_graph_without_recompilation(build):
    assert_two_graphs(randomise(build()), images())


def test_compiled_timm():
    model = fusedres.fuse(randomise(zoo.timm_resnetv2("resnetv2_18", (2,))))
    reference, x = copy.deepcopy(model), images(2, 3, 16, 16)
    model.compile(backend="aot_eager", fullgraph=True)
    assert_same_steps(model, reference, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("build", [lambda: hand(Projection), lambda: zoo.timm_resnetv2("resnetv2_18", (1, 2))])
def test_export_and_traces(build):
    model, x = fusedres.fuse(randomise(build())).eval(), images(2, 3, 32, 32)
    expected = model(x)
    for traced in (
        torch.export.export(model, (x,), strict=False).module(),
        torch.fx.symbolic_trace(model),
        torch.jit.trace(model, (x,)),
    ):
        torch.testing.assert_close(traced(x), expected, **TOLERANCE)


@pytest.mark.parametrize("kind", [zoo.KuangliuBlock, fusedres.nn.PreActBasicBlock])
def test_autocast_gives_eagers_dtypes(kind, monkeypatch):
    monkeypatch.setenv("FUSEDRES_BACKEND", "reference")
    model = randomise(hand(kind) if kind is zoo.KuangliuBlock else native(kind)).float()
    reference, x, outputs = copy.deepcopy(model), images().float(), []
    fusedres.fuse(model)
    for candidate in (model, reference):
        seen: list[torch.dtype] = []
        watched = candidate.get_submodule("layers.1.1.conv1" if kind is zoo.KuangliuBlock else "layer2.1.conv1")
        watched.register_forward_hook(functools.partial(lambda seen, _, args, out: seen.append(out.dtype), seen))
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append((candidate(x), seen))
    assert outputs[0][1] == outputs[1][1]
    torch.testing.assert_close(outputs[0][0], outputs[1][0])


def test_ddp_and_fsdp(group):
    model, x = randomise(hand(zoo.KuangliuBlock)), images()
    reference, sharded = copy.deepcopy(model), fusedres.fuse(copy.deepcopy(model))
    wrapped = DistributedDataParallel(fusedres.fuse(model))
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for block in sharded.modules():
        if isinstance(block, zoo.KuangliuBlock):
            fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert counts(wrapped)["add_bn_act"] == 4
    assert "add_bn_act" not in counts(sharded)  # blocks have hooks of FSDP's: each adds up its input
    for candidate in (wrapped, sharded, reference):
        candidate(x).square().sum().backward()
    for ours, theirs, its in zip(model.parameters(), sharded.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, its.grad, **TOLERANCE)
        assert isinstance(theirs.grad, DTensor)
        torch.testing.assert_close(theirs.grad.full_tensor(), its.grad, **TOLERANCE)


@pytest.mark.parametrize("timms", [True, False])
def test_conversion_to_sync_batchnorm_keeps_every_relu(timms):
    model = randomise(zoo.timm_resnetv2("resnetv2_18", (1, 2)) if timms else hand(Projection))
    reference, x = copy.deepcopy(model).eval(), images(2, 3, 32, 32)
    convert = zoo.timm_models().layers.convert_sync_batchnorm if timms else nn.SyncBatchNorm.convert_sync_batchnorm
    converted = convert(fusedres.fuse(model)).eval()
    assert set(counts(converted)) == {"bn"}
    torch.testing.assert_close(converted(x), reference(x), **TOLERANCE)
