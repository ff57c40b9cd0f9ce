"""Whether a provider computes what eager PyTorch computes, before anything about it is reported."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.errors import allowed, errors
from benchmarks.providers import Instance
from benchmarks.timing import autocast

INPUTS = 3  # the median over them: one sign flip near zero in a ReLU decides no verdict


def check(
    instances: list[Instance], model: nn.Module, images: list[Tensor], labels: Tensor, dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    """Compare each instance with float64 eager from the weights of ``model``; a verdict and the errors by name.

    An error passes up to twice the larger of eager's in its two memory formats, plus 4 eps; both are eager
    PyTorch, and both are taken here whatever ``instances`` holds.
    """
    device = labels.device
    exact = copy.deepcopy(model).to(device, torch.float64)
    plain = copy.deepcopy(model).to(device)
    state = copy.deepcopy(plain.state_dict())
    found: dict[str, list[dict[str, tuple[float, float]]]] = {i.provider.name: [] for i in instances}
    eager: list[dict[str, tuple[float, float]]] = []
    for x in images:
        reference = _evaluate(exact, exact, state, x.double(), labels, torch.float32)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            actual = _evaluate(plain, plain, state, x.contiguous(memory_format=memory_format), labels, dtype)
            eager.append(_compare(actual, reference))
        for instance in instances:
            x = x.contiguous(memory_format=instance.memory_format)
            actual = _evaluate(instance.module, instance.call, state, x, labels, dtype)
            found[instance.provider.name].append(_compare(actual, reference))
    return {name: _verdict(rows, eager, dtype) for name, rows in found.items()}


def _evaluate(
    module: nn.Module, call: Callable[..., Any], state: dict[str, Any], x: Tensor, labels: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Logits and loss, gradients and statistics of a training step, and logits in evaluation mode."""
    module.load_state_dict(state)
    module.train()
    module.zero_grad(set_to_none=True)
    with autocast(x.device, dtype):
        logits = call(x)
        loss = F.cross_entropy(logits, labels)
    loss.backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    statistics_ = [b for name, b in module.named_buffers() if "running" in name]
    module.eval()
    with torch.no_grad(), autocast(x.device, dtype):
        evaluated = call(x)
    return {
        "outputs": torch.cat([logits.detach().flatten().float().to(loss), loss.detach().flatten()]),
        "gradients": _flat(gradients),
        "statistics": _flat(statistics_),
        "evaluation": evaluated.flatten(),
    }


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().contiguous().flatten().clone() for t in tensors])


def _compare(actual: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    return {name: errors(value, reference[name]) for name, value in actual.items()}


def _verdict(
    rows: list[dict[str, tuple[float, float]]], eager: list[dict[str, tuple[float, float]]], dtype: torch.dtype
) -> dict[str, Any]:
    verdict: dict[str, Any] = {"ok": True}
    for name in rows[0]:
        for norm, label in enumerate(("l2", "max")):
            error = statistics.median(row[name][norm] for row in rows)
            limit = allowed(max(row[name][norm] for row in eager), dtype)
            verdict["ok"] &= error <= limit
            verdict[f"{name}_{label}"] = [float(f"{error:.3g}"), float(f"{limit:.3g}")]
    return verdict
