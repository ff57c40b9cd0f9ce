"""Eager calls go around PyTorch's dispatcher where nobody would notice; the suite that measures what calls cost."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.results import Row
from benchmarks.suite import CPU, Request
from benchmarks.suites import host
from fusedres.functional import add_batch_norm_act, batch_norm_act
from fusedres.norm import Norm
from fusedres.ops import batch_norm_act as batch_norm_act_operator
from fusedres.ops import registration
from tests.kernels.compiled import compiled

pytestmark = pytest.mark.usefixtures("triton_backend")
SHAPE = (2, 8, 4, 4)


class Operators(TorchDispatchMode):
    """Notes what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})


class Marked(Tensor):
    """A tensor of a kind that the kernels know nothing of."""


def forward(x: Tensor) -> Tensor:
    return batch_norm_act(x, None, None, training=True, act="relu")


def backward(x: Tensor) -> None:
    out = forward(x)
    out.backward(torch.ones_like(out))


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a call was left to the dispatcher."""
    seen: list[bool] = []
    unobserved = registration.unobserved

    def noting(args: tuple[Any, ...]) -> bool:
        seen.append(not unobserved(args))
        return not seen[-1]

    monkeypatch.setattr(registration, "unobserved", noting)
    return seen


def test_plain_calls_go_around_it(dispatched):
    x = torch.randn(SHAPE, requires_grad=True)
    backward(x)
    batch_norm_act(x.detach(), torch.zeros(8), torch.ones(8), torch.nn.Parameter(torch.ones(8)))
    s, out = add_batch_norm_act(x, x, None, None, training=True)
    (s + out).sum().backward()
    with torch.inference_mode():
        forward(x)
    assert dispatched == [False] * 6


def test_modes_see_the_operators():
    with Operators() as mode:
        backward(torch.randn(SHAPE, requires_grad=True))
    assert [name for name in mode.names if name.startswith("fusedres")] == [
        "fusedres.batch_norm_act.default",
        "fusedres.batch_norm_act_backward.default",
    ]
    with Functions() as functions:
        forward(torch.randn(SHAPE))
    assert any("fusedres" in name for name in functions.names)


def test_profiles_name_the_operators():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        backward(torch.randn(SHAPE, requires_grad=True))
    names = {event.name for event in profile.events() or ()}
    assert {"fusedres::batch_norm_act", "fusedres::batch_norm_act_backward"} <= names


def test_other_kinds_of_tensors_are_dispatched(dispatched):
    forward(torch.randn(SHAPE).as_subclass(Marked))
    assert dispatched == [True]


def test_a_negated_view_is_resolved(dispatched):
    """Its memory holds the other sign."""
    z = torch.complex(torch.randn(SHAPE), torch.randn(SHAPE))
    x = z.conj().imag
    assert x.is_neg()
    torch.testing.assert_close(forward(x), forward(x.resolve_neg().clone()))
    assert dispatched == [True, False]


def test_batched_gradients_are_dispatched(dispatched):
    """As of ``torch.autograd.functional.jacobian(vectorize=True)``; such tensors have no memory of their own."""
    x, grads = torch.randn(SHAPE, requires_grad=True), torch.randn(3, *SHAPE)
    out = forward(x)
    [found] = torch.autograd.grad(out, x, grads, retain_graph=True, is_grads_batched=True)
    assert dispatched == [False, True]
    for grad, one in zip(grads, found, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(out, x, grad, retain_graph=True)[0])


def test_both_ways_give_the_same_bits():
    x, residual = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE, requires_grad=True)
    weight = torch.rand(8, requires_grad=True)
    results = []
    for direct in (True, False):
        mean, var, count = torch.zeros(8), torch.ones(8), torch.tensor(0)
        if direct:
            norm = Norm(mean, var, weight, training=True, num_batches_tracked=count)
            out, *_ = batch_norm_act_operator(x, residual, norm, "relu", False, True)
        else:
            out, *_ = torch.ops.fusedres.batch_norm_act(
                x, residual, weight, None, mean, var, count, 0.1, 1e-5, "relu", False, True
            )
        assert [buffer._version for buffer in (mean, var, count)] == [1, 1, 1]
        grads = torch.autograd.grad(out, [x, residual, weight], torch.ones_like(out))
        results.append([out, mean, var, count, *grads])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def measured() -> list[Row]:
    """With few rounds."""
    with mock.patch("benchmarks.instruments.host.ROUNDS", 5):
        return host.measure(host.Case("bn+add+relu", host.SHAPES[0]))


@pytest.mark.codegen
def test_the_suite_measures_every_part():
    """The figures of a call add up, and each part takes some time."""
    rows = [asdict(row) for row in compiled(measured)]
    [case] = [c for c in host.plan(Request(CPU, Path())) if c == host.Case("bn+add+relu", host.SHAPES[0])]
    assert [(row["mode"], row["provider"]) for row in rows] == [(key[1], key[2]) for key in case.keys]
    for row in rows:
        figures = row["figures"]
        assert figures["host_us"] > 0
        if row["provider"] == "eager":
            continue
        assert sum(figures[name] for name in host.PARTS) == pytest.approx(figures["host_us"], abs=0.1)
        assert figures["triton_us"] > 0 and figures["operator_us"] > 0
        assert (figures["validation_us"] > 0) == (row["mode"] != "backward")
