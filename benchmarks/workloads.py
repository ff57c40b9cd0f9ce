"""What the timed suites measure: modules, dtypes and sizes, most telling first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from benchmarks import layers
from benchmarks.errors import BenchmarkError
from benchmarks.providers import BASELINE, EAGER, PROVIDERS, Provider
from benchmarks.suite import Request
from benchmarks.timing import as_tuple
from fusedres import models

TIMED = ("kernels", "mlp", "models")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLASSES = 1000
Norm = tuple[str, int, int, int]  # kind of layer, channels, height, width
ROWS = (64, 1024, 16384)
FEATURES = ((512, 512), (512, 102), (1024, 1024), (4096, 4096), (256, 256))  # first those of the residual MLP
LINEAR_LAYERS = {
    "ln-linear-relu": layers.norm_linear_relu,
    "linear-ln-relu": layers.linear_norm_relu,
    "linear-ln-relu+skip": layers.skip_linear_norm_relu,
}
NORM_LAYERS = {
    "bn": layers.BatchNorm,
    "bn+relu": layers.BatchNormRelu,
    "bn+add+relu": layers.BatchNormAddRelu,
    "add+bn+relu": layers.AddBatchNormRelu,
    "bn+add+relu+fork": layers.BatchNormAddReluTwice,
    "bn+add+bn+relu": layers.BatchNormAddBatchNormRelu,
    "bn+relu+maxpool": layers.BatchNormReluMaxPool,
    "bn+add+relu+avgpool": layers.BatchNormAddReluAvgPool,
}
# Passes over an activation that a step needs where each statistic is its own reading: DESIGN's first target, without
# the mask. What is moved in less time counts as bandwidth; whoever moves more has that much less of it.
PASSES = {
    "bn": {"training": 3 + 5, "inference": 2},
    "bn+relu": {"training": 3 + 5, "inference": 2},
    "bn+add+relu": {"training": 4 + 6, "inference": 3},
    "add+bn+relu": {"training": 5 + 6, "inference": 4},
    "bn+add+relu+fork": {"training": 4 + 7, "inference": 3},
    "bn+add+bn+relu": {"training": 5 + 8, "inference": 3},
    "bn+relu+maxpool": {"training": 2.25 + 3.5, "inference": 1.25},
    "bn+add+relu+avgpool": {"training": 3 + 4, "inference": 2},
}


@dataclass(frozen=True)
class Cost:
    """What one sample needs: bytes moved, or floating-point operations of its products; 0 where that says little."""

    bytes: float = 0
    flops: float = 0


@dataclass(frozen=True)
class Workload:
    """A module in one dtype and the inputs it is measured at.

    A model is a classifier in training, in 16 bits under autocast over float32 weights. A linear layer has its weights
    and its input in the dtype itself, a BatchNorm its input alone, as under autocast. A layer is differentiated as
    inside of a network: from a random cotangent, to the input too, and without an optimizer.

    Args:
        inputs: how many tensors the module takes, all of shape ``(batch, *sample)``.
        output: shape of a sample's output; of a model, the number of classes.
        check: batch and sample that are compared with float64 before any figure; ``None`` for each one measured.
        weights: dtype of a layer's parameters, where it is not ``dtype``.
        channels_last: whether the memory format means anything to it.
        compiled: whether ``torch.compile`` takes part.
        cost: by mode.
    """

    name: str
    build: Callable[[], nn.Module]
    dtype: str
    batches: tuple[int, ...]
    sample: tuple[int, ...]
    output: tuple[int, ...]
    inputs: int = 1
    check: tuple[int, ...] | None = None
    layer: bool = False
    weights: str | None = None
    channels_last: bool = False
    compiled: bool = True
    cost: Mapping[str, Cost] = field(default_factory=dict)

    @property
    def baseline(self) -> str:
        """The provider that speedups are relative to: the faster of eager's memory formats, where there are two."""
        return BASELINE if self.channels_last else EAGER

    def outputs(self, batch: int) -> list[torch.Size]:
        """The shapes of what it returns."""
        with torch.device("meta"):
            inputs = [torch.empty(batch, *self.sample) for _ in range(self.inputs)]
            return [out.shape for out in as_tuple(self.build()(*inputs))]

    def checked(self, batch: int) -> tuple[int, ...]:
        """The input whose check stands for that of ``batch`` samples."""
        return self.check or (batch, *self.sample)

    def entrants(self, providers: list[Provider]) -> list[Provider]:
        """Those of ``providers`` that can take part, and the baseline."""
        able = [
            p
            for p in providers
            if (self.compiled or not p.compiles)
            and (self.channels_last or p.name != BASELINE)
            and (p.layers is None or (self.layer and self.name.split()[0] in p.layers))
            and not (p.whole and self.layer)
        ]
        return able if any(p.name == self.baseline for p in able) else [PROVIDERS[self.baseline], *able]


