"""What a trace must not do or miss: prints, effects, values baked in, contexts."""

from __future__ import annotations

import builtins
import copy
import logging
import random
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedres
from tests import zoo
from tests.fusion.blocks import block_of
from tests.zoo import assert_same_steps, conv, counts, images, randomise

SHIFT = torch.ones(1, dtype=torch.float64)
log = logging.getLogger(__name__)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.child = conv(4, 4), nn.BatchNorm2d(4), zoo.ResBlock(4, 4)
        self.seen: list[Any] = []
        self.calls = 0
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("steps", torch.zeros(1))
        self.table = {"key": 1}

    def a(self, x):
        return torch.relu(self.bn(self.conv(x)))


def printed(block: nn.Module, x: torch.Tensor, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    block(x)
    return capsys.readouterr().out.splitlines()


def prints_shapes(self, x):
    print("in", x.shape, x.size(), x.size(0), sep=" | ")
    out = self.bn(self.conv(x))
    print(f"{x.shape!s:>40}|{x.shape!s:<40}|{x.shape!r:^40}|")
    print(f"normalised {out.shape} {{literally}} {out.dim():>4} {x.shape!r} {out.size(1):05d}", end="!\n")
    out = out + x
    print("sum: " + str(out.shape), [out.shape, "x"], ("nested", f"{x.dtype}"))
    return torch.relu(out)


def prints_values(self, x):
    print(x.mean(), f"{x.mean().item():.3f}", "%s" % x.sum())  # noqa: UP031
    inner = self.conv(x)
    print(f"convolved: {inner.sum()}")
    out = torch.relu(self.bn(inner))
    print(f"{out.max()}|{out.max()!r}|{str(out.max())}")  # noqa: RUF010
    return out


@pytest.mark.parametrize("forward", [prints_shapes, prints_values])
def test_prints_are_kept_and_show_values_of_their_call(forward, capsys):
    block, x = block_of(forward, Parts).eval(), images(2, 4, 5, 5)
    before = printed(block, x, capsys)
    assert "print" not in counts(block)
    fusedres.fuse(block)
    assert capsys.readouterr().out == ""
    assert sum(counts(block).get(pattern, 0) for pattern in ("bn_act", "bn_add_act")) >= 2
    assert printed(block, x, capsys) == before
    other = images(3, 4, 7, 7)
    assert printed(block, other, capsys) == printed(fusedres.unfuse(block), other, capsys) != before


def prints_the_normalised(self, x):
    print("start")
    out = self.bn(self.conv(x))
    difference = out - x
    print("normalised mean", out.mean())
    print(f"difference {difference.abs().max()} and {out.shape}")
    print("shape", out.shape)
    return torch.relu(out + x)


def test_a_value_that_is_printed_is_computed(capsys):
    block, x = block_of(prints_the_normalised, Parts).eval(), images(2, 4, 5, 5)
    before = printed(block, x, capsys)
    reference = copy.deepcopy(block)
    fusedres.fuse(block)
    assert printed(block, x, capsys) == before
    assert {row["module"]: row["pattern"] for row in fusedres.explain(block).rows}["bn"] == "bn"
    assert_same_steps(block, reference, x)


def test_projection_block_prints_the_same(capsys):
    block = randomise(zoo.ProjectionBlock(8, 16)).eval()
    x = images(2, 8, 6, 6)
    before = printed(block, x, capsys)
    assert len(before) == 3
    assert printed(fusedres.fuse(block), x, capsys) == before


def test_a_list_as_the_input_runs_the_original_forward():
    def concatenates(self, parts):
        out = self.bn(self.conv(torch.cat(parts, 1)[:, 4:]))
        out += parts[0]
        return torch.relu(out)

    block = block_of(concatenates, Parts)
    reference, parts = copy.deepcopy(block), [images(2, 4, 5, 5), images(2, 4, 5, 5)]
    fusedres.fuse(block)
    for training in (True, False):
        torch.testing.assert_close(block.train(training)(parts), reference.train(training)(parts))


def test_print_itself_is_restored():
    original = builtins.print
    fusedres.fuse(block_of(draws, Parts))
    assert builtins.print is original
    assert logging.Logger.isEnabledFor.__qualname__ == "Logger.isEnabledFor"


def draws(self, x):
    return self.a(x) if random.random() < 2 else x


def draws_torch(self, x):
    return self.a(x) * torch.rand(1, dtype=x.dtype)


def makes_a_constant(self, x):
    return self.a(x) + torch.zeros(4, 1, 1)


def uses_a_global_tensor(self, x):
    return self.a(x) + SHIFT


def counts_calls(self, x):
    self.calls += 1
    return self.a(x)


def remembers(self, x):
    out = self.a(x)
    self.seen.append(out.shape)
    return out


def fills_a_table(self, x):
    self.table["key"] += 1
    return self.a(x)


def marks_its_child(self, x):
    self.child.mark = 1
    return self.a(x)


def branches_on_values(self, x):
    return self.a(x) if x.sum() > -1e9 else x


def branches_on_shapes(self, x):
    return self.a(x) if x.shape[2] == 5 else x


def branches_on_types(self, x):
    return self.a(x) if isinstance(x, torch.Tensor) else x


def branches_by_is_tensor(self, x):
    return self.a(x) if torch.is_tensor(x) else x


def loops_over_a_shape(self, x):
    print(tuple(x.shape))
    return self.a(x)


def logs(self, x):
    log.info("shape %s", x.shape)
    return self.a(x)


def warns(self, x):
    warnings.warn("careful", stacklevel=1)
    return self.a(x)


def writes(self, x):
    sys.stdout.write("called\n")
    return self.a(x)


def formats_for_something_else(self, x):
    return self.a(x) * len(f"{x.shape}")


def aligns_a_text(self, x):
    print(f"{x.shape}".ljust(40), "|")
    return self.a(x)


def names_by_a_value(self, x):
    return {f"{x.shape}": self.a(x)}[f"{x.shape}"]


def without_gradients(self, x):
    with torch.no_grad():
        out = self.a(x)
    return out + x


def partly_in_autocast(self, x):
    with torch.autocast("cpu", enabled=False):
        return self.a(x)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, *grads):
        return grads[0] * 5


