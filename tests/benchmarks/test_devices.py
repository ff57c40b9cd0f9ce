"""Occupancy as the vendors' calculators have it, Little's law, and predictions that say what they rest on."""

from __future__ import annotations

import pytest

from benchmarks.devices import BY_ARCH, DEVICES, LAUNCH_US, PREDICTED


@pytest.mark.parametrize(
    ("name", "registers", "shared", "threads", "programs", "occupancy"),
    [
        ("H100", 32, 0, 256, 8, 1.0),
        ("H100", 37, 0, 256, 6, 0.75),  # rounded up to 40
        ("H100", 64, 0, 256, 4, 0.5),
        ("H100", 255, 0, 128, 2, 0.125),
        ("H100", 32, 0, 32, 32, 0.5),  # no more programs
        ("H100", 32, 100 * 1024, 256, 2, 0.25),  # 1 KiB more each
        ("H100", 32, 228 * 1024, 256, 0, 0.0),
        ("A100", 32, 54 * 1024, 256, 2, 0.25),
        ("RTX 4090", 32, 0, 256, 6, 1.0),
        ("RTX 4090", 32, 0, 32, 24, 0.5),
        ("MI300X", 128, 0, 512, 2, 0.5),
        ("MI300X", 64, 64 * 1024, 512, 1, 0.25),
        ("MI300X", 60, 0, 256, 8, 1.0),
    ],
)
def test_occupancy(name: str, registers: int, shared: int, threads: int, programs: int, occupancy: float) -> None:
    device = DEVICES[name]
    assert device.resident(registers, shared, threads) == programs
    assert device.occupancy(programs, threads) == occupancy


def test_bytes_that_full_bandwidth_needs() -> None:
    assert DEVICES["H100"].needed_bytes == pytest.approx(3e12 * 600e-9 / 132)


def test_a_prediction_is_bytes_over_bandwidth_and_launches() -> None:
    assert DEVICES["H100"].predicted_us(3e9, 0) == pytest.approx(1000)
    assert DEVICES["H100"].predicted_us(0, 3) == 3 * LAUNCH_US


def test_every_bandwidth_says_where_it_is_from() -> None:
    assert {name for name, device in DEVICES.items() if device.measured} == {"H100", "H200"}
    assert all(("copy" in device.source) == device.measured for device in DEVICES.values())
    assert set(PREDICTED.values()) <= set(DEVICES)
    assert all(BY_ARCH[arch].arch == arch for arch in BY_ARCH)
