"""The launches whose code is looked at: of every layer, at shapes that take every path, recorded and not run."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple
from unittest import mock

import torch

from benchmarks.instruments.codegen import TARGETS, Launch, recorded_launches
from benchmarks.instruments.launches_batch_norm import SMS, batch_norm_layers

DTYPES = ("bfloat16", "float32", "float16")
WARP_SIZES = sorted({target.warp_size for target in TARGETS.values()})
LONG = {"*bf16": "bfloat16", "*fp32": "float32", "*fp16": "float16"}
# Rows, features out and features in. Rows of 101 or 67 elements allow no wide access; 8192 is the widest row.
LINEAR_SHAPES = (
    (16384, 1024, 512),
    (16384, 256, 512),
    (256, 512, 512),
    (300, 67, 101),
    (4096, 24, 1000),
    (256, 8192, 8192),
)


def layer_norm_linear_launches(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    *,
    tf32: bool,
    training: bool,
    input_dtype: torch.dtype | None = None,
) -> list[Launch]:
    """The launches of LayerNorm, Linear and ReLU, forward and backward, without the vendor's products.

    ``input_dtype`` is float32 under autocast.
    """
    from fusedres.kernels import tiling
    from fusedres.kernels.layer_norm import ColumnSums, layer_norm_bwd, layer_norm_fwd
    from fusedres.kernels.layer_norm_linear import layer_norm_linear_fwd, relu_bias_bwd

    x, normalised = torch.empty(M, K, dtype=input_dtype or dtype), torch.empty(M, K, dtype=dtype)
    y, weight = torch.empty(M, N, dtype=dtype), torch.empty(N, K, dtype=dtype)
    bias, vector, stats = torch.empty(N, dtype=dtype), torch.empty(K), torch.empty(2, M) if training else None
    with recorded_launches() as launches:
        tensor_cores = dtype.itemsize == 2 or tf32
        if tiling.fuses_layer_norm_linear(M, N, K, tensor_cores):
            config = tiling.layer_norm_linear(M, N, K, x.itemsize, dtype.itemsize, tensor_cores, SMS)
            layer_norm_linear_fwd(x, vector, vector, weight, bias, stats, config, 1e-5, "relu", tf32, y)
        else:
            layer_norm_fwd(x, None, vector, vector, stats, 1e-5, None, normalised)
        if stats is not None:
            relu_bias_bwd(y, y, y, bias)
            layer_norm_bwd(normalised, x, stats, vector, vector, None, x, normalised, ColumnSums(vector, vector, None))
    return launches


def linear_layer_norm_launches(
    M: int, N: int, K: int, dtype: torch.dtype, *, tf32: bool, training: bool
) -> list[Launch]:
    """The launches of Linear, LayerNorm, ReLU and the skip, forward and backward, without the vendor's products."""
    from fusedres.kernels import tiling
    from fusedres.kernels.layer_norm import ColumnSums, layer_norm_bwd, layer_norm_fwd
    from fusedres.kernels.layer_norm_linear import linear_layer_norm_fwd

    x, y, weight = (torch.empty(shape, dtype=dtype) for shape in ((M, K), (M, N), (N, K)))
    bias, vector, stats = torch.empty(N, dtype=dtype), torch.empty(N), torch.empty(2, M) if training else None
    product = y if training else None
    with recorded_launches() as launches:
        if tiling.fuses_linear_layer_norm(M, N, K, dtype.itemsize, dtype.itemsize == 2 or tf32, SMS):
            config = tiling.linear_layer_norm(M, N, K, dtype.itemsize, SMS)
            linear_layer_norm_fwd(x, weight, bias, vector, vector, y, product, stats, config, 1e-5, "relu", tf32, y)
        else:
            layer_norm_fwd(y, y, vector, vector, stats, 1e-5, "relu", y)
        if stats is not None:
            sums = ColumnSums(vector, vector, bias if N <= tiling.MAX_SUMMED else None)
            layer_norm_bwd(y, y, stats, vector, vector, "relu", y, None, sums)
    return launches


