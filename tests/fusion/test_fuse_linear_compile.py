"""torch.compile, torch.export and torch.fx of fused models of LayerNorm and Linear."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fusedres
from fusedres.fusion import runtime
from tests.fusion.linear_parts import BUILDS, rows
from tests.zoo import TOLERANCE, assert_same_steps

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("build", BUILDS)
def test_one_graph_and_no_recompilation(build):
    model = fusedres.fuse(build())
    reference = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(rows()).square().mean().backward()
        optimizer.step()
    assert counter.frame_count == 1
    model.load_state_dict(reference.state_dict())
    assert_same_steps(model, reference, rows())


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("strict", [True, False])
def test_export(build, strict):
    model = fusedres.fuse(build()).eval()
    batch = {0: torch.export.Dim("batch", min=2)}
    with mock.patch.object(runtime, "_layer", side_effect=AssertionError("not fused")):
        exported = torch.export.export(model, (rows(3, 8),), strict=strict, dynamic_shapes=(batch,))
    x = rows(5, 8)
    torch.testing.assert_close(exported.module()(x), model(x), **TOLERANCE)


@pytest.mark.parametrize("build", BUILDS)
def test_symbolic_trace_of_a_fused_model(build):
    model, x = fusedres.fuse(build()).eval(), rows()
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x), **TOLERANCE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("build", BUILDS)
def test_torch_jit_trace(build):
    model, x = fusedres.fuse(build()).eval(), rows()
    torch.testing.assert_close(torch.jit.trace(model, (rows(),))(x), model(x), **TOLERANCE)