def workloads(suite: str, request: Request) -> list[Workload]:
    """What ``suite``, one of ``TIMED``, measures: on a GPU bfloat16 and float32, float16 on demand.

    Raises:
        BenchmarkError: a dtype that is not measured there.
    """
    if request.device.type == "cpu":
        for dtype in request.dtypes or ():
            if dtype != "float32":
                raise BenchmarkError(f"dtype {dtype!r} is not measured on {request.device.type}; only float32 is")
        found = _ON_CPU[suite](request.quick)
    else:
        dtypes = request.dtypes or (("bfloat16",) if request.quick else ("bfloat16", "float32"))
        found = [w for dtype in dtypes for w in _ON_GPU[suite](dtype, request.quick)]
    return [replace(w, batches=request.batches) for w in found] if request.batches else found


def _networks(dtype: str, quick: bool) -> list[Workload]:
    full, small, cifar = (3, 224, 224), (8, 3, 64, 64), (3, 32, 32)
    networks = [
        Workload(name, build, dtype, batches, full, (CLASSES,), check=small, channels_last=True)
        for name, build, batches in (
            ("resnet50", models.resnet50, (128, 32, 1)),
            ("preact_resnet50", models.preact_resnet50, (128,)),
            ("resnet34", models.resnet34, (128, 32, 1)),
        )
    ]
    if quick:
        return [replace(networks[0], batches=(128,))]
    build = partial(models.preact_resnet_cifar, 110)
    deep = Workload(
        "preact_resnet_cifar(110)", build, dtype, (128,), cifar, (10,), check=(8, *cifar), channels_last=True
    )
    return [*networks, deep]


def _small_networks(quick: bool) -> list[Workload]:
    """One block compiles in a quarter of a minute on a CPU; whole networks take part when there is time."""
    block, cifar = (64, 14, 14), (3, 32, 32)
    image = cifar if quick else (3, 64, 64)
    networks = [
        Workload("resnet50", models.resnet50, "float32", (4,), image, (CLASSES,), check=(4, 3, 48, 48)),
        Workload("preact_resnet_cifar(20)", partial(models.preact_resnet_cifar, 20), "float32", (4,), cifar, (10,)),
    ]
    return [
        Workload("basic block", basic_block, "float32", (8,), block, (CLASSES,), channels_last=True),
        *(replace(network, channels_last=True, compiled=not quick) for network in networks),
    ]


def _mlps(dtype: str, quick: bool) -> list[Workload]:
    image, features = (3, 128, 128), (512,)
    own, *others = FEATURES
    residual = Workload("residual_mlp", models.residual_mlp, dtype, (64, 1024), image, (102,), check=(64, *image))
    if quick:
        return [replace(residual, batches=(1024,)), *linear_layers(*own, dtype, ROWS[-1:])]
    return [
        residual,
        *linear_layers(*own, dtype, ROWS),
        Workload("plain_mlp", models.plain_mlp, dtype, ROWS, features, (512,), check=(64, *features)),
        *(layer for sizes in others for layer in linear_layers(*sizes, dtype, ROWS)),
    ]


def _small_mlps(quick: bool) -> list[Workload]:
    image = (3, 32, 32)
    build = partial(models.residual_mlp, image_size=32)
    compiled = () if quick else None  # the C++ compiler takes its time
    return [
        Workload("residual_mlp", build, "float32", (32,), image, (102,), compiled=not quick),
        Workload("plain_mlp", models.plain_mlp, "float32", (64,), (512,), (512,), compiled=not quick),
        *linear_layers(512, 512, "float32", (64,), compiled=compiled),
        *linear_layers(512, 102, "float32", (64,), compiled=compiled),
    ]


def _norms(dtype: str, quick: bool) -> list[Workload]:
    """Every BatchNorm of ResNet-34 and -50 at 224x224, and what lies between their blocks and pre-activation ones."""
    between = [
        (kind, *size) for size in ((256, 56, 56), (1024, 14, 14)) for kind in ("add+bn+relu", "bn+add+relu+fork")
    ]
    if quick:
        first = ("bn+relu", 64), ("bn+add+relu", 256), ("bn+add+bn+relu", 256), ("bn+relu+maxpool", 64)
        shapes = [shape for shape in batch_norm_shapes() if shape[:2] in first]
        shapes += [("bn+add+relu", 2048, 7, 7), *between[:2]]
        return [norm_layer(*shape, dtype=dtype, batches=(32,)) for shape in shapes]
    return [norm_layer(*shape, dtype=dtype, batches=(32, 256, 1)) for shape in (*batch_norm_shapes(), *between)]


