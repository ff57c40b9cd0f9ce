"""What generated code must satisfy, as one function: the code suite and the tests refuse the same code."""

from __future__ import annotations

import math

from benchmarks.devices import BY_ARCH
from benchmarks.instruments.codegen import TARGETS, Code, Launch

ACTIVATIONS = ("x_ptr", "residual_ptr", "dy_ptr", "other_ptr", "g_ptr", "z_ptr", "a_ptr", "b_ptr", "dfork_ptr")
OUTPUTS = (
    "y_ptr", "s_ptr", "saved_ptr", "dx_ptr", "dresidual_ptr", "dz_ptr", "normalised_ptr", "product_ptr",
    "dsum_ptr", "da_ptr", "db_ptr",
)  # fmt: skip
PRODUCTS = {"_layer_norm_linear_fwd_kernel", "_linear_layer_norm_fwd_kernel"}
BITS = {"*fp32": 32, "*bf16": 16, "*fp16": 16, "*u8": 0}  # of an element; none of a mask, which has one in a byte
# 1,024 threads a multiprocessor of 65,536 registers: enough loads in flight to cover memory's latency.
REGISTERS = 128
# Of the bytes in flight that full bandwidth needs. Tiles are chosen for an H100; an sm_100 needs more than twice its.
IN_FLIGHT = {"sm_100": 0.5}


def complaints(launch: Launch, arch: str, code: Code) -> list[str]:
    """What is wrong with the code of ``launch`` on ``arch``; empty where nothing is."""
    return [*_resources(launch, arch, code), *_widths(launch, arch, code), *_in_flight(launch, arch, code)]


def threads(launch: Launch, arch: str) -> int:
    """Of a program."""
    return launch.num_warps * TARGETS[arch].warp_size


def _resources(launch: Launch, arch: str, code: Code) -> list[str]:
    is_product, most_shared = launch.name in PRODUCTS, BY_ARCH[arch].program_shared_bytes
    found = []
    if code.spill_bytes:
        found.append(f"spills {code.spill_bytes} bytes a thread")
    if threads(launch, arch) > 1024:
        found.append(f"{threads(launch, arch)} threads, more than 1024")
    if code.shared_bytes > most_shared:
        found.append(f"{code.shared_bytes} bytes of shared memory, more than {most_shared}")
    exact = launch.constants.get("PRECISION") == "ieee" and launch.tensors.get("weight_ptr") == "*fp32"
    if is_product and not exact and not code.matrix:
        found.append("no tensor-core instruction")
    plain = not is_product and "_on_chip_" not in launch.name and not arch.startswith("gfx")
    if plain and code.registers > REGISTERS:
        found.append(f"{code.registers} registers, more than {REGISTERS}")
    found += [f"32-bit addresses of {name}" for name in sorted(code.narrow & {*ACTIVATIONS, *OUTPUTS})]
    published = {"partials_ptr", "counters_ptr"} <= launch.tensors.keys()  # to other programs of the launch
    if published and code.fenced is not True:
        found.append("no barrier between the stores of partial results and the counter")
    return found


def _widths(launch: Launch, arch: str, code: Code) -> list[str]:
    """As many 128-bit accesses a thread as its share of the tile in every activation needs."""
    constants = launch.constants
    tile = math.prod(constants.get(name, 1) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_S", "BLOCK_C"))

    def lacking(kind: str, names: tuple[str, ...], there: int) -> list[str]:
        widths = [BITS[launch.tensors[name]] for name in names if name in launch.tensors]
        # Odd C, or planes of 14x14: rows do not begin at multiples of 16 bytes.
        share = threads(launch, arch) * 128
        needed = sum(tile * bits // share for bits in widths if _align(launch) * bits >= 128)
        return [f"{there} {kind} of 128 bits, fewer than {needed}"] if there < needed else []

    found = []
    if launch.name not in PRODUCTS:  # they copy asynchronously to shared memory
        found += lacking("loads", ACTIVATIONS, code.loads.get(128, 0))
    if launch.name not in PRODUCTS or not arch.startswith("gfx"):  # MFMA leaves four results side by side
        found += lacking("stores", OUTPUTS, code.stores.get(128, 0))
    return found


def _in_flight(launch: Launch, arch: str, code: Code) -> list[str]:
    """Loads asked for at once, where memory is what limits: all that full bandwidth needs, or ``IN_FLIGHT`` of it.

    Half as many where rows allow no wide access: a thread has fewer elements there, as each has an address of its own.
    """
    device, first = BY_ARCH[arch], next(iter(launch.tensors.values()))
    there = device.resident(code.registers, code.shared_bytes, threads(launch, arch)) * code.load_bytes
    needed = device.needed_bytes * IN_FLIGHT.get(arch, 1.0) * (1 if _align(launch) * BITS[first] >= 128 else 0.5)
    if launch.name in PRODUCTS or there >= needed:
        return []
    return [f"{there} bytes in flight a multiprocessor, fewer than {needed:.0f}"]


def _align(launch: Launch) -> int:
    return min((value for name, value in launch.constants.items() if name.startswith("ALIGN")), default=1)
