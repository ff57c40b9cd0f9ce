"""Whether a provider computes what eager PyTorch computes, before anything about it is reported."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.errors import allowed, errors
from benchmarks.providers import Instance
from benchmarks.timing import autocast

# The smallest error over so many inputs is compared. A wrong formula is wrong for every input; a sign that flips at
# a ReLU because a value rounded to the other side of zero is not, and raises float32 gradients' error a hundredfold.
INPUTS = 5
Errors = dict[str, tuple[float, float]]  # what -> relative error in the 2-norm and in the maximum norm


def check(
    instances: list[Instance], model: nn.Module, images: list[Tensor], labels: Tensor, dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    """Compare each instance with float64 eager from the weights of ``model``; a verdict and the errors by name.

    An error passes up to twice the larger of eager's in its two memory formats, plus 4 eps; both are eager
    PyTorch, and both are taken here whatever ``instances`` holds.

    Args:
        model: float32, on any device; ``images`` and ``labels`` are on the device of ``instances``.
    """
    device = labels.device
    exact = copy.deepcopy(model).to(device, torch.float64)
    plain = copy.deepcopy(model).to(device)
    state = copy.deepcopy(plain.state_dict())
    found: dict[str, list[Errors]] = {i.provider.name: [] for i in instances}
    formats = (torch.contiguous_format, torch.channels_last)
    eager: list[list[Errors]] = [[] for _ in formats]
    for x in images:
        reference = _evaluate(exact, exact, state, x.double(), labels, torch.float32)
        for rows, memory_format in zip(eager, formats, strict=True):
            actual = _evaluate(plain, plain, state, x.contiguous(memory_format=memory_format), labels, dtype)
            rows.append(_compare(actual, reference))
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


def _compare(actual: dict[str, Tensor], reference: dict[str, Tensor]) -> Errors:
    return {name: errors(value, reference[name]) for name, value in actual.items()}


def _verdict(rows: list[Errors], eager: list[list[Errors]], dtype: torch.dtype) -> dict[str, Any]:
    verdict: dict[str, Any] = {"ok": True}
    for name in rows[0]:
        for norm, label in enumerate(("l2", "max")):
            error = min(row[name][norm] for row in rows)
            limit = allowed(max(min(row[name][norm] for row in one) for one in eager), dtype)
            verdict["ok"] &= error <= limit
            verdict[f"{name}_{label}"] = [float(f"{error:.3g}"), float(f"{limit:.3g}")]
    return verdict
