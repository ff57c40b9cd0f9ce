"""The networks that are studied in processes of their own, and the check that they compute what eager does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import parity
from benchmarks.providers import Instance
from benchmarks.timing import Batch
from fusedres import models

ONE_A_STAGE = [1, 1, 1, 1]


@dataclass(frozen=True)
class Subject:
    """A classifier and the image, or the features, that it takes.

    Args:
        sample: the input's shape without its batch, on a GPU; ``small`` on a CPU.
        miniature: of the same blocks, one a stage, narrower: what is checked where kernels are interpreted.
        channels_last: whether the memory format means anything to it.
    """

    name: str
    build: Callable[[], nn.Module]
    miniature: Callable[[], nn.Module]
    classes: int
    sample: tuple[int, ...] = (3, 224, 224)
    small: tuple[int, ...] = (3, 64, 64)
    channels_last: bool = True

    def shape(self, batch: int, device: torch.device) -> tuple[int, ...]:
        return batch, *(self.small if device.type == "cpu" else self.sample)

    def input(self, shape: tuple[int, ...], device: torch.device, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)

    def labels(self, batch: int, device: torch.device) -> Tensor:
        generator = torch.Generator(device).manual_seed(100)
        return torch.randint(self.classes, (batch,), generator=generator, device=device)


def basic_block() -> nn.Sequential:
    """The first residual block of ResNet-34; its pooled channels are the classes."""
    return nn.Sequential(models.BasicBlock(64, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten())


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("basic block", basic_block, basic_block, 64, (64, 56, 56), (64, 8, 8)),
        Subject(
            "resnet34", models.resnet34, partial(models.ResNet, models.BasicBlock, ONE_A_STAGE, width=8), 1000
        ),
        Subject(
            "resnet50", models.resnet50, partial(models.ResNet, models.Bottleneck, ONE_A_STAGE, width=8), 1000
        ),
        Subject(
            "preact_resnet50", models.preact_resnet50,
            partial(models.PreActResNet, models.PreActBottleneck, ONE_A_STAGE, width=8), 1000,
        ),
        Subject(
            "residual_mlp", models.residual_mlp, partial(models.residual_mlp, width=64, depth=2), 102,
            (3, 128, 128), (3, 128, 128), channels_last=False,
        ),
    )
}  # fmt: skip


def check(
    subject: Subject,
    instance: Instance,
    model: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    around: parity.Around = nullcontext,
) -> dict[str, Any]:
    """The verdict on ``instance``, which was made from ``model``, at inputs of ``shape``.

    The first that is right of a few inputs counts, as a sign that flips at a ReLU by rounding makes one wrong.
    ``around`` is what the training step's parts run in, as in :func:`parity.check`.

    Raises:
        RuntimeError: ``instance`` cannot run.
    """
    device = next(instance.module.parameters()).device
    target = subject.labels(shape[0], device)
    verdict: dict[str, Any] = {"ok": False}
    for seed in range(1, parity.INPUTS + 1):
        x = subject.input(shape, device, seed)
        batches = [Batch((x,), target)]
        found = parity.check([instance], model, batches, dtype, channels_last=subject.channels_last, around=around)
        verdict = found[instance.provider.name]
        if "error" in verdict:
            raise RuntimeError(verdict["error"])
        if verdict["ok"]:
            break
    return verdict