def custom_function(self, x):
    return Double.apply(self.a(x))


def calls_a_childs_forward(self, x):
    return self.child.forward(self.a(x))


class Decorated(Parts):
    @torch.no_grad()
    def forward(self, x):
        return self.a(x)


UNTRACEABLE = [
    draws, draws_torch, makes_a_constant, uses_a_global_tensor, counts_calls, remembers, fills_a_table,
    marks_its_child, branches_on_values, branches_on_shapes, loops_over_a_shape, logs, warns, writes,
    formats_for_something_else, names_by_a_value, aligns_a_text, without_gradients, partly_in_autocast,
    custom_function,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:careful")
@pytest.mark.parametrize("forward", UNTRACEABLE)
def test_left_alone_with_its_reason_and_without_effects(forward, capsys):
    block, x = block_of(forward, Parts), images(2, 4, 5, 5)
    reference = copy.deepcopy(block)
    attributes = {key: copy.copy(value) for key, value in vars(block).items() if key in ("seen", "calls", "table")}
    rng, torch_rng = random.getstate(), torch.get_rng_state()
    before = type(block)
    fusedres.fuse(block)
    assert capsys.readouterr().out == ""
    assert random.getstate() == rng
    assert torch.equal(torch.get_rng_state(), torch_rng)
    assert {key: vars(block)[key] for key in attributes} == attributes
    assert not hasattr(block.child, "mark")
    assert type(block) is before
    assert counts(block) == {"bn": 1, "bn_act": 1, "bn_add_act": 1}  # the child is fused all the same
    reason = next(row["reason"] for row in fusedres.explain(block).rows if row["module"] == "bn")
    assert "forward" in reason
    if forward in (formats_for_something_else, without_gradients):
        block.requires_grad_(True)
    assert_same_steps(block, reference, x)


@pytest.mark.parametrize("forward", [branches_on_types, branches_by_is_tensor, calls_a_childs_forward])
def test_what_is_known_of_tensors(forward):
    """A call with anything else is traced anew or runs the original forward."""
    block, x = block_of(forward, Parts), images(2, 4, 5, 5)
    reference = copy.deepcopy(block)
    assert counts(fusedres.fuse(block))["bn_act"] == 2
    assert_same_steps(block, reference, x)


def test_a_decorated_forward():
    block = randomise(Decorated())
    assert counts(fusedres.fuse(block)) == {"bn": 1, "bn_act": 1, "bn_add_act": 1}
    assert not block(images(2, 4, 5, 5)).requires_grad


def test_parameters_and_buffers_are_read_at_each_call():
    def forward(self, x):
        return self.a(x) * self.scale + self.steps

    block = block_of(forward, Parts)
    reference, x = copy.deepcopy(block), images(2, 4, 5, 5)
    fusedres.fuse(block)
    assert counts(block)["bn_act"] == 2
    for candidate in (block, reference):
        candidate.scale.data.fill_(3)
        candidate.steps.fill_(2)
    assert_same_steps(block, reference, x)


def test_a_buffer_updated_in_place_is_updated_at_each_call():
    def forward(self, x):
        self.steps.add_(1)
        return self.a(x)

    block = block_of(forward, Parts)
    fusedres.fuse(block)
    assert block.steps.item() == 0
    block(images(2, 4, 5, 5))
    assert block.steps.item() == 1


def test_training_and_evaluation_may_differ():
    def forward(self, x):
        out = F.dropout(self.a(x), 0.5, self.training)
        return torch.relu(self.child(out)) if self.training else out

    block = block_of(forward, Parts)
    reference = copy.deepcopy(block)
    fusedres.fuse(block)
    assert counts(block)["bn_act"] == 2
    assert_same_steps(block, reference, images(2, 4, 5, 5))


def test_a_pattern_of_one_mode_is_reported_as_such():
    def forward(self, x):
        out = self.bn(self.conv(x))
        return torch.relu(out) if self.training else out

    block = block_of(forward, Parts)
    reference = copy.deepcopy(block)
    fusedres.fuse(block)
    rows = [row for row in fusedres.explain(block).rows if row["module"] == "bn"]
    assert [row["pattern"] for row in rows] == ["bn_act", "bn"]
    assert "in training only" in rows[0]["reason"]
    assert "in evaluation only" in rows[1]["reason"]
    assert_same_steps(block, reference, images(2, 4, 5, 5))
