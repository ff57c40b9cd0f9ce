"""Real code for every named architecture, generated without a GPU: spills, access widths, ordering."""

from __future__ import annotations

import functools
import re
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch

import fusedres
from benchmarks.instruments import limits
from benchmarks.instruments.codegen import TARGETS, Launch, compile_launch, recorded_launches
from benchmarks.instruments.launches import Name, named_launches
from benchmarks.instruments.launches_batch_norm import batch_norm_launches, training_step_launches
from benchmarks.results import Row
from benchmarks.suites.codegen import Case, measure
from fusedres.kernels import tiling
from fusedres.norm import Norm
from tests.kernels.compiled import compiled

pytestmark = pytest.mark.codegen
KERNELS = {
    name
    for path in (Path(__file__).parents[2] / "fusedres" / "kernels").glob("*.py")
    for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
}
DTYPES = {
    "sm_80": ["float16"],
    "sm_89": ["bfloat16"],
    "sm_90": ["bfloat16", "float32"],
    "sm_100": ["bfloat16"],
    "gfx942": ["bfloat16"],
}
# Kernels whose programs hand results to one another, and those with matrix instructions: what architectures and dtypes
# do differently beside the number of registers.
TELLING = {name for name in KERNELS if re.search(r"stats|reduce|relu_bias|linear", name)}


def rows(arch: str, dtype: str, most: int | None = None) -> list[Row]:
    """The rows of the code suite; of the launches ``covering`` leaves where there is a ``most``."""
    launches = named_launches(TARGETS[arch].warp_size, (dtype,))
    names = launches if most is None else covering(launches, most)
    return [
        row
        for name in names
        if most != 1 or name.kernel in TELLING
        for row in measure(Case(name.kernel, name.label, arch, name.blocks, name.dtype, name.layout))
    ]


def covering(launches: dict[Name, Launch], most: int) -> list[Name]:
    """Launches that give every constant of a kernel each of its values, and every argument its types; chosen greedily.

    At most ``most`` of a kernel.
    """
    traits = {
        name: {(name.kernel, *pair) for pair in (*launch.constexprs, *launch.signature, ("warps", launch.num_warps))}
        for name, launch in launches.items()
    }
    missing, chosen = set().union(*traits.values()), []
    while missing:
        best = max(launches, key=lambda name: len(traits[name] & missing))
        missing -= traits[best]
        if sum(name.kernel == best.kernel for name in chosen) < most:
            chosen.append(best)
    return chosen


def check(found: list[Row], kernels: set[str]) -> None:
    assert {row.workload for row in found} == kernels
    assert len({row.key for row in found}) == len(found), "a launch without a name of its own"
    assert [(row.key, row.note) for row in found if row.status != "ok"] == []
    for row in found:
        figures = {name: value or 0 for name, value in row.figures.items()}
        assert figures["bytes_in_flight"] > 0, row
        assert 0 < figures["occupancy"] <= 1, row


@pytest.mark.floor
def test_every_kernel() -> None:
    check(compiled(rows, "sm_90", "bfloat16", 8), KERNELS)


@pytest.mark.parametrize(("arch", "dtype"), [("sm_80", "float16"), ("sm_90", "float32"), ("gfx942", "bfloat16")])
def test_telling_kernels(arch: str, dtype: str) -> None:
    check(compiled(rows, arch, dtype, 1), TELLING)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype"), [(arch, dtype) for arch, dtypes in DTYPES.items() for dtype in dtypes])
def test_every_launch(arch: str, dtype: str) -> None:
    check(compiled(rows, arch, dtype), KERNELS)


def forget_tilings() -> None:
    for function in vars(tiling).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def complaints(planted: tuple[str, object] | None) -> list[str]:
    """What is wrong with the code of a layer while a function of ``tiling`` returns always the same."""
    layer = functools.partial(batch_norm_launches, channels_last=True, residual=True, training=True)
    with mock.patch.object(tiling, planted[0], lambda *_: planted[1]) if planted else nullcontext():
        forget_tilings()
        found = layer((8, 64, 56, 56), torch.bfloat16)
    forget_tilings()
    return [text for launch in found for text in limits.complaints(launch, "sm_90", compile_launch(launch, "sm_90"))]


@pytest.mark.parametrize(
    ("planted", "complaint"),
    [
        (None, None),
        (("_num_warps", 1), "spills"),  # 128 elements a thread
        (("_tile", (2048, 2)), "stores of 128 bits"),  # two channels side by side
        (("_tile", (8, 8)), "bytes in flight"),  # two elements a thread
    ],
)
def test_planted_faults_are_refused(planted: tuple[str, object] | None, complaint: str | None) -> None:
    found = compiled(complaints, planted)
    assert any(complaint in text for text in found) if complaint else found == []


def variants(batch: int) -> tuple[int, int]:
    """Launches of a training step of a ResNet-50, and how many of them differ."""
    model = fusedres.fuse(fusedres.models.resnet50())
    launches = training_step_launches(model, (batch, 3, 224, 224), torch.bfloat16)
    return len(launches), len(set(launches))


@pytest.mark.parametrize(("batch", "most"), [(32, 16), (1, 30)])
def test_variants_of_a_resnet50_step(batch: int, most: int) -> None:
    """Every variant is compiled at its first launch: few of them make a short cold start."""
    launches, different = compiled(variants, batch)
    assert 2 * 49 <= launches < 4 * 53
    assert different <= most


def merges() -> list[int]:
    from fusedres.kernels.sync_batch_norm import merge

    vector = torch.empty(64)
    norm = Norm(vector, vector, vector, vector, training=True, num_batches_tracked=torch.tensor(0))
    with recorded_launches() as launches:
        for ranks in (2, 8, 64):
            merge(torch.empty(ranks, 129), norm)
    return [len(launches), len(set(launches))]


def test_the_number_of_ranks_makes_no_variant() -> None:
    assert compiled(merges) == [3, 1]
