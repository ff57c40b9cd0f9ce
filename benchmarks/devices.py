"""Facts of named devices, and what follows from them: occupancy, bytes in flight, predicted times.

Limits a multiprocessor are those of the CUDA C++ Programming Guide, table "Technical Specifications per Compute
Capability", and of the AMD Instinct MI300 (CDNA3) Instruction Set Architecture guide and the CDNA3 white paper.
"""

from __future__ import annotations

from dataclasses import dataclass

LAUNCH_US = 2.0  # an assumption: to start a kernel and to drain the last one, on the device. The host's time is apart.
LANE_REGISTERS = 512  # a lane of a scheduler: 64 Ki a multiprocessor of NVIDIA's, 512 VGPRs a lane of AMD's SIMDs
SCHEDULERS = 4  # a multiprocessor; a SIMD of AMD's is one
GRANULE = 8  # registers a thread: 256 a warp of 32, 512 a wave of 64


@dataclass(frozen=True)
class Device:
    """One GPU.

    Args:
        bandwidth_gb_s: bytes read and written of device memory, in 10⁹ a second.
        measured: whether the bandwidth was, by a copy from device to device; else it is the datasheet's.
        source: of the bandwidth.
        latency_ns: of device memory under load. An assumption, on the high side of what is reported for idle memory.
        warps: most resident ones of a scheduler.
        programs: most resident ones of a multiprocessor.
        shared_kib: of a multiprocessor.
        reserved_kib: of it, what every program takes beside its own.
    """

    name: str
    arch: str
    bandwidth_gb_s: float
    measured: bool
    source: str
    latency_ns: float
    multiprocessors: int
    warp_size: int = 32
    warps: int = 16
    programs: int = 32
    shared_kib: int = 228
    reserved_kib: int = 1

    @property
    def program_shared_bytes(self) -> int:
        """Most that one program may use."""
        return 1024 * (self.shared_kib - self.reserved_kib)

    @property
    def needed_bytes(self) -> float:
        """In flight a multiprocessor for full bandwidth: bandwidth times latency (Little, 1961)."""
        return self.bandwidth_gb_s * self.latency_ns / self.multiprocessors

    def predicted_us(self, moved_bytes: float, launches: int) -> float:
        """Time of launches one after the other, were there nothing but device memory: no cache, no arithmetic."""
        return moved_bytes / self.bandwidth_gb_s / 1e3 + launches * LAUNCH_US

    def resident(self, registers: int, shared_bytes: int, threads: int) -> int:
        """Programs that a multiprocessor holds at once; 0 where not even one fits.

        Args:
            registers: a thread.
            shared_bytes: a program.
            threads: a program.
        """
        needed = GRANULE * max(1, -(-registers // GRANULE))
        warps = SCHEDULERS * min(self.warps, LANE_REGISTERS // needed)
        shared = shared_bytes + 1024 * self.reserved_kib
        by_shared = 1024 * self.shared_kib // shared if shared else self.programs
        return min(self.programs, warps // -(-threads // self.warp_size), by_shared)

    def occupancy(self, programs: int, threads: int) -> float:
        """Share of the warps that a multiprocessor can hold."""
        return programs * -(-threads // self.warp_size) / (SCHEDULERS * self.warps)


COPY = "copy from device to device through PyTorch, bytes read and written"
DEVICES = {
    device.name: device
    for device in (
        Device("H100", "sm_90", 3000, True, f"H100 80GB HBM3 (SXM): {COPY}", 600, 132),
        Device("H200", "sm_90", 4300, True, COPY, 600, 132),
        Device("A100", "sm_80", 2039, False, "NVIDIA A100 80GB SXM datasheet", 600, 108, shared_kib=164),
        Device(
            "RTX 4090", "sm_89", 1008, False, "NVIDIA GeForce RTX 4090 specifications", 600, 128,
            warps=12, programs=24, shared_kib=100,
        ),
        Device("B200", "sm_100", 8000, False, "NVIDIA DGX B200 datasheet, an eighth of it", 600, 148),
        Device(
            "MI300X", "gfx942", 5300, False, "AMD Instinct MI300X datasheet", 900, 304,
            warp_size=64, warps=8, shared_kib=64, reserved_kib=0,
        ),
    )
}  # fmt: skip
# What code for an architecture is judged by.
BY_ARCH = {DEVICES[name].arch: DEVICES[name] for name in ("A100", "RTX 4090", "H100", "B200", "MI300X")}
PREDICTED = {"us_h100": "H100", "us_h200": "H200", "us_a100": "A100", "us_rtx4090": "RTX 4090", "us_mi300x": "MI300X"}
