"""What training code does with a fused network: averaged weights, statistics made anew, copies, weight decay, features.

The other promises: keys, parameters, idempotence, ``unfuse``, copies, sharing, checkpointing and freezing are in
test_fuse.py, hooks and replaced modules in test_fuse_changes.py, export in test_fuse_compile.py, DDP and FSDP2 in
test_fuse_distributed.py and test_fuse_preact_wrapped.py; all of these, together with forks and sums across blocks, in
test_watched.py.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import swa_utils

import fusedres
from tests import zoo
from tests.distributed.test_fuse_distributed import group as group
from tests.fusion.trained import check_network
from tests.zoo import TOLERANCE, assert_same_steps, images, randomise
from tests.zoo_public import SMALL, counted_calls


def _csp() -> nn.Module:
    """timm's norms with LeakyReLU and with none."""
    return SMALL["timm cspresnet"].build()


def _timm() -> nn.Module:
    """timm's norms with ReLU."""
    return SMALL["timm densenet"].build()


def _vision() -> nn.Module:
    models = zoo.torchvision_models()
    return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)


BUILDS: dict[str, Callable[[], nn.Module]] = {"torchvision": _vision, "timm ReLU": _timm, "timm LeakyReLU": _csp}
builds = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
# For what test_fuse.py and test_fuse_compile.py look at with PyTorch's own norms.
timms = pytest.mark.parametrize("build", [_timm, _csp])
pytestmark = pytest.mark.usefixtures("reference_backend")


