"""The reference against PyTorch's own layers, written out: additions and activations in place change nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres
from fusedres import functional


@pytest.fixture(autouse=True)
def _on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRES_BACKEND", "reference")


def eager(x: Tensor, r: Tensor | None, norm: nn.BatchNorm2d, act: str | None) -> Tensor:
    out = norm(x) if r is None else norm(x) + r
    return F.relu(out) if act else out


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", [None, "relu"])
@pytest.mark.parametrize("residual", [None, "same", "itself", "wider", "expanded"])
def test_as_written_out(training: bool, act: str | None, residual: str | None) -> None:
    """Outputs, first and second derivatives, and buffers, bit for bit; neither input is written to."""
    results = []
    for kind in (nn.BatchNorm2d, fusedres.nn.BatchNormAct2d):
        torch.manual_seed(0)
        x = torch.randn(3, 5, 4, 4, requires_grad=True)
        r: Tensor | None = {
            None: None,
            "same": torch.randn(3, 5, 4, 4, requires_grad=True),
            "itself": x,
            "wider": torch.randn(3, 5, 4, 4, dtype=torch.float64, requires_grad=True),
            "expanded": torch.randn(3, 5, 1, 1, requires_grad=True).expand(3, 5, 4, 4),
        }[residual]
        before = [t.detach().clone() for t in (x, r) if t is not None]
        norm = kind(5).train(training)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        out = eager(x, r, norm, act) if kind is nn.BatchNorm2d else norm(x, r, act=act)
        wanted = [x, norm.weight, norm.bias, *([r] if residual in ("same", "wider") else [])]
        first = torch.autograd.grad(out, wanted, torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out),
                                    create_graph=True)  # fmt: skip
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, norm.weight])
        assert all(torch.equal(t, old) for t, old in zip([t for t in (x, r) if t is not None], before, strict=True))
        results.append([out, *first, *second, *norm.buffers()])
    for theirs, ours in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_a_transform_sees_a_residual_with_more_dimensions() -> None:
    """A batched residual cannot be added into an output that has no such dimension."""
    torch.manual_seed(0)
    x, rs = torch.randn(2, 3, 4, 4), torch.randn(5, 2, 3, 4, 4)
    mean, var = torch.zeros(3), torch.ones(3)
    out = torch.func.vmap(lambda r: functional.batch_norm_act(x, mean, var, residual=r, act="relu"))(rs)
    torch.testing.assert_close(out, torch.stack([F.relu(F.batch_norm(x, mean, var) + r) for r in rs]))


def test_a_refused_call_updates_nothing() -> None:
    """The look that usual calls are spared does not let a wrong one through."""
    norm = fusedres.nn.BatchNormAct2d(3)
    before = [buffer.clone() for buffer in norm.buffers()]
    x = torch.randn(2, 3, 4, 4)
    wrong = (
        (torch.randn(2, 4, 4, 4), {}),  # channels
        (torch.randn(1, 3, 1, 1), {}),  # one value a channel
        (x, {"residual": torch.randn(2, 3, 4, 1)}),
        (x, {"residual": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}),
        (x, {"act": "gelu"}),
        (x.long(), {}),
    )
    with pytest.raises(ValueError, match="eps must be"):
        functional.batch_norm_act(x, None, None, training=True, eps=0.0)
    for input, options in wrong:
        with pytest.raises((TypeError, ValueError)):
            norm(input, **options)
    assert all(torch.equal(buffer, old) for buffer, old in zip(norm.buffers(), before, strict=True))
