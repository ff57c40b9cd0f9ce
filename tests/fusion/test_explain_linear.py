"""What explain says of LayerNorm and Linear."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres
from fusedres.fusion import region
from tests import zoo
from tests.fusion.linear_parts import LINEAR_LN, LN_LINEAR, block_of
from tests.zoo import counts


def test_reasons_name_the_variant(monkeypatch):
    monkeypatch.setenv("FUSEDRES_BACKEND", "auto")
    model = nn.ModuleDict(
        {
            name: block_of(forward).float()
            for name, forward in {
                "act": lambda self, x: self.relu(self.ln(self.fc(x))),
                "add": lambda self, x: self.relu(self.ln(self.fc(x))) + x,
                "plain": lambda self, x: F.gelu(self.ln(self.fc(x))),
                "plain_add": lambda self, x: self.ln(self.fc(x)) + x,
                "first": lambda self, x: self.relu(self.fc(self.ln(x))),
                "end": lambda self, x: self.fc(self.ln(x)),
            }.items()
        }
    )
    found = {row["module"]: (row["pattern"], row["reason"].split("; ")[-1]) for row in fusedres.explain(model).rows}
    path = "" if fusedres.explain(model["act"]).rows[0]["path"] == "triton" else found["act.ln"][1]
    assert found == {
        "act.ln": (LINEAR_LN, path),
        "add.ln": (LINEAR_LN, "with the addition"),
        "plain.ln": (LINEAR_LN, "no ReLU: followed by gelu"),
        "plain_add.ln": (LINEAR_LN, "no ReLU, with the addition"),
        "first.ln": (LN_LINEAR, path),
        "end.ln": (LN_LINEAR, "no ReLU: followed by the end of its network"),
    }


def test_rows_of_functions_are_their_blocks():
    model = nn.Sequential(zoo.FunctionalMLPBlock(4, 4), nn.ReLU(), zoo.FunctionalMLPBlock(4, 2))
    assert [(row["module"], row["pattern"]) for row in fusedres.explain(model).rows] == [
        ("0", LINEAR_LN), ("2", LINEAR_LN)
    ]  # fmt: skip
    assert [row["module"] for row in fusedres.explain(zoo.FunctionalMLPBlock(4, 4)).rows] == [""]


def test_user_built_modules_are_reported_as_they_are():
    model = nn.Sequential(
        fusedres.nn.LayerNormLinear(8, 8), fusedres.nn.LinearLayerNorm(8, 8), fusedres.nn.ResidualMLPBlock(8)
    ).double()
    before = [type(module) for module in model.modules()]
    for _ in range(2):
        found = [(row["module"], row["pattern"]) for row in fusedres.explain(model).rows]
        assert found == [("0.norm", LN_LINEAR), ("1.norm", LINEAR_LN), ("2.norm", LINEAR_LN)]
        fusedres.fuse(model)
    assert [type(module) for module in model.modules()] == before


def test_blocks_that_cannot_be_traced_are_reported():
    class Branching(zoo.MLPBlock):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    class BranchingFunctions(zoo.FunctionalMLPBlock):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return self.attention(x, x, x)[0] if x.sum() > 0 else x

    model = nn.ModuleDict({"a": Branching(8, 8), "b": BranchingFunctions(8, 8), "c": Attention()})
    found = fusedres.explain(model).rows
    assert [(row["module"], row["pattern"], row["path"]) for row in found] == [
        ("a.ln", "ln", "eager"), ("b", "ln", "eager")
    ]  # fmt: skip
    assert all("cannot be traced" in row["reason"] for row in found)


def test_only_models_that_may_hold_a_pattern_are_traced(monkeypatch):
    traced: list[str] = []

    def record(root: nn.Module, *args: Any) -> Any:
        traced.append(type(root).__name__)
        return trace(root, *args)

    trace = region.trace
    monkeypatch.setattr(region, "trace", record)
    model = nn.ModuleDict(
        {
            "linears": nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
            "convolutions": nn.Sequential(zoo.conv(3, 3), nn.ReLU()),
            "functional": zoo.FunctionalMLPBlock(8, 8),
            "excite": zoo.MLPBlock(8, 8),
        }
    )
    assert counts(model) == {LINEAR_LN: 2}
    assert set(traced) == {"FunctionalMLPBlock", "MLPBlock"}


def test_rows_too_long_for_a_kernel(monkeypatch):
    monkeypatch.setenv("FUSEDRES_BACKEND", "auto")
    with torch.device("meta"):
        model = nn.Sequential(nn.LayerNorm(2**20), nn.Linear(2**20, 4))
    monkeypatch.setattr(sys.modules["fusedres.fusion.explain"], "refusal", lambda device, dtype: None)
    row = fusedres.explain(model).rows[0]
    assert (row["pattern"], row["path"]) == (LN_LINEAR, "reference")
    assert "no kernel normalises over more than" in row["reason"]