def _small_norms(quick: bool) -> list[Workload]:
    shapes: list[Norm] = [
        ("bn+relu", 64, 28, 28), ("bn+add+relu", 256, 14, 14), ("add+bn+relu", 256, 14, 14),
        ("bn+add+bn+relu", 256, 14, 14), ("bn+relu+maxpool", 64, 28, 28), ("bn+add+relu+avgpool", 256, 7, 7),
    ]  # fmt: skip
    return [norm_layer(*shape, dtype="float32", batches=(4,), compiled=not quick) for shape in shapes]


_ON_GPU = {"kernels": _norms, "mlp": _mlps, "models": _networks}
_ON_CPU = {"kernels": _small_norms, "mlp": _small_mlps, "models": _small_networks}


@functools.cache
def batch_norm_shapes() -> tuple[Norm, ...]:
    """Kind and (C, H, W) of the layers of ResNet-50 and ResNet-34 at 224x224 that begin with a BatchNorm, or with two.

    Largest first, each once.
    """
    found = dict.fromkeys(shape for model in (models.resnet50, models.resnet34) for shape in _shapes_of(model))
    return tuple(sorted(found, key=lambda shape: -shape[1] * shape[2] * shape[3]))


def _shapes_of(build: Callable[[], nn.Module]) -> Iterator[Norm]:
    with torch.device("meta"):
        model, x = build(), torch.empty(1, 3, 224, 224)
    norms = {name: norm for name, norm in model.named_modules() if isinstance(norm, nn.BatchNorm2d)}
    last = {name.rpartition(".")[0]: name for name in norms}  # of each block
    sizes: dict[str, tuple[int, int, int]] = {}

    def note(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        _, *sample = inputs[0].shape
        sizes[names[norm]] = (sample[0], sample[1], sample[2])

    names: dict[nn.Module, str] = {norm: name for name, norm in norms.items()}
    for norm in names:
        norm.register_forward_pre_hook(note)
    model(x)
    *_, final = sizes
    for name, (channels, height, width) in sizes.items():
        block = name.rpartition(".")[0]
        projects = block.endswith("downsample")
        kind = "bn+add+relu" if block and last[block] == name else "bn+relu"
        yield "bn" if projects else kind, channels, height, width
        beyond = {not block: "bn+relu+maxpool", projects: "bn+add+bn+relu", name == final: "bn+add+relu+avgpool"}
        if True in beyond:
            yield beyond[True], channels, height, width


def norm_layer(
    kind: str, channels: int, height: int, width: int, *, dtype: str, batches: tuple[int, ...], compiled: bool = True
) -> Workload:
    """A layer of ``NORM_LAYERS`` on activations (N, channels, height, width)."""
    sample = (channels, height, width)
    pooled = {"maxpool": (channels, (height + 1) // 2, (width + 1) // 2), "avgpool": (channels, 1, 1)}
    activation = channels * height * width * DTYPES[dtype].itemsize
    cost = {mode: Cost(bytes=passes * activation) for mode, passes in PASSES[kind].items()}
    return Workload(
        f"{kind} {channels}x{height}x{width}", partial(NORM_LAYERS[kind], channels), dtype, batches, sample,
        pooled.get(kind.rpartition("+")[2], sample), inputs=2 if "add" in kind else 1, layer=True, weights="float32",
        channels_last=True, compiled=compiled, cost=cost,
    )  # fmt: skip


def linear_layers(
    inputs: int, outputs: int, dtype: str, rows: tuple[int, ...], compiled: tuple[str, ...] | None = None
) -> list[Workload]:
    """The three layers of one size, as users write them; only where the sizes are equal is there a skip."""
    flops = 2 * inputs * outputs
    return [
        Workload(
            f"{name} {inputs}-{outputs}", partial(build, inputs, outputs), dtype, rows, (inputs,), (outputs,),
            layer=True, compiled=compiled is None or name in compiled,
            cost={"training": Cost(flops=3 * flops), "inference": Cost(flops=flops)},
        )
        for name, build in LINEAR_LAYERS.items()
        if inputs == outputs or name != "linear-ln-relu+skip"
    ]  # fmt: skip


def basic_block() -> nn.Module:
    """One basic block of ResNet-34 with a classifier, small enough to compile on a CPU."""
    block = next(models.resnet34().layer1.children())
    return nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))