@dataclass(frozen=True)
class Name:
    """What tells a launch from the others of its kernel: the label names what differs between them."""

    kernel: str
    label: str
    blocks: tuple[int, ...]
    dtype: str
    layout: str


@functools.cache
def named_launches(warp_size: int, dtypes: tuple[str, ...] = DTYPES) -> dict[Name, Launch]:
    """Every distinct launch of the layers above. A name is the same whichever ``dtypes`` are asked for."""
    seen: dict[tuple[str, str], set[_Trait]] = {}
    for launch in {launch for size in WARP_SIZES for launch in _distinct(size, DTYPES)}:
        for name, trait in _traits(launch).items():
            seen.setdefault((launch.name, name), set()).add(trait)
    names = {}
    for launch in _distinct(warp_size, dtypes):
        told = [trait.text(seen[launch.name, name]) for name, trait in _traits(launch).items()]
        layout = {True: "channels-last", False: "NCHW"}.get(launch.constants.get("CHANNELS_LAST", ""), "rows")
        blocks = tuple(value for name, value in launch.constexprs if name.startswith("BLOCK_"))
        label = ", ".join(filter(None, told)) or "plain"
        names[Name(launch.name, label, blocks, LONG[_first(launch)], layout)] = launch
    return names


class _Trait(NamedTuple):
    """One thing to say of a launch; two ways to say it, both empty for what it does without."""

    plain: str
    absolute: str
    relative: str  # to the type of the first tensor

    def text(self, seen: set[_Trait]) -> str:
        """Nothing where all launches of the kernel are alike, or where that follows from their first tensor's type."""
        ways = {trait.absolute for trait in seen}, {trait.relative for trait in seen}
        if min(map(len, ways)) == 1:
            return ""
        if min(len(way - {""}) for way in ways) == 1:
            return self.plain if self.absolute else ""
        return self.relative


def _first(launch: Launch) -> str:
    return next(iter(launch.tensors.values()))


def _traits(launch: Launch) -> dict[str, _Trait]:
    """What there is to say of a launch beside its blocks, dtype and layout."""
    traits = {}
    for name, kind in launch.signature:
        value, plain = launch.constants.get(name), name.removesuffix("_ptr").lower().replace("_", " ")
        if name.startswith("BLOCK_") or name == "CHANNELS_LAST":
            continue
        if isinstance(kind, tuple):
            given = " ".join(dict.fromkeys(member.removeprefix("*") for member in kind if member != "constexpr"))
            traits[name] = _Trait(plain, *(2 * (f"{plain} {given}" if given else "",)))
        elif kind != "constexpr":
            typed = f"{plain} {kind.removeprefix('*')}"
            traits[name] = _Trait(plain, typed, plain if kind == _first(launch) else typed)
        elif value is None or value is False:
            traits[name] = _Trait(plain, "", "")
        else:
            text = plain if value is True else f"{plain} {value}"
            traits[name] = _Trait(text, text, text)
    for text in (f"{launch.num_warps} warps", f"{launch.num_stages} stages"):
        traits[text.split()[1]] = _Trait(text, text, text)
    return traits


@functools.cache
def _distinct(warp_size: int, dtypes: tuple[str, ...]) -> list[Launch]:
    with mock.patch("fusedres.kernels.layer_norm.warp_size", lambda device: warp_size):
        layers = _layers([getattr(torch, name) for name in dtypes])
        return list(dict.fromkeys(launch for launches in layers for launch in launches))


def _layers(dtypes: Sequence[torch.dtype]) -> Iterator[list[Launch]]:
    """The launches of every layer of the report."""
    modes = (True, False)
    yield from batch_norm_layers(dtypes)
    for (M, N, K), dtype, training in product(LINEAR_SHAPES, dtypes, modes):
        for layer in (layer_norm_linear_launches, linear_layer_norm_launches):
            for tf32 in (True, False) if dtype == torch.float32 else (False,):
                yield layer(M, N, K, dtype, tf32=tf32, training=training)
        if dtype != torch.float32:
            yield layer_norm_linear_launches(
                M, N, K, dtype, tf32=False, training=training, input_dtype=torch.float32
            )  # fmt: skip
