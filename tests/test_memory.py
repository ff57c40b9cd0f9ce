"""What is saved for a backward is counted, all of it and once; rows of memory say what they are of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.instruments.saved import Saved, saved_for_backward

SIZE = 4 * 16 * 8  # bytes of one activation


class _Square(torch.autograd.Function):
    """Keeps its input as the class says: on the context or as autograd wants it."""

    hidden = False

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        if _Square.hidden:
            ctx.x = x.detach()
        else:
            ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        x = ctx.x if _Square.hidden else ctx.saved_tensors[0]
        return 2 * x * grads[0]


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Square, "hidden", True)


def measure(module, x: Tensor) -> Saved:
    owned = [x, *(module.parameters() if isinstance(module, nn.Module) else ())]
    return saved_for_backward(lambda: module(x), owned)


def test_what_autograd_saves_is_counted() -> None:
    x = torch.randn(16, 8, requires_grad=True)
    assert measure(lambda x: _Square.apply(x + 1), x) == Saved(SIZE, SIZE)


@pytest.mark.usefixtures("hidden")
def test_what_is_kept_on_a_context_is_alive_and_not_saved() -> None:
    x = torch.randn(16, 8, requires_grad=True)
    assert measure(lambda x: _Square.apply(x + 1), x) == Saved(0, SIZE)


def test_the_input_parameters_and_the_output_do_not_count() -> None:
    x = torch.randn(16, 8, requires_grad=True)
    module = nn.Linear(8, 8)
    assert measure(module, x) == Saved(0, 0), "an input, a weight, and an output that nobody saved"
    assert measure(lambda x: _Square.apply(x), x) == Saved(0, 0)


def test_a_storage_counts_once() -> None:
    x = torch.randn(16, 8, requires_grad=True)

    def twice(x: Tensor) -> Tensor:
        y = x + 1
        return y.view(-1) * y.flatten() * y.view(2, -1).flatten()

    product = SIZE
    assert measure(twice, x) == Saved(SIZE + product, SIZE + product)


def test_an_output_that_is_saved_counts() -> None:
    x = torch.randn(16, 8, requires_grad=True)
    assert measure(lambda x: x.exp(), x) == Saved(SIZE, SIZE)
