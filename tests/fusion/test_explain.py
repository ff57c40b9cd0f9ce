from __future__ import annotations

import pytest
import torch
from torch import nn

import fusedres
from fusedres import models
from tests import zoo
from tests.zoo import counts, small


def rows_of(model: nn.Module) -> dict[str, dict[str, str]]:
    return {row["module"]: row for row in fusedres.explain(model).rows}


def test_rows_before_and_after_are_the_same():
    model = models.resnet34(width=4)
    before = fusedres.explain(model).rows
    assert counts(model) == {
        "bn_act_maxpool": 1, "bn_act": 16, "bn_add_act": 12, "bn_add_bn_act": 3, "bn_add_act_avgpool": 1,
    }  # fmt: skip
    assert all(set(row) == {"module", "pattern", "path", "reason", "bytes_saved"} for row in before)
    joined = [row["reason"].split("; ") for row in before if row["pattern"] == "bn_add_bn_act"]
    partners = {reason.removeprefix("with ") for reasons in joined for reason in reasons if "layer" in reason}
    assert {row["module"] for row in before} | partners == {
        name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)
    }
    assert fusedres.explain(fusedres.fuse(model)).rows == before


def test_explain_changes_nothing():
    model = small()
    types, attributes = [type(m) for m in model.modules()], [dict(vars(m)) for m in model.modules()]
    fusedres.explain(model)
    assert [type(m) for m in model.modules()] == types
    assert [dict(vars(m)) for m in model.modules()] == attributes
    fusedres.fuse(model)
    types = [type(m) for m in model.modules()]
    fusedres.explain(model)
    assert [type(m) for m in model.modules()] == types


def test_table_is_plain_aligned_text():
    text = str(fusedres.explain(small()))
    assert repr(fusedres.explain(small())) == text
    lines = text.splitlines()
    assert lines[0].split() == ["module", "pattern", "path", "reason"]
    assert len(lines) == 11  # two of 12 rows are those of joins
    start = lines[0].index("pattern")
    assert all(line[start - 2 : start] == "  " and line[start] != " " for line in lines)
    assert text.isascii()


def test_nothing_to_fuse():
    assert fusedres.explain(nn.Linear(2, 2)).rows == []
    assert str(fusedres.explain(nn.Linear(2, 2))) == "module  pattern  path  reason"


def test_path_and_reason(monkeypatch):
    monkeypatch.setenv("FUSEDRES_BACKEND", "reference")
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Dropout())
    assert [tuple(row.values()) for row in fusedres.explain(model).rows] == [
        ("0", "bn_act", "reference", "FUSEDRES_BACKEND=reference", None),
        ("2", "bn", "reference", "FUSEDRES_BACKEND=reference; followed by 3", None),
    ]
    monkeypatch.setenv("FUSEDRES_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        fusedres.explain(model)


def test_double_precision_takes_the_reference(monkeypatch):
    monkeypatch.setenv("FUSEDRES_BACKEND", "auto")
    rows = fusedres.explain(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()).double()).rows
    assert rows[0]["path"] == "reference"
    assert "kernel" in rows[0]["reason"]


def test_what_no_kernel_covers_raises_where_kernels_are_asked_for(monkeypatch):
    monkeypatch.setenv("FUSEDRES_BACKEND", "triton")
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm3d(4)).double()
    assert [row["path"] for row in fusedres.explain(model).rows] == ["raises", "eager"]
    with pytest.raises(RuntimeError, match=fusedres.explain(model).rows[0]["reason"]):
        fusedres.fuse(model)(torch.randn(2, 4, 3, 3, dtype=torch.float64))


def test_norms_that_are_not_taken_over_are_eager():
    model = nn.Sequential(nn.SyncBatchNorm(4), nn.ReLU(), nn.BatchNorm3d(4), nn.BatchNorm2d(4, affine=False), nn.ReLU())
    rows = rows_of(model)
    assert [rows[name]["path"] for name in ("0", "2")] == ["eager", "eager"]
    assert "SyncBatchNorm" in rows["0"]["reason"]
    assert rows["3"]["pattern"] == "bn_act"


def test_untraceable_block_names_itself_and_its_reason():
    class Branching(zoo.ResBlock):
        def forward(self, x):
            return super().forward(x) if x.mean() > 0 else x

    rows = rows_of(nn.Sequential(Branching(4, 4), zoo.ResBlock(4, 4)))
    assert rows["0.batch_norm1"]["pattern"] == "bn"
    assert rows["0.batch_norm1"]["reason"].endswith("0: forward cannot be traced: TraceError: " + TRACE_ERROR)
    assert rows["1.batch_norm1"]["pattern"] == "bn_act"


TRACE_ERROR = "symbolically traced variables cannot be used as inputs to control flow"


def test_norms_without_calls_have_no_row():
    block = zoo.HandBlock(4, 4)  # its batch_norm1 is never called
    rows = fusedres.explain(block).rows
    assert [(row["module"], row["pattern"]) for row in rows] == [
        ("batch_norm2", "bn_act"),
        ("batch_norm2", "bn_add_act"),
    ]
    assert type(fusedres.fuse(block).batch_norm1) is fusedres.nn.BatchNormAct2d


def test_norms_in_containers_without_a_forward():
    rows = fusedres.explain(nn.ModuleList([nn.BatchNorm2d(2)])).rows
    assert [(row["module"], row["pattern"], row["reason"].split("; ")[-1]) for row in rows] == [
        ("0", "bn", "no forward around it")
    ]


def test_modules_are_named_from_the_root_once():
    block = zoo.ResBlock(4, 4)
    model = nn.ModuleDict({"one": block, "two": nn.Sequential(block)})
    assert {row["module"] for row in fusedres.explain(model).rows} == {"one.batch_norm1", "one.batch_norm2"}


def test_user_built_modules_are_reported_as_they_are_called():
    model = nn.Sequential(
        fusedres.nn.BasicBlock(4, 4), fusedres.nn.BatchNormAct2d(4), fusedres.nn.BatchNormAct2d(4, act=None), nn.ReLU()
    )
    expected = {"0.bn1": "bn_act", "0.bn2": "bn_add_act", "1": "bn_act", "2": "bn_act"}
    assert {name: row["pattern"] for name, row in rows_of(model).items()} == expected
    fusedres.fuse(model)
    assert {name: row["pattern"] for name, row in rows_of(model).items()} == expected
    assert {name: row["pattern"] for name, row in rows_of(fusedres.unfuse(model)).items()} == expected


def test_what_changed_since_is_said():
    model = fusedres.fuse(small())
    model.get_submodule("layer1.0").relu = nn.GELU()  # pyright: ignore[reportAttributeAccessIssue]
    rows = rows_of(model)
    assert rows["layer1.0.bn1"]["pattern"] == "bn"
    assert rows["layer2.0.bn1"]["pattern"] == "bn_act"


def test_meta_and_buffer_free_norms():
    with torch.device("meta"):
        model = nn.Sequential(nn.BatchNorm2d(4, affine=False, track_running_stats=False), nn.ReLU())
    assert counts(fusedres.fuse(model)) == {"bn_act": 1}
