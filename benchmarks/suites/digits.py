"""Training on real data: a small residual network on scikit-learn's digits, eager against fused.

1797 images of 8x8 pixels (Alpaydin and Kaynak, 1998), a quarter of them held out.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres
from benchmarks.instruments.interpreter import fast_interpreter
from benchmarks.workers import INTERPRETED, apart


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum and a cosine schedule; ``steps`` stops early."""

    epochs: int = 8
    batch: int = 64
    rate: float = 0.1
    seed: int = 0
    steps: int | None = None


@dataclass(frozen=True)
class Curve:
    """Training loss by step, and the share of held-out images classified right."""

    losses: list[float]
    accuracy: float


@dataclass(frozen=True)
class Agreement:
    """Largest difference of two curves, what is allowed there, and whether it is kept to at every step."""

    difference: float
    allowed: float
    ok: bool


class Block(nn.Module):
    """Two 3x3 convolutions and a skip, projected where the shape changes."""

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.skip = nn.Identity()
        if stride != 1 or inplanes != planes:
            projection = nn.Conv2d(inplanes, planes, 1, stride, bias=False)
            self.skip = nn.Sequential(projection, nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.skip(x))


def build_model(seed: int = 0) -> nn.Sequential:
    """A stem, three blocks and a classifier: 8 BatchNorms, plain PyTorch."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        Block(16, 16, 1), Block(16, 32, 2), Block(32, 32, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def load(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images ``(1347, 1, 8, 8)`` and labels, held-out images ``(450, 1, 8, 8)`` and labels."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=450, random_state=0, stratify=labels)
    x, x_held, y, y_held = (torch.from_numpy(np.ascontiguousarray(part)) for part in split)
    mean, std = x.mean(), x.std()
    x, x_held = (((t - mean) / std).to(dtype).view(-1, 1, 8, 8) for t in (x, x_held))
    return x, y, x_held, y_held


def train(model: nn.Module, recipe: Recipe, *, channels_last: bool = True, backwards: bool = False) -> Curve:
    """Train ``model`` in place; the batches depend on the recipe's seed alone.

    ``backwards`` turns the order of the images inside each batch around: the same sums, added up differently.
    """
    parameters = list(model.parameters())
    x, y, x_held, y_held = load(parameters[0].dtype)
    torch.set_num_threads(1)  # tensors this small gain nothing from a second thread, and lose much on a busy machine
    if channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        x, x_held = (t.contiguous(memory_format=torch.channels_last) for t in (x, x_held))
    optimizer = torch.optim.SGD(parameters, recipe.rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    per_epoch = len(y) // recipe.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=recipe.epochs * per_epoch)
    generator = torch.Generator().manual_seed(recipe.seed)
    losses: list[float] = []
    model.train()
    for _ in range(recipe.epochs):
        order = torch.randperm(len(y), generator=generator)
        for batch in order[: per_epoch * recipe.batch].view(per_epoch, recipe.batch):
            if len(losses) == recipe.steps:
                break
            batch = batch.flip(0) if backwards else batch
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return Curve(losses, accuracy(model, x_held, y_held))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of ``images`` classified as ``labels`` say, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


EAGER_RUNS = ("channels-last", "channels-last, batches turned around", "NCHW", "NCHW, without oneDNN")


def eager_runs(recipe: Recipe) -> dict[str, Curve]:
    """One model trained by eager PyTorch with sums taken in different orders.

    Rounding can put a value on the other side of a ReLU, after which curves part for good: oneDNN's convolutions and
    PyTorch's own were seen to do so at step 20.
    """
    model = build_model(recipe.seed)
    with torch.backends.mkldnn.flags(enabled=False):
        own = train(copy.deepcopy(model), recipe, channels_last=False)
    last = train(copy.deepcopy(model), recipe)
    turned = train(copy.deepcopy(model), recipe, backwards=True)
    plain = train(copy.deepcopy(model), recipe, channels_last=False)
    return dict(zip(EAGER_RUNS, (last, turned, plain, own), strict=True))


def fused_run(recipe: Recipe) -> Curve:
    """The same model after :func:`fusedres.fuse`, on the path that FUSEDRES_BACKEND chooses."""
    return train(fusedres.fuse(build_model(recipe.seed)), recipe)


def interpreted_run(recipe: Recipe) -> Curve:
    """The same in a process whose kernels run in Triton's interpreter and may not fall back.

    Raises:
        BenchmarkError: the process failed.
    """
    return apart(_interpreted, INTERPRETED, recipe)


def _interpreted(recipe: Recipe) -> Curve:
    with fast_interpreter():
        return fused_run(recipe)


def agreement(fused: Curve, eager: dict[str, Curve]) -> Agreement:
    """Whether the fused curve stays as near to an eager one as eager curves stay to each other.

    At each step, the largest difference so far of the fused curve from its nearest eager curve may be as large as
    the largest difference so far between two of the eager curves, plus 4 float32 eps of the loss. Differences of
    rounding grow from step to step, so a bound for the whole run would be no bound for its beginning.
    """
    length = min(len(curve.losses) for curve in [fused, *eager.values()])
    curves = np.array([curve.losses[:length] for curve in eager.values()])
    spread = np.maximum.accumulate(curves.max(0) - curves.min(0))
    slack = 4 * np.finfo(np.float32).eps * np.abs(curves).max()
    distance = np.maximum.accumulate(np.abs(curves - np.array(fused.losses[:length])), axis=1)
    nearest = distance[distance[:, -1].argmin()]
    return Agreement(float(nearest[-1]), float(spread[-1] + slack), bool((nearest <= spread + slack).all()))
