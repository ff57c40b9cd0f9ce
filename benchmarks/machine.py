"""What the machine itself can do, measured beside everything else: copy bandwidth, matrix rate, clocks, temperature."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import torch

from benchmarks.environment import gpu_query
from benchmarks.timing import milliseconds

REPEATS = 15


@functools.cache
def ceilings(device: torch.device) -> dict[str, float]:
    """Measured once a run: ``copy_gb_s``, bytes read plus bytes written of a large copy, and ``matmul_tflop_s``.

    On a GPU 1 GiB is copied, and the product is of bfloat16 8192x8192 matrices; on a CPU 64 MiB, and float32 1024x1024.
    """
    on_gpu = device.type == "cuda"
    source = torch.randn((2**30 if on_gpu else 2**26) // 4, device=device)
    target = torch.empty_like(source)
    copy = _fastest_half(lambda: target.copy_(source), device)
    size, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = _fastest_half(lambda: a @ b, device)
    return {
        "copy_gb_s": round(2 * source.numel() * 4 / copy / 1e6, 1),
        "matmul_tflop_s": round(2 * size**3 / product / 1e9, 3),
    }


def _fastest_half(call: Callable[[], object], device: torch.device) -> float:
    """Median milliseconds of the faster half: what the machine can do when nothing is in its way."""
    for _ in range(3):
        call()
    samples = sorted(milliseconds(call, device) for _ in range(REPEATS))
    return statistics.median(samples[: REPEATS // 2 + 1])


def conditions(device: torch.device) -> dict[str, float | None]:
    """``sm_mhz`` and ``temperature_c`` of a GPU just now; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    clock, temperature = gpu_query("clocks.sm", "temperature.gpu") or (None, None)
    return {"sm_mhz": _number(clock), "temperature_c": _number(temperature)}


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None
