"""Code generated for the kernels between which ranks exchange messages: no spills, ordered, few variants."""

from __future__ import annotations

import json

import pytest

from tests.test_codegen import DTYPES, run_compiled

pytestmark = [pytest.mark.codegen, pytest.mark.floor]
PROGRAM = """
import json, sys
from dataclasses import asdict
import torch
from benchmarks.instruments.codegen import compile_launch, recorded_launches
from fusedres.kernels import sync_batch_norm as sync

arch, dtypes = sys.argv[1], [getattr(torch, name) for name in sys.argv[2:]]
vector, count = torch.empty(64), torch.tensor(0)
with recorded_launches() as launches:
    for dtype in dtypes:
        for layout in (torch.channels_last, torch.contiguous_format):
            x = torch.empty((8, 64, 56, 56), dtype=dtype).contiguous(memory_format=layout)
            for residual in (None, x):
                sync.moments(x, residual)
    for ranks in (8, 64):
        sync.merge(torch.empty(ranks, 129), vector, vector, vector, vector, count, 0.1, 1e-5)
for launch in dict.fromkeys(launches):
    code = asdict(compile_launch(launch, arch))
    print(json.dumps({"kernel": launch.name, "widest": max(map(int, code["loads"])), **code}))
"""


@pytest.mark.parametrize("arch", DTYPES)
def test_generated_code(arch):
    rows = [json.loads(line) for line in run_compiled(["-c", PROGRAM, arch, *DTYPES[arch]]).splitlines()]
    merges = [row for row in rows if row["kernel"] == "_batch_norm_merge_kernel"]
    assert len(merges) == 1, "the number of ranks makes no variant"
    assert {row["kernel"] for row in rows if row not in merges} == {"_batch_norm_fwd_stats_kernel"}
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert row["registers"] <= 128 or arch.startswith("gfx"), row
        assert row["fenced"] is True, row
        assert row["widest"] == 128 or row in merges or arch.startswith("gfx"), row  # 4 elements a thread there
