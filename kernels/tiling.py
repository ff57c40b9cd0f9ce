"""Launch configurations as pure functions of the shape: no GPU is needed to read or test them."""

from __future__ import annotations

from dataclasses import dataclass

from fusedres.kernels.layout import Rows

TILE_ELEMENTS = 4096  # 16 a thread at 8 warps in 16 bits: two 128-bit loads of every operand in flight
ON_CHIP_ELEMENTS = 8192  # 16 a thread at 16 warps; with 32 the backward spilled on sm_100, the forward on gfx942
MIN_ROWS = 128  # rows a program handles at least, so that per-channel vectors stay under 5% of its traffic
MAX_CHANNEL_TILES = 1023  # one arrival counter each, and one for the launch
PROGRAMS_PER_SM = 4


@dataclass(frozen=True)
class Tiling:
    """A launch of ``programs * channel_tiles`` programs, each looping over up to ``tiles`` [block_m, block_c] tiles.

    Elementwise kernels give a program consecutive tiles. Reductions deal the row tiles to ``programs`` programs
    in turn, so that all of them walk through memory together.
    """

    block_m: int
    block_c: int
    num_warps: int
    programs: int
    channel_tiles: int
    tiles: int

    @property
    def grid(self) -> tuple[int]:
        return (self.programs * self.channel_tiles,)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _block_c(view: Rows, wanted: int) -> int:
    """At most ``wanted`` channels a tile, but more where there would be more tiles than counters."""
    return max(min(wanted, next_power_of_2(view.C)), next_power_of_2(cdiv(view.C, MAX_CHANNEL_TILES)))


def _thinning(view: Rows, itemsize: int) -> int:
    """By what a thread has fewer elements than 16, because addresses take registers too.

    Accesses that are not 128 bits wide have one address an element. In float32 the same bytes are half the elements.
    A row of NCHW has a 64-bit offset, as a tile may cross images.
    """
    if view.align * itemsize < 16:
        return 4
    return 1 if view.channels_last and itemsize == 2 else 2


def _tile(view: Rows, itemsize: int) -> tuple[int, int]:
    """(block_m, block_c): two sectors (64 bytes) of channels when they are contiguous, else up to 1024 rows.

    64 bytes put all eight rows of a mask byte into one warp; at 128 they cross warps, through shared memory.
    """
    elements = TILE_ELEMENTS // _thinning(view, itemsize)
    if view.channels_last:
        block_c = _block_c(view, 64 // itemsize)
        return max(8, min(elements // block_c, next_power_of_2(view.M))), block_c
    block_m = max(8, min(1024, next_power_of_2(view.M)))
    return block_m, _block_c(view, max(1, elements // block_m))


def _num_warps(view: Rows, itemsize: int, elements: int) -> int:
    return max(1, min(16, elements * _thinning(view, itemsize) // (32 * 16)))


def elementwise(view: Rows, itemsize: int) -> Tiling:
    """For the apply kernels: every program a fixed number of consecutive rows."""
    block_m, block_c = _tile(view, itemsize)
    tiles = max(1, MIN_ROWS // block_m)
    return Tiling(
        block_m,
        block_c,
        _num_warps(view, itemsize, block_m * block_c),
        cdiv(view.M, tiles * block_m),
        cdiv(view.C, block_c),
        tiles,
    )


def reduction(view: Rows, itemsize: int, num_sms: int) -> Tiling:
    """For the statistics and the backward reduction: a few programs for every multiprocessor."""
    block_m, block_c = _tile(view, itemsize)
    channel_tiles = cdiv(view.C, block_c)
    wanted = max(1, num_sms * PROGRAMS_PER_SM // channel_tiles)
    programs = max(1, min(wanted, view.M // max(2 * MIN_ROWS, block_m)))
    return Tiling(
        block_m,
        block_c,
        _num_warps(view, itemsize, block_m * block_c),
        programs,
        channel_tiles,
        cdiv(cdiv(view.M, block_m), programs),
    )


def on_chip(view: Rows, itemsize: int) -> Tiling | None:
    """For the single-launch kernels: all rows of a channel tile in registers; ``None`` where they do not fit.

    A tile has at least one 32-byte sector of contiguous channels; narrower ones waste bandwidth.
    """
    block_m = max(8, next_power_of_2(view.M))
    block_c = _block_c(view, 32 // itemsize if view.channels_last else max(1, 1024 // block_m))
    if block_m * block_c > ON_CHIP_ELEMENTS // _thinning(view, itemsize):
        return None
    return Tiling(block_m, block_c, _num_warps(view, itemsize, block_m * block_c), 1, cdiv(view.C, block_c), 1)
