"""The bytes that explain predicts, and that asking changes nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres
from fusedres import models
from tests import zoo
from tests.fusion import linear_parts
from tests.fusion.blocks import block_of

SHAPE = (2, 8, 4, 4)
ELEMENTS = 2 * 8 * 4 * 4


class Block(nn.Module):
    """A BatchNorm with what ``forward`` puts around it."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)


def block_with(forward: Any) -> Any:
    return block_of(forward, Block).float()


FORWARDS: dict[str, Any] = {
    "bn": lambda self, x: self.bn(x),
    "bn_act": lambda self, x: F.relu(self.bn(x)),
    "bn_add": lambda self, x: self.bn(self.conv(x)) + x,
    "bn_add_act": lambda self, x: F.relu(self.bn(self.conv(x)) + x),
    "add_bn_act": lambda self, x: F.relu(self.bn(self.conv(x) + x)),
}
# pattern -> passes that are saved in training and in inference, and bits an element that are not
SAVED = {"bn": (0, 0, 0), "bn_act": (5, 2, 0), "bn_add": (2, 2, 0), "bn_add_act": (6, 4, 2), "add_bn_act": (8, 3, 0)}


def saved(model: nn.Module, input: Any = SHAPE) -> dict[str, Any]:
    """Of each layer, over all its calls."""
    sums: dict[str, Any] = {}
    for row in fusedres.explain(model, input=input).rows:
        sums[row["module"]] = sums.get(row["module"], 0) + row["bytes_saved"]
    return sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", FORWARDS)
