"""Small cases that launch every kernel, ragged in every direction, for compute-sanitizer; interpreted without a GPU."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.utils.deterministic
from torch import Tensor

from fusedres import functional
from fusedres.functional import (
    Norm,
    add_batch_norm_act,
    batch_norm_act,
    batch_norm_act_global_avg_pool2d,
    forked_batch_norm_add_batch_norm_act,
    normalise_max_pool2d,
)
from tests.oracle import LINEAR_LN, LN_LINEAR, linear_inputs, run_linear

pytestmark = [pytest.mark.floor, pytest.mark.usefixtures("triton_backend")]
KERNELS = Path(__file__).parents[2] / "fusedres" / "kernels"
Case = Callable[[torch.device], list[Tensor]]  # what must be finite


@pytest.fixture(autouse=True)
def plain_memory(poisoned_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """initcheck sees no unwritten element in memory that was filled with NaN."""
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


def batch_norm(shape: tuple[int, ...], channels_last: bool, training: bool) -> Case:
    form = torch.channels_last if channels_last else torch.contiguous_format

    def case(device: torch.device) -> list[Tensor]:
        results = []
        for dtype, residual in ((torch.bfloat16, True), (torch.float32, False)):
            x = torch.randn(shape).to(device, dtype).contiguous(memory_format=form).requires_grad_()
            other = torch.randn_like(x).requires_grad_() if residual else None
            mean, var = torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)
            weight = torch.rand(shape[1], device=device, requires_grad=True)
            count = torch.zeros((), dtype=torch.int64, device=device)
            out = batch_norm_act(
                x, mean, var, weight, None, training, residual=other, act="relu", num_batches_tracked=count
            )
            out.backward(torch.randn_like(out))
            pooled = batch_norm_act_global_avg_pool2d(
                x, mean, var, weight, None, training, residual=other, act="relu"
            )  # fmt: skip
            pooled.backward(torch.randn_like(pooled))
            results += [pooled, x.grad, count]
            if other is not None:
                outputs = add_batch_norm_act(x, other, mean, var, weight, None, training, act="relu")
                torch.autograd.backward(outputs, [torch.randn_like(out)] * 2)
                results += [*outputs, other.grad]
        return results

    return case


def forked(shape: tuple[int, ...], channels_last: bool, training: bool) -> Case:
    """Stems and joins, whose outputs have two readers."""
    form = torch.channels_last if channels_last else torch.contiguous_format

    def case(device: torch.device) -> list[Tensor]:
        results = []
        for dtype in (torch.bfloat16, torch.float32):
            x, other = (
                torch.randn(shape).to(device, dtype).contiguous(memory_format=form).requires_grad_() for _ in range(2)
            )
            norms = [
                Norm(*(torch.ones(shape[1], device=device) for _ in range(3)), training=training) for _ in range(2)
            ]
            norms[0].weight.requires_grad_()
            joined = forked_batch_norm_add_batch_norm_act(x, other, *norms, act="relu")
            outputs = [*joined, *normalise_max_pool2d(x, norms[0], "relu", (3, 2, 1, 1, False), fork=True)]
            torch.autograd.backward(outputs, [torch.randn_like(out) for out in outputs])
            results += [*outputs, x.grad]
        return results

    return case


def linear(order: str, features: tuple[int, int]) -> Case:
    def case(device: torch.device) -> list[Tensor]:
        results = []
        for dtype in (torch.bfloat16, torch.float32):
            inputs = linear_inputs(order, (37,), features, dtype, residual=order == LINEAR_LN)
            results += run_linear(functional, order, inputs.map(lambda t: t.to(device)), "relu").values()
        return results

    return case


def ranks(device: torch.device) -> list[Tensor]:
    """What ranks launch, with their messages made here."""
    from fusedres.kernels import sync_batch_norm as sync

    x = torch.randn(5, 40, 33, 17).to(device)
    vectors = [torch.ones(40, device=device) for _ in range(4)]
    message, s = sync.moments(x, x)
    count = torch.zeros((), dtype=torch.int64, device=device)
    norm = Norm(*vectors, training=True, num_batches_tracked=count)
    stats, inverse = sync.merge(torch.stack([message] * 3), norm)
    out, mask = sync.normalise(s, None, stats, "relu", True)
    sums, _ = sync.reduce(out, s, stats, mask, "relu", None)
    return [sync.gradient(out, s, s, stats, sums * inverse, mask, "relu"), out, count]


LAYERS = (  # the first of each layout fits on-chip, the second needs two launches and several programs a channel tile
    ((3, 20, 5, 3), True), ((5, 40, 33, 17), True), ((3, 20, 5, 3), False), ((5, 3, 33, 17), False),
)  # fmt: skip
CASES = {
    "batch_norm over ranks": ranks,
    **{
        f"batch_norm {shape}, {'channels-last' if last else 'NCHW'}, {mode}": batch_norm(
            shape, last, mode == "training"
        )
        for shape, last in LAYERS
        for mode in ("training", "inference")
    },
    **{
        f"stem and join {shape}, {'channels-last' if last else 'NCHW'}, {mode}": forked(shape, last, mode == "training")
        for shape, last in (((3, 20, 5, 3), True), ((5, 3, 33, 17), False))
        for mode in ("training", "inference")
    },
    **{
        f"{order} {features}": linear(order, features)
        for order in (LN_LINEAR, LINEAR_LN)
        for features in ((40, 52), (1100, 24), (67, 101))
    },
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sanitize(case, device):
    assert all(result.isfinite().all() for result in case(device))


def test_every_kernel_is_launched():
    """Noted, and not run."""
    from triton import knobs
    from triton.runtime import interpreter

    if not knobs.runtime.interpret:
        pytest.skip("kernels are compiled here, not interpreted")
    launched = set()

    def note(executor: Any, *args: Any, **kwargs: Any) -> None:
        launched.add(executor.fn.__name__)

    with mock.patch.object(interpreter.GridExecutor, "__call__", note):
        for case in CASES.values():
            case(torch.device("cpu"))
    assert launched == kernels()


def kernels() -> set[str]:
    """The names of all kernels of the package."""
    return {
        node.name
        for path in KERNELS.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
