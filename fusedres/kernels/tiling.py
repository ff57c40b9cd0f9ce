"""Launch configurations as pure functions of the shape: no GPU is needed to read or test them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from fusedres.kernels.layout import Rows, alignment

TILE_ELEMENTS = 4096  # 16 a thread at 8 warps in 16 bits: two 128-bit loads of every operand in flight
ON_CHIP_ELEMENTS = 8192  # 16 a thread at 16 warps; with 32 the backward spilled on sm_100, the forward on gfx942
MIN_ROWS = 128  # rows a program handles at least, so that per-channel vectors stay under 5% of its traffic
MANY_ROWS = 8192  # enough of them for programs of twice as many
MAX_CHANNEL_TILES = 1023  # one arrival counter each, and one for the launch
PROGRAMS_PER_SM = 4
STATISTICS_PER_SM = 3  # of 80 registers a thread, in channels-last: all of them resident on an H100
SHAPES = 4096  # whose configurations are kept: a network asks for the same few at every step


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


def _thinning(view: Rows, itemsize: int, tensors: int = 1) -> int:
    """By what a thread has fewer elements than 16, because addresses take registers too.

    Accesses that are not 128 bits wide have one address an element. In float32 the same bytes are half the elements.
    A row of NCHW has a 64-bit offset, as a tile may cross images. Of several ``tensors`` that are normalised together
    each has vectors of its own for the channels of a thread.
    """
    if view.align * itemsize < 16:
        return 4 * tensors
    return max(tensors, 1 if view.channels_last and itemsize == 2 else 2)


def _tile(view: Rows, itemsize: int, tensors: int = 1) -> tuple[int, int]:
    """(block_m, block_c): two sectors (64 bytes) of channels when they are contiguous, else up to 1024 rows.

    64 bytes put all eight rows of a mask byte into one warp; at 128 they cross warps, through shared memory.
    """
    elements = TILE_ELEMENTS // _thinning(view, itemsize, tensors)
    if view.channels_last:
        block_c = _block_c(view, 64 // itemsize)
        return max(8, min(elements // block_c, next_power_of_2(view.M))), block_c
    block_m = max(8, min(1024, next_power_of_2(view.M)))
    block_c = _block_c(view, max(1, elements // block_m))
    return max(8, min(block_m, elements // block_c)), block_c


def _num_warps(view: Rows, itemsize: int, elements: int, tensors: int = 1) -> int:
    return max(1, min(16, elements * _thinning(view, itemsize, tensors) // (32 * 16)))


@functools.lru_cache(SHAPES)
def elementwise(view: Rows, itemsize: int, tensors: int = 1) -> Tiling:
    """For the apply kernels: every program a fixed number of consecutive rows."""
    block_m, block_c = _tile(view, itemsize, tensors)
    return _consecutive(view, block_m, block_c, _num_warps(view, itemsize, block_m * block_c, tensors))


def _consecutive(view: Rows, block_m: int, block_c: int, num_warps: int) -> Tiling:
    tiles = max(1, MIN_ROWS // block_m)
    return Tiling(block_m, block_c, num_warps, cdiv(view.M, tiles * block_m), cdiv(view.C, block_c), tiles)


@functools.lru_cache(SHAPES)
def reduction(view: Rows, itemsize: int, num_sms: int, tensors: int = 1) -> Tiling:
    """For the backward reduction: a few programs for every multiprocessor."""
    block_m, block_c = _tile(view, itemsize, tensors)
    num_warps = _num_warps(view, itemsize, block_m * block_c, tensors)
    return _dealt(view, block_m, block_c, num_warps, num_sms * PROGRAMS_PER_SM)


@functools.lru_cache(SHAPES)
def statistics(view: Rows, itemsize: int, num_sms: int) -> Tiling:
    """For the moments of the batch: likewise, but no more where a thread holds several channels than are resident."""
    block_m, block_c = _tile(view, itemsize)
    wide = view.channels_last and view.align * itemsize >= 16 and itemsize == 2
    wanted = num_sms * (STATISTICS_PER_SM if wide else PROGRAMS_PER_SM)
    return _dealt(view, block_m, block_c, _num_warps(view, itemsize, block_m * block_c), wanted)


def _dealt(view: Rows, block_m: int, block_c: int, num_warps: int, wanted: int) -> Tiling:
    channel_tiles = cdiv(view.C, block_c)
    programs = max(1, min(wanted // channel_tiles, view.M // max(2 * MIN_ROWS, block_m)))
    return Tiling(block_m, block_c, num_warps, programs, channel_tiles, cdiv(cdiv(view.M, block_m), programs))


def _pool_tile(view: Rows, itemsize: int) -> tuple[int, int, int]:
    """(block_m, block_c, num_warps); a row of the tile is an output, or a cell of the input.

    A thread has 16 bytes of every operand, for each element of a window; where accesses are narrower, two elements. In
    NCHW these are of two channels, which share the addresses' arithmetic, and the threads of a warp have neighbours.
    With 8 warps ptxas was seen to spill for sm_100 there.
    """
    wide = view.channels_last and view.align * itemsize >= 16
    each, threads = (16 // itemsize, 256) if wide else (2, 128)
    block_c = _block_c(view, 64 // itemsize if view.channels_last else 2)
    block_m = max(8, min(threads * each // block_c, next_power_of_2(view.M)))
    return block_m, block_c, max(1, min(threads // 32, block_m * block_c // (32 * each)))


@functools.lru_cache(SHAPES)
def pool_elementwise(view: Rows, itemsize: int) -> Tiling:
    """For the pooling forward, over outputs, and the apply kernel of its backward, over cells."""
    return _consecutive(view, *_pool_tile(view, itemsize))


@functools.lru_cache(SHAPES)
def pool_reduction(view: Rows, itemsize: int, num_sms: int, unrolled: bool) -> Tiling:
    """For the reduction of the pooling backward, over cells.

    A thread has 8 elements of 32 bits too where a window is walked through: with 4 ptxas was seen to spill for sm_90.
    """
    block_m, block_c, num_warps = _pool_tile(view, itemsize)
    wide = itemsize == 4 and not unrolled
    return _dealt(view, 2 * block_m if wide else block_m, block_c, num_warps, num_sms * PROGRAMS_PER_SM)


@functools.lru_cache(SHAPES)
def on_chip(view: Rows, itemsize: int, tensors: int = 1) -> Tiling | None:
    """For the single-launch kernels: all rows of a channel tile in registers; ``None`` where they do not fit.

    A tile has at least one 32-byte sector of contiguous channels; narrower ones waste bandwidth. Several tensors take
    more warps, where there are more, and no smaller tile.
    """
    block_m = max(8, next_power_of_2(view.M))
    block_c = _block_c(view, 32 // itemsize if view.channels_last else max(1, 1024 // block_m))
    if block_m * block_c > ON_CHIP_ELEMENTS // _thinning(view, itemsize):
        return None
    warps = _num_warps(view, itemsize, block_m * block_c, tensors)
    return Tiling(block_m, block_c, warps, 1, cdiv(view.C, block_c), 1)


@dataclass(frozen=True)
class ImageTiling:
    """Tiles of [block_n images of block_s pixels, block_c channels]; whole images are one program's.

    Elementwise kernels give a program all pixels of ``tiles * block_n`` images; reductions deal the tiles in turn.
    """

    block_n: int
    block_s: int
    block_c: int
    num_warps: int
    programs: int
    channel_tiles: int
    tiles: int

    @property
    def grid(self) -> tuple[int]:
        return (self.programs * self.channel_tiles,)


def _image_tile(view: Rows, itemsize: int) -> tuple[int, int, int, int]:
    """(block_n, block_s, block_c, num_warps): up to 64 pixels in channels-last, else up to 1024.

    Images share a tile only where they are much smaller than it: addresses that jump from one to the next take
    registers. A thread has up to 16 elements of 16 bits, as there is little else to load; more warps had too few
    registers, and 16 elements of 32 bits spilled.
    """
    elements = TILE_ELEMENTS // _thinning(view, itemsize)
    pixels = max(8, next_power_of_2(view.S))
    if view.channels_last:
        block_c = _block_c(view, 64 // itemsize)
        block_s = max(8, min(pixels, 64, elements // block_c))
    else:
        block_s = min(1024, pixels)
        block_c = _block_c(view, max(1, elements // max(128, block_s)))
    block_n = max(1, min(64, elements // block_c) // block_s)
    block_n = min(block_n, next_power_of_2(view.images))
    most = 4 if itemsize == 2 else 8
    return block_n, block_s, block_c, min(most, _num_warps(view, itemsize, block_n * block_s * block_c))


def images(view: Rows, itemsize: int) -> ImageTiling:
    """For the apply kernels of the head: every program a fixed number of whole images.

    They move half of what others do beside the same vectors, so a program takes twice the rows, where there are many.
    """
    block_n, block_s, block_c, num_warps = _image_tile(view, itemsize)
    tiles = cdiv(MIN_ROWS if view.M < MANY_ROWS else 2 * MIN_ROWS, block_n * view.S)
    programs = cdiv(view.images, tiles * block_n)
    return ImageTiling(block_n, block_s, block_c, num_warps, programs, cdiv(view.C, block_c), tiles)


def image_reduction(view: Rows, itemsize: int, num_sms: int) -> ImageTiling:
    """For the backward reduction of the head: a few programs for every multiprocessor.

    A thread of a warp of 32 has at least 8 elements: with 4, where accesses are narrow, too little was in flight.
    """
    block_n, block_s, block_c, num_warps = _image_tile(view, itemsize)
    num_warps = min(num_warps, max(1, block_n * block_s * block_c // 256))
    channel_tiles = cdiv(view.C, block_c)
    wanted = max(1, num_sms * PROGRAMS_PER_SM // channel_tiles)
    programs = max(1, min(wanted, view.M // max(2 * MIN_ROWS, block_n * block_s)))
    tiles = cdiv(cdiv(view.images, block_n) * cdiv(view.S, block_s), programs)
    return ImageTiling(block_n, block_s, block_c, num_warps, programs, channel_tiles, tiles)


def images_on_chip(view: Rows, itemsize: int) -> ImageTiling | None:
    """For the single-launch kernels of the head, as :func:`on_chip`, with every image in rows of its own."""
    block_n, block_s = next_power_of_2(view.images), max(8, next_power_of_2(view.S))
    block_m = block_n * block_s
    block_c = _block_c(view, 32 // itemsize if view.channels_last else max(1, 1024 // block_m))
    if block_m * block_c > ON_CHIP_ELEMENTS // _thinning(view, itemsize):
        return None
    warps = _num_warps(view, itemsize, block_m * block_c)
    return ImageTiling(block_n, block_s, block_c, warps, 1, cdiv(view.C, block_c), 1)


MAX_LAYER_NORM = 8192  # features that a row kernel holds in registers
MAX_SUMMED = 4096  # of them, where the backward sums its result as well: with 8192 that spilled


@dataclass(frozen=True)
class RowTiling:
    """A program of a row kernel: block_m rows at a time, each whole."""

    block_m: int
    block_n: int
    num_warps: int


def _wide_access(length: int, itemsize: int) -> bool:
    """Whether rows of so many elements begin at multiples of 16 bytes; else every element has an address of its own."""
    return alignment(length) * itemsize >= 16


def rows(M: int, N: int, itemsize: int, warp_size: int, *, backward: bool) -> RowTiling:
    """For layer normalisation of M rows of N: 16 elements a thread, in the backward, with its three sums, 8.

    Fewer where rows allow no wide access; more where a program would have more than 1024 threads.
    """
    each = (8 if backward else 16) // (1 if _wide_access(N, itemsize) else 2)
    block_n = next_power_of_2(N)
    block_m = max(1, min(256 * each // block_n, next_power_of_2(M)))
    return RowTiling(block_m, block_n, max(1, min(1024 // warp_size, block_m * block_n // (32 * each))))


def row_programs(M: int, config: RowTiling, num_sms: int) -> int:
    """Programs of the row-wise backward; with more than M / 96, partial sums would pass 5% of its traffic."""
    return max(1, min(2 * num_sms, max(M // 96, min(64, cdiv(M, config.block_m)))))


@dataclass(frozen=True)
class GemmTiling:
    """A [block_m, block_n] tile of the product a program, summed block_k at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def fuses_layer_norm_linear(M: int, N: int, K: int, tensor_cores: bool) -> bool:
    """Whether one kernel normalises and multiplies; else a row kernel, then the vendor's product.

    An estimate, not timed: fusing saves a write and a read of x. Where N is large the vendor's better use of the
    tensor cores outweighs that, and so it does where few rows have long sums, which it splits.
    """
    return N <= (1024 if tensor_cores else 32) and (K <= 1024 or M >= 1024)