def test_passes(pattern, dtype):
    model = block_with(FORWARDS[pattern]).to(dtype)
    [row] = fusedres.explain(model).rows
    assert (row["pattern"], row["bytes_saved"]) == (pattern, None)
    training, inference, bits = SAVED[pattern]
    for _ in range(2):
        assert saved(model) == {"bn": training * ELEMENTS * dtype.itemsize - bits * ELEMENTS // 8}
        assert saved(model.eval()) == {"bn": inference * ELEMENTS * dtype.itemsize}
        fusedres.fuse(model.train())


def test_ways_to_give_an_input():
    model = block_with(FORWARDS["bn_add_act"])
    x = torch.randn(SHAPE)
    expected = saved(model)
    for input in (list(SHAPE), torch.Size(SHAPE), x, x.to("meta"), (x,), [SHAPE], {"x": x}, {"x": SHAPE}):
        assert saved(model, input) == expected, input
    assert saved(model, (4, *SHAPE[1:]))["bn"] == 2 * expected["bn"]
    assert saved(model.to("meta")) == expected
    for wrong in (3, "2x3"):
        with pytest.raises(TypeError, match="input must be a shape"):
            fusedres.explain(model, input=wrong)
    with pytest.raises(RuntimeError, match="channels"):
        fusedres.explain(block_with(FORWARDS["bn_add_act"]), input=(2, 3, 4, 4))


def test_networks():
    shape = (2, 3, 32, 32)
    for model in (zoo.resnet(small_input=False).float(), models.PreActResNet(models.PreActBasicBlock, [1, 2], width=8)):
        explanation = fusedres.explain(model, input=shape)
        assert all(row["bytes_saved"] > 0 for row in explanation.rows if "act" in row["pattern"])
        assert explanation.bytes_saved == sum(row["bytes_saved"] for row in explanation.rows)
        assert fusedres.explain(fusedres.fuse(model), input=shape).rows == explanation.rows


class Noisy(nn.Module):
    """A forward with every effect that explain must not leave behind."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.drop, self.calls, self.log = zoo.ResBlock(8, 8), nn.Dropout(), 0, []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(x)
        self.count = self.count + random.random()
        print("called")
        return self.drop(self.block(x)) + torch.rand(())


def test_nothing_changes(capsys):
    model = Noisy()
    hooked: list[str] = []
    model.block.conv1.register_forward_hook(lambda *args: hooked.append("forward"))
    model.register_forward_pre_hook(lambda *args: hooked.append("before"))
    for _ in range(2):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        before = [dict(vars(module)) for module in model.modules()]
        hooks = [dict(module._forward_hooks) for module in model.modules()]
        types, states = [type(m) for m in model.modules()], (torch.get_rng_state(), random.getstate())
        assert all(value is not None for value in saved(model).values())
        assert [dict(vars(module)) for module in model.modules()] == before
        assert [dict(module._forward_hooks) for module in model.modules()] == hooks
        assert [type(m) for m in model.modules()] == types
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert (model.log, hooked) == ([], [])
        assert capsys.readouterr().out == ""
        fusedres.fuse(model)


def test_a_forward_that_fails_leaves_nothing_behind():
    model = nn.Sequential(Noisy(), nn.Linear(3, 3))
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(RuntimeError):
        fusedres.explain(model, input=SHAPE)
    assert [dict(vars(module)) for module in model.modules()] == before
    assert not torch._C._is_torch_function_mode_enabled()


def test_where_values_decide():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = block_with(FORWARDS["bn_act"]), block_with(FORWARDS["bn_act"])

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.second(x) if x.sum() > 0 else x

    explanation = fusedres.explain(Branching(), input=SHAPE)
    assert [row["bytes_saved"] for row in explanation.rows] == [5 * ELEMENTS * 4, None]
    assert "DataDependent" in explanation.note
    assert "?" in str(explanation)
    assert f"not known for 1 rows: {explanation.note}" in str(explanation)


def test_calls_are_counted():
    norm_twice = zoo.HandBlock(8, 8)
    norm_twice.loud = False
    rows = fusedres.explain(norm_twice, input=SHAPE).rows
    assert [row["bytes_saved"] for row in rows] == [5 * ELEMENTS * 4, 6 * ELEMENTS * 4 - ELEMENTS // 4]
    block = block_with(FORWARDS["bn_act"])
    assert saved(nn.Sequential(block, block)) == {"0.bn": 2 * saved(block)["bn"]}
    two_sizes = nn.Sequential(block, nn.AvgPool2d(2), block)
    assert saved(two_sizes) == {"0.bn": saved(block)["bn"] * 5 // 4}


def test_what_no_kernel_covers_saves_nothing():
    assert saved(block_with(FORWARDS["bn_act"]).double()) == {"bn": 0}
    assert saved(nn.Sequential(nn.SyncBatchNorm(8), nn.ReLU()).eval()) == {"0": 0}
    long = nn.Sequential(nn.LayerNorm(2**14), nn.Linear(2**14, 1))
    assert saved(long, (2, 2**14)) == {"0": 0}


def test_frozen_statistics_and_autocast():
    model = block_with(FORWARDS["bn_act"])
    model.bn.eval()
    assert saved(model) == {"bn": 2 * ELEMENTS * 4}
    behind = block_with(lambda self, x: F.relu(self.bn(self.conv(x))))
    with torch.autocast("cpu", torch.bfloat16):
        assert saved(behind) == {"bn": 5 * ELEMENTS * 2}
    assert saved(behind) == {"bn": 5 * ELEMENTS * 4}


M, N = 6, 16  # block_of has Linears of 16 to 16
LINEAR: dict[str, tuple[Any, int, int]] = {
    "linear_ln_act": (lambda self, x: self.relu(self.ln(self.fc(x))), 9, 4),
    "with addition": (lambda self, x: self.relu(self.ln(self.fc(x))) + x, 11, 6),
    "without relu": (lambda self, x: F.gelu(self.ln(self.fc(x))), 4, 2),
    "ln_linear_act": (lambda self, x: self.relu(self.fc(self.ln(x))), 6, 4),
    "at the end": (lambda self, x: self.fc(self.ln(x)), 3, 2),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_layers(name):
    forward, training, inference = LINEAR[name]
    model = linear_parts.block_of(forward).float()
    features = model.fc.in_features
    passes = M * features * 4
    assert saved(model, (M, features)) == {"ln": training * passes}
    assert saved(model.eval(), (M, features)) == {"ln": inference * passes}
    assert saved(fusedres.fuse(model), (M, features)) == {"ln": inference * passes}


def test_functional_forms_and_modules_of_ours_are_predicted_alike():
    functions, modules = zoo.FunctionalMLPBlock(8, 4), zoo.MLPBlock(8, 4)
    assert saved(functions, (M, 8)) == {"": saved(modules, (M, 8))["ln"]}
    assert saved(fusedres.nn.LinearLayerNorm(8, 4), (M, 8)) == {"norm": 9 * M * 4 * 4}
    assert saved(fusedres.nn.LayerNormLinear(8, 4, act=None), (M, 8)) == {"norm": 3 * M * 8 * 4}
    assert saved(fusedres.nn.ResidualMLPBlock(8), (M, 8)) == {"norm": 11 * M * 8 * 4}


def test_compiled_scripted_and_wrapped_models():
    inner = nn.Sequential(block_with(FORWARDS["bn_act"]), torch.jit.script(zoo.conv(8, 8)))
    expected = saved(inner)
    assert set(expected) == {"0.bn"}
    assert expected["0.bn"]
    assert saved(nn.DataParallel(inner)) == {"module.0.bn": expected["0.bn"]}
    compiled = torch.compile(block_with(FORWARDS["bn_act"]), backend="eager")
    assert set(saved(compiled).values()) <= {0}
    inner.compile(backend="eager")
    assert set(saved(inner).values()) <= {0}


def test_table_has_a_total():
    text = str(fusedres.explain(block_with(FORWARDS["bn_act"]), input=SHAPE))
    lines = text.splitlines()
    assert lines[0].split() == ["module", "pattern", "path", "bytes_saved", "reason"]
    assert lines[2].split() == ["total", f"{5 * ELEMENTS * 4:,}"]
    assert lines[3].startswith("bytes_saved: predicted, for one training step")
    assert text.isascii()
