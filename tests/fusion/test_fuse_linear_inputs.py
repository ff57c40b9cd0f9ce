"""Fused LayerNorm and Linear on unusual inputs: dtypes, autocast, shapes that broadcast or do not fit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import fusedres
from tests.fusion.linear_parts import (
    LINEAR_LN,
    LN_LINEAR,
    Parts,
    assert_same_outcome,
    assert_same_runs,
    block_of,
    randomised,
    rows,
)
from tests.zoo import TOLERANCE, counts

# Whose results in short dtypes are eager's to the last bit.
pytestmark = pytest.mark.usefixtures("reference_backend")


def test_broadcasting_and_promoting_additions_are_eagers():
    class Block(Parts):
        def forward(self, x, y):
            return torch.relu(self.ln(self.fc(x))) + y

    class InPlace(Parts):
        def forward(self, x, y):
            out = self.ln(self.fc(x))
            out += y
            return out

    for kind in (Block, InPlace):
        block = randomised(kind())
        reference, x = copy.deepcopy(block), rows(3, 8)
        assert counts(fusedres.fuse(block)) == {LINEAR_LN: 1}
        assert "with the addition" in fusedres.explain(block).rows[0]["reason"]
        integers = torch.ones(3, 8, dtype=torch.int64)
        for y in (rows(3, 8), rows(8), rows(1, 1), rows(3, 8).float(), integers, 1.5):
            ours, its = block(x, y), reference(x, y)
            assert ours.dtype == its.dtype
            torch.testing.assert_close(ours, its, **TOLERANCE)
        for y in (rows(2, 3, 8), rows(3, 8).to(torch.complex128), None):
            assert_same_outcome(
                lambda y=y, x=x, block=block: block(x, y), lambda y=y, x=x, reference=reference: reference(x, y)
            )


def test_in_place_addition_keeps_its_operands_dtype():
    class Block(Parts):
        def forward(self, x, y):
            out = self.ln(self.fc(x))
            out += y
            return out

    block = Block()
    reference = copy.deepcopy(block)
    fusedres.fuse(block)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                x, y = torch.randn(3, 8), torch.randn(3, 8, dtype=dtype)
                ours, its = block(x, y), reference(x, y)
                assert ours.dtype == its.dtype
                torch.testing.assert_close(ours, its)


FORWARDS = [
    lambda self, x: self.relu(self.ln(self.fc(x))),
    lambda self, x: self.relu(self.ln(self.fc(x))) + x,
    lambda self, x: self.relu(self.fc(self.ln(x))),
    lambda self, x: F.relu(F.layer_norm(F.linear(x, self.w, self.b), (8,), self.ln_w, self.ln_b)) + x,
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("forward", FORWARDS)
def test_autocast_gives_eagers_dtypes(forward, backend, dtype, monkeypatch):
    monkeypatch.setenv("FUSEDRES_BACKEND", backend)
    model, x = block_of(forward).float(), rows().float()
    reference = copy.deepcopy(model)
    fusedres.fuse(model)
    with torch.autocast("cpu", dtype):
        ours, its = model(x), reference(x)
    assert ours.dtype == its.dtype
    if backend == "reference":
        torch.testing.assert_close(ours, its)


@pytest.mark.parametrize("autocast", [False, True])
def test_parameters_of_another_dtype_under_autocast_and_without(autocast):
    """What eager takes works, the rest raises its error."""
    for forward in FORWARDS[1:3]:
        for change in (lambda b: b.bfloat16(), lambda b: b.ln.bfloat16(), lambda b: b.fc.bfloat16()):
            block = block_of(forward).float()
            change(block)
            reference = copy.deepcopy(block)
            fusedres.fuse(block)
            for x in (torch.randn(3, 8), torch.randn(3, 8).bfloat16()):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    assert_same_outcome(
                        lambda x=x, block=block: block(x), lambda x=x, reference=reference: reference(x)
                    )


def test_wrong_inputs_raise_what_eager_raises():
    def narrow(self, x):
        return F.relu(self.fc(F.layer_norm(x, (4,))))

    for forward, x in (
        (lambda self, x: self.ln(self.fc(x)), rows(3, 4)),
        (lambda self, x: self.fc(self.ln(x)), rows(3, 4)),
        (lambda self, x: self.fc(self.ln(x)), rows(3, 8).float()),
        (narrow, rows(3, 8)),
    ):
        block = block_of(forward)
        reference = copy.deepcopy(block)
        fusedres.fuse(block)
        assert type(block).__mro__[1].__name__ == "FusedRegion"
        with pytest.raises(RuntimeError):
            reference(x)
        assert_same_outcome(lambda x=x, block=block: block(x), lambda x=x, reference=reference: reference(x))


def test_empty_batches_and_one_dimension():
    block = block_of(lambda self, x: self.relu(self.ln(self.fc(x))) + x)
    reference = copy.deepcopy(block)
    fusedres.fuse(block)
    for shape in ((0, 8), (8,), (1, 2, 3, 8)):
        assert_same_runs(block, reference, rows(*shape))


def test_dimensions_that_are_known_at_run_time():
    block = block_of(lambda self, x: self.relu(self.fc(F.layer_norm(x, x.shape[1:]))))
    reference = copy.deepcopy(block)
    assert counts(fusedres.fuse(block)) == {LN_LINEAR: 1}
    for shape in ((3, 8), (2, 3, 8)):  # normalised over the last dimension, and over the last two
        assert_same_runs(block, reference, rows(*shape))
