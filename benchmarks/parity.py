"""Whether a provider computes what eager PyTorch computes, before anything about it is reported."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.errors import allowed, errors, undecided
from benchmarks.providers import Instance
from benchmarks.timing import Batch, as_tuple, autocast

# Of a layer the median error over so many inputs is compared, of a model the smallest one. A wrong formula is wrong for
# every input; a sign that flips at a ReLU because a value rounded to the other side of zero is not, and raises float32
# gradients' error a hundredfold. A layer's cotangents leave those out, so that what is wrong most of the time fails.
INPUTS = 5
Around = Callable[[str], AbstractContextManager[object]]
Errors = dict[str, tuple[float, float]]  # what -> relative error in the 2-norm and in the maximum norm


def check(
    instances: list[Instance],
    model: nn.Module,
    batches: Iterable[Batch],
    dtype: torch.dtype,
    *,
    channels_last: bool = True,
    around: Around = nullcontext,
) -> dict[str, dict[str, Any]]:
    """Compare each instance with float64 eager from the weights of ``model``; a verdict and the errors by name.

    An error passes up to twice that of eager, the larger one of its two memory formats, plus 4 eps; eager's are
    taken here whatever ``instances`` holds. Where an instance raises, its verdict has the reason as ``error``.

    Args:
        model: on any device, in the dtype that the layer has, or that of a model in training.
        batches: of labels of a classifier, or of cotangents of a layer with at most one ReLU; on the device of
            ``instances``.
        channels_last: whether there are two memory formats of the input.
        around: what the ``"forward"`` and the ``"backward"`` of the instances' training steps run in, each anew.
    """
    if not instances:
        return {}
    device = next(instances[0].module.parameters()).device
    exact = copy.deepcopy(model).to(device, torch.float64)
    plain = copy.deepcopy(model).to(device)
    state = copy.deepcopy(plain.state_dict())
    found: dict[str, list[Errors]] = {i.provider.name: [] for i in instances}
    failed: dict[str, str] = {}
    formats = (torch.contiguous_format, torch.channels_last) if channels_last else (torch.contiguous_format,)
    eager: list[list[Errors]] = [[] for _ in formats]
    for batch in batches:
        wanted = batch if isinstance(batch.target, Tensor) else _without_ties(exact, batch, dtype)
        reference = _evaluate(exact, exact, state, _double(wanted), torch.float64)
        for rows, memory_format in zip(eager, formats, strict=True):
            actual = _evaluate(plain, plain, state, wanted.formatted(memory_format), dtype)
            rows.append(_compare(actual, reference))
        for instance in instances:
            name = instance.provider.name
            try:
                formatted = wanted.formatted(instance.memory_format)
                actual = _evaluate(instance.module, instance.call, state, formatted, dtype, around)
            except Exception as error:  # a provider that cannot run is a result, not the end of the benchmark
                failed[name] = first_line(error)
                continue
            found[name].append(_compare(actual, reference))
        reference.clear()  # of a large layer gigabytes, and the next one comes before this one would go
    return {
        name: {"ok": False, "error": failed[name]} if name in failed else _verdict(rows, eager, dtype)
        for name, rows in found.items()
    }


def first_line(error: Exception) -> str:
    """The kind of an error and the beginning of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _double(batch: Batch) -> Batch:
    return Batch(tuple(x.double() for x in batch.inputs), batch.target)


def _without_ties(exact: nn.Module, batch: Batch, dtype: torch.dtype) -> Batch:
    """With cotangents that are zero where the ReLU's input is so near to zero that rounding decides on its sign."""
    seen: list[Tensor] = []
    relu = next((m for m in exact.modules() if isinstance(m, nn.ReLU)), None)
    if relu is None:
        return batch
    with torch.no_grad(), relu.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone())):
        exact.train()(*_double(batch).inputs)
    [z] = seen
    *others, last = batch.target  # the ReLU's result comes last
    return Batch(batch.inputs, (*others, last.masked_fill(undecided(z, dtype), 0)))


def _evaluate(
    module: nn.Module,
    call: Callable[..., Any],
    state: dict[str, Any],
    batch: Batch,
    dtype: torch.dtype,
    around: Around = nullcontext,
) -> dict[str, Tensor]:
    """Outputs, gradients and statistics of a training step, and outputs in evaluation mode.

    Of a model, the loss counts as an output, and the gradients of its many parameters are one quantity. Those of a
    layer differ in size by orders of magnitude, and stand apart.
    """
    module.load_state_dict(state)
    module.train()
    module.zero_grad(set_to_none=True)
    layer = not isinstance(batch.target, Tensor)
    inputs = [x.detach().clone().requires_grad_(layer) for x in batch.inputs]
    with around("forward"), autocast(inputs[0], dtype):
        outputs = as_tuple(call(*inputs))
        losses = outputs if layer else (F.cross_entropy(*outputs, batch.target),)  # pyright: ignore
    cotangents = [c.to(y.dtype) for c, y in zip(batch.target, outputs, strict=True)] if layer else None
    with around("backward"):
        torch.autograd.backward(losses, cotangents)
    gradients = {f"input {number}": x.grad for number, x in enumerate(inputs, 1)}
    gradients |= {name: p.grad for name, p in module.named_parameters()}
    gradients = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    running = [b for name, b in module.named_buffers() if "running" in name]
    module.eval()
    with torch.no_grad(), autocast(inputs[0], dtype):
        evaluated = as_tuple(call(*(x.detach() for x in inputs)))
    found = {"outputs": _flat([y.to(losses[0]) for y in (outputs if layer else (*outputs, *losses))])}
    found["evaluation"] = _flat(list(evaluated))
    if layer:
        found |= {f"gradient of {name}": gradient.clone() for name, gradient in gradients.items()}
    else:
        found["gradients"] = _flat(list(gradients.values()))
    if running:
        found["statistics"] = _flat(running)
    return found


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().contiguous().flatten().clone() for t in tensors])


def _compare(actual: dict[str, Tensor], reference: dict[str, Tensor]) -> Errors:
    return {name: errors(value, reference[name]) for name, value in actual.items()}


def _verdict(rows: list[Errors], eager: list[list[Errors]], dtype: torch.dtype) -> dict[str, Any]:
    verdict: dict[str, Any] = {"ok": True}
    typical = min if "gradients" in rows[0] else statistics.median
    for name in rows[0]:
        for norm, label in enumerate(("l2", "max")):
            error = typical(row[name][norm] for row in rows)
            # Running statistics are float32 whatever the dtype is: its eps would hide a wrong momentum.
            precision = torch.float32 if name == "statistics" else dtype
            limit = allowed(max(typical(row[name][norm] for row in one) for one in eager), precision)
            verdict["ok"] &= error <= limit < math.inf  # where eager is not finite nobody is right
            verdict[f"{name}_{label}"] = [float(f"{error:.3g}"), float(f"{limit:.3g}")]
    return verdict
