"""Launch configurations: every element covered once, within the limits of the hardware."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fusedres.kernels import tiling
from fusedres.kernels.layout import Rows

views = st.builds(
    lambda n, c, s, last: Rows(n * s, c, s, last),
    st.integers(1, 1 << 20), st.integers(1, 1 << 20), st.integers(1, 1 << 14), st.booleans(),
)  # fmt: skip
itemsizes = st.sampled_from([2, 4])


def check(view: Rows, config: tiling.Tiling) -> None:
    for extent in (config.block_m, config.block_c, config.num_warps):
        assert extent & (extent - 1) == 0
    assert config.block_m >= 8  # a byte of the mask holds eight rows
    assert config.num_warps <= 16
    assert config.channel_tiles * config.block_c >= view.C
    assert config.channel_tiles <= tiling.MAX_CHANNEL_TILES


@given(views, itemsizes)
def test_elementwise(view, itemsize):
    config = tiling.elementwise(view, itemsize)
    check(view, config)
    rows = config.tiles * config.block_m
    assert config.programs * rows >= view.M > (config.programs - 1) * rows


@pytest.mark.parametrize("reduction", [tiling.reduction, tiling.statistics])
@given(views, itemsizes, st.sampled_from([1, 108, 132, 304]))
def test_reduction(reduction, view, itemsize, num_sms):
    config = reduction(view, itemsize, num_sms)
    check(view, config)
    row_tiles = tiling.cdiv(view.M, config.block_m)
    assert 1 <= config.programs <= row_tiles  # no program without rows: the merge divides by their counts
    # Partial results stay small beside the activation.
    assert config.programs == 1 or view.M // config.programs >= 2 * tiling.MIN_ROWS


@given(views, itemsizes)
def test_on_chip(view, itemsize):
    config = tiling.on_chip(view, itemsize)
    if config is None:
        return
    check(view, config)
    assert config.programs == 1 and config.block_m >= view.M
    assert config.block_m * config.block_c <= tiling.ON_CHIP_ELEMENTS


image_views = st.builds(
    lambda n, c, s, last: Rows(n * s, c, s, last),
    st.integers(1, 1 << 16), st.integers(1, 1 << 14), st.integers(1, 1 << 14), st.booleans(),
)  # fmt: skip


def check_images(view: Rows, config: tiling.ImageTiling) -> None:
    for extent in (config.block_n, config.block_s, config.block_c, config.num_warps):
        assert extent & (extent - 1) == 0
    assert config.block_s >= 8  # a byte of the mask holds eight pixels of one image
    assert config.num_warps <= 16
    assert config.channel_tiles * config.block_c >= view.C
    assert config.channel_tiles <= tiling.MAX_CHANNEL_TILES
    # Offsets inside of a tile have 32 bits.
    assert config.block_n == 1 or config.block_n * config.block_s <= tiling.ON_CHIP_ELEMENTS


@given(image_views, itemsizes)
def test_images(view, itemsize):
    config = tiling.images(view, itemsize)
    check_images(view, config)
    each = config.tiles * config.block_n
    assert config.programs * each >= view.images > (config.programs - 1) * each
    assert each * view.S >= min(view.M, tiling.MIN_ROWS)


@given(image_views, itemsizes, st.sampled_from([1, 108, 132, 304]))
def test_image_reduction(view, itemsize, num_sms):
    config = tiling.image_reduction(view, itemsize, num_sms)
    check_images(view, config)
    tiles = tiling.cdiv(view.images, config.block_n) * tiling.cdiv(view.S, config.block_s)
    assert 1 <= config.programs <= tiles
    assert config.programs == 1 or view.M // config.programs >= 2 * tiling.MIN_ROWS


@given(image_views, itemsizes)
def test_images_on_chip(view, itemsize):
    config = tiling.images_on_chip(view, itemsize)
    if config is None:
        return
    check_images(view, config)
    assert config.programs == 1 and config.block_n >= view.images and config.block_s >= view.S
    assert config.block_n * config.block_s * config.block_c <= tiling.ON_CHIP_ELEMENTS


def test_known_shapes():
    """ResNet's first stage needs two launches, its last at a small batch one."""
    assert tiling.on_chip(Rows(8 * 56 * 56, 64, 56 * 56, True), 2) is None
    assert tiling.on_chip(Rows(8 * 7 * 7, 2048, 7 * 7, True), 2) is not None


@given(
    st.integers(1, 1 << 31), st.integers(1, tiling.MAX_LAYER_NORM), itemsizes, st.sampled_from([32, 64]), st.booleans()
)  # fmt: skip
def test_rows(M, N, itemsize, warp_size, backward):
    config = tiling.rows(M, N, itemsize, warp_size, backward=backward)
    assert config.block_n >= N
    assert config.block_m >= 1
    assert config.num_warps * warp_size <= 1024
    programs = tiling.row_programs(M, config, 132)
    assert 1 <= programs <= 264
    assert M < 10_000 or programs * 96 <= M


@given(
    st.integers(1, 1 << 31), st.integers(1, 8192), st.integers(1, 8192), itemsizes, itemsizes, st.booleans()
)  # fmt: skip
@example(M=8321, N=129, K=44, itemsize=2, weight_itemsize=4, tensor_cores=True)  # a wide weight, a narrow x
def test_products(M, N, K, itemsize, weight_itemsize, tensor_cores):
    config = tiling.layer_norm_linear(M, N, K, itemsize, weight_itemsize, tensor_cores, 132)
    assert min(config.block_m, config.block_n, config.block_k) >= 16  # the least that tl.dot takes
    assert config.num_warps in (4, 8)
    # Tiles of x and of the weight on their way, and the normalised one on its way to the product, fit sm_89's 99 KB.
    stage = config.block_k * (config.block_m * itemsize + config.block_n * weight_itemsize)
    normalised = config.block_k * config.block_m * weight_itemsize
    assert stage * (config.num_stages - 1) + normalised <= 99 * 1024
    if tiling.fuses_linear_layer_norm(M, N, K, itemsize, tensor_cores, 132):
        config = tiling.linear_layer_norm(M, N, K, itemsize, 132)
        assert config.block_n >= N
        assert min(config.block_m, config.block_k) >= 16