def fuses_linear_layer_norm(M: int, N: int, K: int, itemsize: int, tensor_cores: bool, num_sms: int) -> bool:
    """Whether one kernel multiplies and normalises; else the vendor's product, then a row kernel.

    A program holds whole rows of the product, and reads all of the weight from the L2 cache: an estimate, not timed,
    of where the launch and the read of the product that this saves are worth it. Rows of 512 leave registers for 16
    of them only, which is enough while every program has a multiprocessor of its own.
    """
    few = M <= 16 * num_sms and _wide_access(K, itemsize)
    most = (512 if few else 256) if tensor_cores else 64
    return N <= most and (K <= 1024 or M >= 4096)


def layer_norm_linear(
    M: int, N: int, K: int, itemsize: int, weight_itemsize: int, tensor_cores: bool, num_sms: int
) -> GemmTiling:
    """For the product with a normalising prologue: smaller tiles where there would not be one for every SM.

    Under autocast an item of x has 4 bytes, and one of the weight 2.
    """
    wide = _wide_access(K, weight_itemsize)
    block_m = 128 if tensor_cores else 32
    block_n = max(16, min(128 if wide else 64, next_power_of_2(N)))
    while block_m > 16 and cdiv(M, block_m) * cdiv(N, block_n) < num_sms:
        block_m //= 2
    while block_n > 32 and cdiv(M, block_m) * cdiv(N, block_n) < num_sms:
        block_n //= 2
    block_k = max(16, min((128 if wide else 64) // max(itemsize, weight_itemsize), next_power_of_2(K)))
    return GemmTiling(block_m, block_n, block_k, max(4, min(8, block_m * block_n // (2048 if wide else 256))), 3)


def linear_layer_norm(M: int, N: int, K: int, itemsize: int, num_sms: int) -> GemmTiling:
    """For the product with a normalising epilogue: a program holds whole rows of it."""
    block_n = max(16, next_power_of_2(N))
    block_m = 64 if block_n <= 256 else 16
    while block_m > 16 and cdiv(M, block_m) < num_sms:
        block_m //= 2
    block_k = max(16, min(64 // itemsize, next_power_of_2(K)))
    stages = 2 if block_n > 256 else 3  # gfx942 has 64 KB of shared memory
    return GemmTiling(block_m, block_n, block_k, max(4, min(8, block_m * block_n // 2048)), stages)
