"""What the timed suites measure: modules, dtypes and sizes, most telling first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from benchmarks.errors import BenchmarkError
from benchmarks.providers import BASELINE, EAGER, PROVIDERS, Provider
from fusedres import models

SUITES = ("models", "mlp")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLASSES = 1000
ROWS = (64, 1024, 16384)
FEATURES = ((512, 512), (512, 102), (1024, 1024), (4096, 4096), (256, 256))  # first those of the residual MLP


@dataclass(frozen=True)
class Workload:
    """A module in one dtype and the inputs it is measured at.

    A model is a classifier in training, in 16 bits under autocast over float32 weights. A layer has its weights and
    its input in the dtype itself, and is differentiated as inside of a network: from a random cotangent, to the input
    too, and without an optimizer.

    Args:
        sample: the input's shape without its batch; ``outputs`` are classes or, of a layer, features.
        check: shape of the input that is compared with float64 before any figure; ``None`` for each one measured.
        channels_last: whether the memory format means anything to it.
        compiled: whether ``torch.compile`` takes part.
    """

    name: str
    build: Callable[[], nn.Module]
    dtype: str
    batches: tuple[int, ...]
    sample: tuple[int, ...]
    outputs: int
    check: tuple[int, ...] | None = None
    layer: bool = False
    channels_last: bool = False
    compiled: bool = True

    @property
    def baseline(self) -> str:
        """The provider that speedups are relative to: the faster of eager's memory formats, where there are two."""
        return BASELINE if self.channels_last else EAGER

    def checked(self, batch: int) -> tuple[int, ...]:
        """The input whose check stands for that of ``batch`` samples."""
        return self.check or (batch, *self.sample)

    def entrants(self, providers: list[Provider]) -> list[Provider]:
        """Those of ``providers`` that can take part, and the baseline."""
        able = [
            p
            for p in providers
            if (self.compiled or p.name != "torch.compile") and (self.channels_last or p.name != BASELINE)
        ]
        return able if any(p.name == self.baseline for p in able) else [PROVIDERS[self.baseline], *able]


def workloads(suite: str, device: torch.device, dtype: str | None) -> list[Workload]:
    """What ``suite`` measures on ``device``; ``dtype`` keeps one. On a GPU float16 is measured on demand only.

    Raises:
        BenchmarkError: an unknown dtype, or one that is not measured there.
    """
    if dtype is not None and dtype not in DTYPES:
        raise BenchmarkError(f"unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    if device.type == "cpu":
        if dtype not in (None, "float32"):
            raise BenchmarkError(f"dtype {dtype!r} is not measured on {device.type}; only float32 is")
        return _small_networks() if suite == "models" else _small_mlps()
    build = _networks if suite == "models" else _mlps
    return [w for name in ([dtype] if dtype else ["bfloat16", "float32"]) for w in build(name)]


def _networks(dtype: str) -> list[Workload]:
    full, small, cifar = (3, 224, 224), (8, 3, 64, 64), (3, 32, 32)
    return [
        *(
            Workload(name, build, dtype, batches, full, CLASSES, small, channels_last=True)
            for name, build, batches in (
                ("resnet50", models.resnet50, (32, 128)),
                ("preact_resnet50", models.preact_resnet50, (128,)),
                ("resnet34", models.resnet34, (32, 128)),
            )
        ),
        Workload(
            "preact_resnet_cifar(110)", partial(models.preact_resnet_cifar, 110), dtype, (128,), cifar, 10,
            (8, *cifar), channels_last=True,
        ),
    ]  # fmt: skip


def _small_networks() -> list[Workload]:
    """ResNet-34 is one block here: the C++ compiler takes its time, and so does the whole network."""
    block, cifar = (64, 14, 14), (3, 32, 32)
    cifar20 = partial(models.preact_resnet_cifar, 20)
    return [
        Workload("residual block", residual_block, "float32", (8,), block, CLASSES, channels_last=True),
        Workload(
            "resnet50", models.resnet50, "float32", (4,), (3, 64, 64), CLASSES, (4, 3, 48, 48),
            channels_last=True, compiled=False,
        ),
        Workload(
            "preact_resnet_cifar(20)", cifar20, "float32", (4,), cifar, 10, channels_last=True, compiled=False
        ),
    ]  # fmt: skip


def _mlps(dtype: str) -> list[Workload]:
    image, features = (3, 128, 128), (512,)
    own, *others = FEATURES
    return [
        Workload("residual_mlp", models.residual_mlp, dtype, (64, 1024), image, 102, (64, *image)),
        *layers(*own, dtype, ROWS),
        Workload("plain_mlp", models.plain_mlp, dtype, ROWS, features, 512, (64, *features)),
        *(layer for sizes in others for layer in layers(*sizes, dtype, ROWS)),
    ]


def _small_mlps() -> list[Workload]:
    """One layer is compiled: the C++ compiler takes its time."""
    image = (3, 32, 32)
    build = partial(models.residual_mlp, image_size=32)
    return [
        Workload("residual_mlp", build, "float32", (32,), image, 102, compiled=False),
        Workload("plain_mlp", models.plain_mlp, "float32", (64,), (512,), 512, compiled=False),
        *layers(512, 512, "float32", (64,), compiled=("linear-ln-relu+skip",)),
        *layers(512, 102, "float32", (64,), compiled=()),
    ]


def layers(
    inputs: int, outputs: int, dtype: str, rows: tuple[int, ...], compiled: tuple[str, ...] | None = None
) -> list[Workload]:
    """The three layers of one size, as users write them; only where the sizes are equal is there a skip."""
    return [
        Workload(
            f"{name} {inputs}→{outputs}", partial(build, inputs, outputs), dtype, rows, (inputs,), outputs,
            layer=True, compiled=compiled is None or name in compiled,
        )
        for name, build in LAYERS.items()
        if inputs == outputs or build is not skip_linear_norm_relu
    ]  # fmt: skip


def residual_block() -> nn.Module:
    """One basic block of ResNet-34 with a classifier, small enough to compile on a CPU."""
    block = next(models.resnet34().layer1.children())
    return nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


def norm_linear_relu(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, outputs), nn.ReLU())


def linear_norm_relu(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.ReLU())


def skip_linear_norm_relu(inputs: int, _: int) -> nn.Module:
    return models.ResidualMLPBlock(inputs)


LAYERS = {
    "ln-linear-relu": norm_linear_relu,
    "linear-ln-relu": linear_norm_relu,
    "linear-ln-relu+skip": skip_linear_norm_relu,
}