def both(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A fused network, and a copy as it was."""
    model = randomise(build())
    return fusedres.fuse(copy.deepcopy(model)), model


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    ours, its = one.state_dict(), other.state_dict()
    assert ours.keys() == its.keys()
    for name, value in its.items():
        torch.testing.assert_close(ours[name], value, **TOLERANCE, msg=name)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    out = model.train()(images(2, 3, 32, 32))
    out.backward(torch.randn_like(out))
    optimizer.step()


def assert_ours(model: nn.Module) -> None:
    with counted_calls() as calls, torch.no_grad():
        model(images(2, 3, 32, 32))
    assert calls.ours == calls.all > 0


@builds
def test_averaged_model_and_update_bn(build):
    averages = []
    for model in both(build):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        average = swa_utils.AveragedModel(model)
        for seed in range(2):
            train(model, optimizer, seed)
            average.update_parameters(model)
        torch.manual_seed(3)
        swa_utils.update_bn([images(2, 3, 32, 32) for _ in range(3)], average)
        averages.append(average)
    assert_ours(averages[0].eval())
    assert_same_state(*averages)
    momenta = {m.momentum for m in averages[0].modules() if isinstance(m, nn.BatchNorm2d)}
    assert momenta == {0.1}  # None while the statistics were made: the cumulative average


@timms
def test_averages_of_timms(build):
    zoo.timm_models()
    from timm.utils.model_ema import ModelEmaV3

    averages = []
    for model in both(build):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        average = ModelEmaV3(model, decay=0.5)
        for seed in range(2):
            train(model, optimizer, seed)
            average.update(model)
        averages.append(average)
    assert_ours(averages[0].eval())
    assert_same_state(*averages)
    x = images(2, 3, 32, 32)
    torch.testing.assert_close(averages[0](x), averages[1](x), **TOLERANCE)


@builds
def test_weight_decay_by_class_of_the_module(build):
    def decayed(model: nn.Module) -> list[str]:
        spared = {p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters(recurse=False)}
        return [name for name, p in model.named_parameters() if p not in spared]

    fused, reference = both(build)
    assert decayed(fused) == decayed(reference) != [name for name, _ in reference.named_parameters()]


@builds
def test_feature_extraction(build):
    zoo.torchvision_models()
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    fused, reference = both(build)
    x = images(2, 3, 32, 32)
    norms = [name for name, module in reference.named_modules() if isinstance(module, nn.BatchNorm2d)]
    inside = tuple(f"{norm}." for norm in norms)  # timm's norms: their outputs can be had, not their parts
    nodes = norms + [name for name in get_graph_node_names(reference)[1][1:] if not f"{name}.".startswith(inside)]
    results = []
    for model in (fused, reference):
        extract = create_feature_extractor(model, nodes)
        results.append({(mode, name): out for mode in (True, False) for name, out in extract.train(mode)(x).items()})
    assert len(results[0]) == 2 * len(nodes)
    assert results[0].keys() == results[1].keys()
    for name, value in results[1].items():
        torch.testing.assert_close(results[0][name], value, **TOLERANCE, msg=str(name))


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


# Others than timm's are copied in test_fuse.py; both ways go by pickle's protocol, so one is enough for LeakyReLU.
@pytest.mark.parametrize(("build", "how"), [(_timm, "deepcopy"), (_timm, "pickle"), (_csp, "pickle")])
def test_copies_are_fused_and_unfuse(build, how):
    fused, reference = both(build)
    duplicate = COPIES[how](fused)
    assert [type(module) for module in duplicate.modules()] == [type(module) for module in fused.modules()]
    assert_ours(duplicate)
    fused, reference = both(build)
    assert_same_steps(COPIES[how](fused), reference, images(2, 3, 32, 32))
    assert [type(m) for m in fusedres.unfuse(duplicate).modules()] == [type(m) for m in reference.modules()]
    with counted_calls() as calls:
        duplicate(images(2, 3, 32, 32))
    assert calls.ours == 0


@timms
def test_checkpoints_load_both_ways(build, tmp_path):
    fused, reference = both(build)
    other, _ = both(build)
    for source, target in ((reference, other), (fused, build().double())):
        torch.save(source.state_dict(), tmp_path / "state.pt")
        target.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert_same_state(target, source)


@timms
def test_export(build):
    fused, reference = both(build)
    x = images(2, 3, 32, 32)
    exported = torch.export.export(fused.eval(), (x,), strict=False).module()
    torch.testing.assert_close(exported(x), reference.eval()(x), **TOLERANCE)


@timms
def test_ddp_and_fsdp_of_timms(group, build):
    fused, reference = both(build)
    sharded, x = copy.deepcopy(fused), images(2, 3, 32, 32)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for norm in [m for m in sharded.modules() if isinstance(m, nn.BatchNorm2d)][:2]:
        fully_shard(norm, mesh=mesh)  # its class becomes another
    fully_shard(sharded, mesh=mesh)
    for candidate in (DistributedDataParallel(fused), sharded, reference):
        candidate(x).square().sum().backward()
    for ours, theirs, its in zip(fused.parameters(), sharded.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, its.grad, **TOLERANCE)
        assert isinstance(theirs.grad, DTensor)
        torch.testing.assert_close(theirs.grad.full_tensor(), its.grad, **TOLERANCE)


@timms
def test_pytorchs_conversion_never_drops_an_activation(build):
    """It would, as it does from timm's own; timm's keeps them."""
    fused, _ = both(build)
    with pytest.raises(RuntimeError, match="would drop its"):
        nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(fused))
    for norm in fused.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert not hasattr(norm, "qconfig")
            norm.qconfig = "set"
            assert norm.qconfig == "set"
    fused, reference = both(build)
    converted, x = zoo.timm_models().layers.convert_sync_batchnorm(fused.eval()), images(2, 3, 32, 32)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
    torch.testing.assert_close(converted(x), reference.eval()(x), **TOLERANCE)


@pytest.mark.usefixtures("triton_backend")
def test_timms_norms_run_in_kernels():
    torch.manual_seed(1)
    seen = check_network(randomise(_csp()).float(), torch.randn(2, 3, 32, 32), torch.contiguous_format)
    assert seen == {"bn": 12, "bn_add": 2, "backward": 14}  # LeakyReLU is not in the kernels


def test_timms_norms():
    """Hooks, other activations, filters and explanations."""
    fused, reference = both(_timm)
    assert {row["path"] for row in fusedres.explain(fused).rows} == {"reference"}
    assert fusedres.explain(reference).rows == fusedres.explain(fused).rows
    seen: list[str] = []
    for model in (fused, reference):
        norms = [m for m in model.modules() if type(m).__name__ == "BatchNormAct2d"]
        norms[0].register_forward_hook(lambda *args: seen.append("norm"))
        norms[0].get_submodule("act").register_forward_hook(lambda *args: seen.append("act"))
        norms[1].act = nn.Tanh()
        norms[2].drop = nn.Dropout(0.5)
    assert_same_steps(fused, reference, images(2, 3, 32, 32))
    assert seen == ["act", "norm"] * 6
    first = next(name for name, module in reference.named_modules() if isinstance(module, nn.BatchNorm2d))
    left = fusedres.fuse(_timm(), lambda module, name: name != first)
    assert {row["module"] for row in fusedres.explain(left).rows if row["path"] == "eager"} == {first}
