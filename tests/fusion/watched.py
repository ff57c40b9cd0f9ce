"""What users do to a network before or after ``fuse``: the table that test_watched.py runs, each with its reason."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from fusedres import models
from tests import zoo
from tests.fusion.hooks import HOOKS, Log

Change = Callable[[Any, Log], "nn.Module | None"]


@dataclass(frozen=True)
class Case:
    """A ``change`` of a network in place, or to what it returns.

    Attributes:
        why: what would be wrong otherwise.
        when: on which sides of ``fuse`` it is made.
        modes: of training; ``None`` is as the change leaves it.
        each: the change is made again before each step, once the mode is set.
        in_place: whether ReLUs are; behind a backward hook eager allows none.
        kept: the least share of the fused layers that stay fused.
        kernels: the networks in which it is also run on the kernels; the other takes them thrice as long.
        group: whether it needs a process group.
    """

    change: Change
    why: str
    when: tuple[str, ...] = ("before", "after")
    modes: tuple[bool | None, ...] = (True, False)
    each: bool = False
    in_place: bool = True
    kept: float = 0.5
    kernels: tuple[str, ...] = ("preact",)
    group: bool = False


# Everywhere: a kind that reads values, one that reads gradients at a module, one that reads them at a tensor.
EVERYWHERE = ("forward", "full backward", "retain_grad")
BLOCK = "layer1.1"
OTHERS = {
    "": "the root of the region", "layer1": "a stage, between two forks",
    "layer2.0": "a projection block", "layer2.0.downsample": "one side of a join",
    "layer1.1.conv1": "one of the two readers of a fork",
    "layer1.1.bn2": "a folded BatchNorm", "layer1.0.relu": "one ReLU for several calls", "maxpool": "end of the stem",
    "avgpool": "the head",
}  # fmt: skip


def _hooked(kind: str, place: str) -> Case:
    put, why = HOOKS[kind]
    change = lambda model, log: put(model.get_submodule(place), log)  # noqa: E731
    why = f"{why}: {'an identity block' if place == BLOCK else OTHERS[place]}"
    # Hooks that are there when it is fused are looked for in one place, whatever the kind.
    when = ("before", "after") if place == BLOCK or kind == "retain_grad" else ("after",)
    return Case(change, why, when, in_place="backward" not in kind, kernels=("preact",) if place == BLOCK else ())


# Parts of a network, by path, and what is put in their places.
BLOCKS, STAGES = ("layer1.0", "layer1.1", "layer2.0", "layer2.1"), ("layer1", "layer2")


def on(paths: tuple[str, ...], wrap: Callable[[Any], nn.Module]) -> Change:
    def change(model: nn.Module, log: Log) -> None:
        for path in paths:
            model.set_submodule(path, wrap(model.get_submodule(path)))

    return change


def _shard(*paths: str) -> Change:
    def change(model: nn.Module, log: Log) -> nn.Module:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for path in paths:
            fully_shard(model.get_submodule(path), mesh=mesh)
        return fully_shard(model, mesh=mesh)  # pyright: ignore[reportReturnType]

    return change


def _checkpointed(block: nn.Module) -> nn.Module:
    """With a forward on the instance, as training scripts patch them."""
    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return block


class Recomputed(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, x, use_reentrant=False)  # pyright: ignore[reportReturnType]


class LowRank(nn.Module):
    """As LoRA wraps a convolution: it stays, frozen, and a thin branch is added."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        torch.manual_seed(5)
        self.down = nn.Conv2d(base.in_channels, 8, base.kernel_size, base.stride, base.padding, bias=False)  # pyright: ignore
        self.up = nn.Conv2d(8, base.out_channels, 1, bias=False)
        self.to(base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Served(nn.Module):
    """Two networks in two threads, each with a block of its own kind, so that both are traced again at once."""

    def __init__(self, *parts: Any) -> None:
        super().__init__()
        for part in parts:
            part.layer1[1] = nn.Identity()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(2) as threads:
            return torch.cat(list(threads.map(lambda part: part(x), self.parts)))


def again(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def fresh(block: nn.Module) -> nn.Module:
    """Another of its kind, with other weights."""
    torch.manual_seed(6)
    other = copy.deepcopy(block)
    for parameter in other.parameters():
        nn.init.uniform_(parameter, 0.1, 0.3)
    return other


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


def _parametrized(model: Any, log: Log) -> None:
    parametrize.register_parametrization(model.layer1[1].bn2, "weight", Exponential())


def _weight_norm(model: Any, log: Log) -> None:
    parametrizations.weight_norm(model.layer1[1].conv2)


def _spectral_norm(model: Any, log: Log) -> None:
    conv = parametrizations.spectral_norm(model.layer1[1].conv2)
    for vector in conv.parametrizations.weight[0].buffers():  # pyright: ignore
        vector.copy_(nn.functional.normalize(torch.linspace(1, 2, vector.numel()), dim=0))


def _pruned(model: Any, log: Log) -> None:
    prune.l1_unstructured(model.layer1[1].conv2, "weight", 0.3)
    prune.l1_unstructured(model.layer1[1].bn2, "weight", 0.3)


def _pruned_for_good(model: Any, log: Log) -> None:
    _pruned(model, log)
    prune.remove(model.layer1[1].conv2, "weight")
    prune.remove(model.layer1[1].bn2, "weight")


def _shared_weights(model: Any, log: Log) -> None:
    model.layer2[1].conv2.weight = model.layer2[0].conv2.weight
    model.layer2[1].bn2.weight = model.layer2[0].bn2.weight


def _frozen(model: Any, log: Log) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)


def _features(model: Any, log: Log) -> nn.Module:
    zoo.torchvision_models()
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(model, ["maxpool", "layer1.0", "layer1.1.relu", "layer2.0.bn2", "fc"])


def _getter(model: Any, log: Log) -> nn.Module:
    zoo.torchvision_models()
    from torchvision.models._utils import IntermediateLayerGetter

    return IntermediateLayerGetter(model, {"layer1": "low", "layer2": "high"})


def _exported(model: Any, log: Log) -> nn.Module:
    return torch.export.export(model.eval(), (example(model),), strict=False).module()


def _traced(model: Any, log: Log) -> nn.Module:
    return torch.jit.trace(model.eval(), example(model), check_trace=False)  # pyright: ignore


def example(model: nn.Module) -> Tensor:
    """An image of a size that both networks take, in the dtype of ``model``."""
    size = 32 if isinstance(model, models.ResNet) else 8
    return torch.randn(2, 3, size, size).to(next(model.parameters()).dtype)


def _compile_stage(model: Any, log: Log) -> None:
    model.layer1 = torch.compile(model.layer1, backend="eager")


BOTH = ("resnet", "preact")
CASES: dict[str, Case] = {
    **{f"{kind} on a block": _hooked(kind, BLOCK) for kind in HOOKS},
    **{f"{kind} on {place or 'the whole'}": _hooked(kind, place) for kind in EVERYWHERE for place in OTHERS},
    "hooks that are removed": Case(
        lambda m, log: m.layer1[1].register_forward_hook(print).remove(), "nothing is given up for good", kept=1
    ),
    "hooks on every block": Case(
        lambda m, log: [HOOKS["retain_grad"][0](m.get_submodule(path), log) for path in BLOCKS] and None,
        "no block may pass parts of a sum, or of a gradient, to the next", kept=0.3, kernels=BOTH,
    ),
    "DDP": Case(lambda m, log: DistributedDataParallel(m), "its hooks are on the parameters", group=True, kept=1),
    "DDP of stages": Case(on(STAGES, DistributedDataParallel), "a wrapper with a forward of PyTorch's", group=True),
    "DDP of blocks": Case(on(BLOCKS, DistributedDataParallel), "inside the region", group=True, kept=0.3),
    "FSDP": Case(_shard(), "the class of the root becomes another", group=True),
    "FSDP of stages": Case(_shard(*STAGES), "their parameters are whole in their calls alone", group=True),
    "FSDP of blocks": Case(_shard(*BLOCKS), "as users shard, blocks and the whole", group=True, kept=0.3, kernels=BOTH),
    "checkpoint_wrapper of blocks": Case(
        on(BLOCKS, checkpoint_wrapper), "what is computed again is what was computed", kept=0.3
    ),
    "checkpoint_wrapper of a stage": Case(on(STAGES[:1], checkpoint_wrapper), "blocks in it still meet"),
    "checkpoint around forwards": Case(on(BLOCKS, _checkpointed), "a forward on the instance", kept=0),
    "checkpoint around a stage's forward": Case(on(STAGES[1:], _checkpointed), "the rest stays fused", kept=0.3),
    "checkpoint in a module": Case(on(BLOCKS, Recomputed), "a function that takes a block", kept=0.3),
    "a block replaced": Case(on(("layer1.1",), fresh), "its weights are its own", kernels=BOTH),
    "a block replaced by nothing": Case(on(("layer1.1",), lambda block: nn.Identity()), "its neighbours meet"),
    "an activation replaced": Case(on(("layer1.1.relu",), lambda relu: nn.GELU()), "ReLU was folded"),
    "a BatchNorm replaced": Case(on(("layer2.0.bn2",), lambda norm: nn.Identity()), "it was folded"),
    "a copy of a block, alone": Case(
        lambda m, log: nn.Sequential(m.conv1, copy.deepcopy(m.layer1[0])), "it makes its own sum and activation", kept=0
    ),
    "blocks called outside": Case(
        lambda m, log: nn.Sequential(m.conv1, *m.layer1), "parts of a region are called without it", kept=0
    ),
    "a stage in evaluation": Case(
        lambda m, log: m.layer2.eval() and None, "statistics are read and not written", each=True, modes=(True,)
    ),
    "a block in training": Case(
        lambda m, log: m.layer1[1].train() and None, "the rest is in evaluation", each=True, modes=(False,)
    ),
    "frozen BatchNorms": Case(
        _frozen, "fine-tuning: the backward of given statistics", each=True, modes=(True,), kernels=BOTH
    ),
    "frozen weights": Case(lambda m, log: m.layer1.requires_grad_(False) and None, "gradients go through", kept=1),
    "feature extraction": Case(
        _features, "values that were folded are outputs, with whole gradients", kept=0, kernels=BOTH
    ),
    "IntermediateLayerGetter": Case(_getter, "the children, without the forward around them", kept=0),
    "low-rank branches": Case(on(("layer1.1.conv2", "layer2.0.conv1"), LowRank), "convolutions become users' code"),
    "parametrized BatchNorm": Case(_parametrized, "its class and its weight are made anew"),
    "weight norm": Case(_weight_norm, "the weight is computed in each call"),
    "spectral norm": Case(_spectral_norm, "and has state in training"),
    "pruned": Case(_pruned, "the weight is set by a hook, just before the call"),
    "pruned for good": Case(_pruned_for_good, "no hook stays", kept=1),
    "shared weights": Case(_shared_weights, "both calls add to one gradient", kept=1),
    "a block called twice": Case(
        lambda m, log: m.layer1.append(m.layer1[1]) and None, "its statistics change twice in a step"
    ),
    "compiled": Case(
        lambda m, log: torch.compile(m, backend="eager", fullgraph=True), "one graph of rewritten forwards",
        when=("after",), modes=(True,), kept=0, kernels=(),
    ),
    "a compiled stage": Case(_compile_stage, "regional compilation", modes=(True,), kept=0, kernels=()),
    "exported": Case(_exported, "the graph of what runs", modes=(None,), kept=0),
    "traced by TorchScript": Case(_traced, "on the reference path", modes=(None,), kept=0, kernels=()),
    "two threads": Case(lambda m, log: Served(m, copy.deepcopy(m)), "both are traced again at once", kernels=()),
    "deepcopy": Case(lambda m, log: copy.deepcopy(m), "the copy has its own modules", kept=1, kernels=BOTH),
    "pickle": Case(lambda m, log: again(m), "and its own code", kept=1),
    "a copied block": Case(on(("layer1.1",), copy.deepcopy), "it comes back into its place"),
    "a pickled block": Case(on(("layer1.1",), again), "likewise"),
}  # fmt: skip
