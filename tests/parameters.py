"""Parameters that many tests share, and which of their combinations the quick suite runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
both_layouts = pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
BOTH = [True, False]
# How torch.compile is tried: the slow backend where there is most to compile. Crossed over, by night.
compiled_modes = pytest.mark.parametrize(
    ("training", "backend"),
    [
        (True, "inductor"),
        (False, "aot_eager"),
        pytest.param(True, "aot_eager", marks=pytest.mark.slow),
        pytest.param(False, "inductor", marks=pytest.mark.slow),
    ],
    ids=["train-inductor", "eval-aot_eager", "train-aot_eager", "eval-inductor"],
)
# Of activations: what each is there for. Layouts, modes and residuals meet each of them.
SHAPES = [
    (2, 1, 3, 3),  # one channel
    (5, 3, 1, 1),  # one pixel: the two formats are one
    (1, 67, 5, 3),  # odd C, one image
    (2, 2048, 2, 1),  # two pixels, the most channel tiles
    (4, 24, 14, 14),  # C and H·W divisible by 8 and by 4 only: narrower accesses
    (5, 70, 17, 9),  # two launches, ragged in every direction
    (2, 3, 97, 61),  # planes of many tiles, of odd length
    (40, 64, 8, 8),  # two launches, whole tiles only
    (6, 10),  # (N, C)
    (4, 6, 11),  # (N, C, L)
    (2, 3, 4, 5, 2),  # (N, C, D, H, W)
]


def has_format(*, channels_last: bool, shape: Sequence[int], **_: object) -> bool:
    """channels_last is a format of four dimensions."""
    return len(shape) == 4 or not channels_last


def has_statistics(*, training: bool, options: Mapping[str, object], **_: object) -> bool:
    """Evaluation needs running statistics."""
    return training or options.get("tracking") is not False


def covering(
    where: Callable[..., bool] = lambda **case: True, **levels: Sequence[Any] | Mapping[str, Any]
) -> pytest.MarkDecorator:
    """Parametrize so that any two values of different parameters meet, in as few cases as a greedy choice finds.

    A kernel's fault shows with one value, or where two meet, a layout and a dtype say; hardly ever with three alone.
    All other combinations are slow. Values that are given by name are told by it; ``where`` says which cases exist.
    """
    named = [
        values if isinstance(values, Mapping) else {_told(n, v): v for v in values} for n, values in levels.items()
    ]
    cases = [
        labels
        for labels in itertools.product(*named)
        if where(**{name: values[label] for name, values, label in zip(levels, named, labels, strict=True)})
    ]
    pairs = {labels: set(itertools.combinations(enumerate(labels), 2)) for labels in cases}
    missing: set[Any] = set().union(*pairs.values())
    chosen = set()
    while missing:
        best = max(cases, key=lambda labels: len(pairs[labels] & missing))
        chosen.add(best)
        missing -= pairs[best]
    parameters = [
        pytest.param(
            *(values[label] for values, label in zip(named, labels, strict=True)),
            marks=() if labels in chosen else pytest.mark.slow,
            id="-".join(labels),
        )
        for labels in cases
    ]
    return pytest.mark.parametrize(list(levels), parameters)


def _told(name: str, value: object) -> str:
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return str(value).removeprefix("torch.")
