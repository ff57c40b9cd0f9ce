"""Where PyTorch's own kernels are faster than ours: what the benchmarks measured, by device, and what follows from it.

``preferences.json`` holds, for every device that was measured, the speed of ours over eager PyTorch in channels-last at
each size, as the upper end of its 95% interval: below 1, ours are slower by more than noise. A call takes the verdict
of the measured size next to its own. ``python -m benchmarks prefer`` writes the file, from rows alone.

A device that is not in it was not measured, and runs the kernels at every size: one launch in place of eager's two.

The host's time is part of what was measured, and none of it is left in a compiled function or a CUDA graph: there the
kernels run at every size too. So they do in NCHW, which is not compared with eager, and with ``momentum=None``, where
PyTorch's own way waits for the device.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedres.kernels.layout import is_channels_last
from fusedres.ops.dispatch import backend

FILE = Path(__file__).with_name("preferences.json")
TIMED = ("cuda",)  # kinds of devices on which kernels are compared
KEPT = 4096  # sizes whose verdict is kept
_MEASURED: dict[str, dict[str, Any]] = json.loads(FILE.read_text())


def eager_is_faster(input: Tensor, kind: str, training: bool, momentum: float | None) -> bool:
    """Whether ``auto`` leaves this call, which kernels cover, to PyTorch's own.

    Args:
        kind: what the benchmarks call the layer, as ``bn+add+relu``.
    """
    if not _MEASURED or torch.compiler.is_compiling() or input.device.type not in TIMED or momentum is None:
        return False
    rows, channels = input.numel() // input.shape[1], input.shape[1]
    slow = slower_than_eager(input.device, kind, training, input.dtype, rows, channels)
    return slow is not None and is_channels_last(input) and not torch.cuda.is_current_stream_capturing()


def slower_than_eager(
    device: torch.device, kind: str, training: bool, dtype: torch.dtype, rows: int, channels: int
) -> float | None:
    """Our speed over eager PyTorch's, in channels-last, where ``auto`` takes the latter; else ``None``."""
    if not _MEASURED or device.type not in TIMED or backend() != "auto":
        return None
    ratio = measured_speed(device_name(device), kind, training, dtype, rows, channels)
    return ratio if ratio is not None and ratio < 1 else None


@functools.lru_cache(KEPT)
def measured_speed(
    device: str, kind: str, training: bool, dtype: torch.dtype, rows: int, channels: int, what: str = "speed"
) -> float | None:
    """That of the measured size next to [rows, channels] on a logarithmic scale; ``None`` where none was measured."""
    points = _MEASURED.get(device, {}).get(what, {}).get(group(kind, training, dtype))
    if not points:
        return None

    def distance(point: tuple[int, int, float]) -> float:
        return math.hypot(math.log(point[0] / rows), math.log(point[1] / channels))

    return min(points, key=distance)[2]


def kind(residual: Tensor | None, act: str | None, fork: bool = False) -> str:
    """What the benchmarks call a layer. None that adds a residual is measured without its ReLU.

    Of those with a fork, which saves eager a pass in any of them, the one that ends a block is.
    """
    if fork:
        return "bn+add+relu+fork"
    return "bn+add+relu" if residual is not None else "bn+relu" if act else "bn"


def group(kind: str, training: bool, dtype: torch.dtype) -> str:
    """The key of sizes that are compared with each other."""
    return f"{kind} {'training' if training else 'inference'} {str(dtype).removeprefix('torch.')}"


@functools.cache
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def standing(device: torch.device) -> str | None:
    """What is known of ``device``, in words; ``None`` where no kernel is timed, as on a CPU."""
    if device.type not in TIMED:
        return None
    name = device_name(device)
    if name not in _MEASURED:
        return f"kernels at every size: they were never compared with PyTorch's own on {name}"
    known = _MEASURED[name]
    return f"kernels or PyTorch's own by size, as measured on {name} on {known['date']} at commit {known['commit']}"
