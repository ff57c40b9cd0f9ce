"""Whether a provider computes what eager PyTorch computes, before anything about it is reported."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.errors import allowed, errors, undecided
from benchmarks.providers import Instance
from benchmarks.timing import autocast

# The smallest error over so many inputs is compared. A wrong formula is wrong for every input; a sign that flips at
# a ReLU because a value rounded to the other side of zero is not, and raises float32 gradients' error a hundredfold.
INPUTS = 5
Errors = dict[str, tuple[float, float]]  # what -> relative error in the 2-norm and in the maximum norm


def check(
    instances: list[Instance],
    model: nn.Module,
    inputs: list[Tensor],
    target: Tensor,
    dtype: torch.dtype,
    *,
    channels_last: bool = True,
) -> dict[str, dict[str, Any]]:
    """Compare each instance with float64 eager from the weights of ``model``; a verdict and the errors by name.

    An error passes up to twice that of eager, the larger one of its two memory formats, plus 4 eps; eager's are
    taken here whatever ``instances`` holds.

    Args:
        model: on any device, its weights in the dtype of ``inputs``; those and ``target`` are on the device of
            ``instances``.
        target: labels of a classifier, or the cotangent of a layer with one ReLU.
        channels_last: whether there are two memory formats of the input.
    """
    device = target.device
    exact = copy.deepcopy(model).to(device, torch.float64)
    plain = copy.deepcopy(model).to(device)
    state = copy.deepcopy(plain.state_dict())
    found: dict[str, list[Errors]] = {i.provider.name: [] for i in instances}
    formats = (torch.contiguous_format, torch.channels_last) if channels_last else (torch.contiguous_format,)
    eager: list[list[Errors]] = [[] for _ in formats]
    for x in inputs:
        wanted = _without_ties(exact, x, target, dtype) if target.is_floating_point() else target
        reference = _evaluate(exact, exact, state, x.double(), wanted, torch.float64)
        for rows, memory_format in zip(eager, formats, strict=True):
            actual = _evaluate(plain, plain, state, x.contiguous(memory_format=memory_format), wanted, dtype)
            rows.append(_compare(actual, reference))
        for instance in instances:
            x = x.contiguous(memory_format=instance.memory_format)
            actual = _evaluate(instance.module, instance.call, state, x, wanted, dtype)
            found[instance.provider.name].append(_compare(actual, reference))
    return {name: _verdict(rows, eager, dtype) for name, rows in found.items()}


def _without_ties(exact: nn.Module, x: Tensor, cotangent: Tensor, dtype: torch.dtype) -> Tensor:
    """The cotangent, zero where the ReLU's input is so near to zero that rounding decides on its sign."""
    seen: list[Tensor] = []
    relu = next(m for m in exact.modules() if isinstance(m, nn.ReLU))
    with torch.no_grad(), relu.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone())):
        exact(x.double())
    [z] = seen
    return cotangent.masked_fill(undecided(z, dtype), 0)


def _evaluate(
    module: nn.Module, call: Callable[..., Any], state: dict[str, Any], x: Tensor, target: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Outputs, gradients and statistics of a training step, and outputs in evaluation mode.

    Of a model, the loss counts as an output, and the gradients of its many parameters are one quantity. Those of a
    layer differ in size by orders of magnitude, and stand apart.
    """
    module.load_state_dict(state)
    module.train()
    module.zero_grad(set_to_none=True)
    layer = target.is_floating_point()
    x = x.detach().requires_grad_(layer)
    with autocast(x, dtype):
        y = call(x)
        loss = y if layer else F.cross_entropy(y, target)
    loss.backward(target.to(y.dtype) if layer else None)
    gradients = {"input": x.grad, **{name: p.grad for name, p in module.named_parameters()}}
    gradients = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    statistics = [b for name, b in module.named_buffers() if "running" in name]
    module.eval()
    with torch.no_grad(), autocast(x, dtype):
        evaluated = call(x)
    found = {"outputs": y.detach() if layer else _flat([y.to(loss), loss]), "evaluation": evaluated}
    if layer:
        found |= {f"gradient of {name}": gradient.clone() for name, gradient in gradients.items()}
    else:
        found["gradients"] = _flat(list(gradients.values()))
    if statistics:
        found["statistics"] = _flat(statistics)
    return found


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
