"""What the operations of the BatchNorm family share: their schemas, their autograd, and all around their launchers.

Each is a :class:`Family`, which has two operators: one takes the statistics of the batch, and mutates the running ones,
so that they cost no launch of their own; ``<name>_inference`` normalises with the running ones. A schema has flat
tensors: :func:`flat` takes a norm apart for it, and :func:`unflat` puts it together again.

A *fork* is the output under a second name, for a second reader: the backward then takes two gradients and adds them
while it reads them, where autograd would in a pass of its own. An operator must not return one memory twice: below
autograd, whose kernel puts the name there, ``fork`` is empty, and ``None`` around the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor

from fusedres.kernels.layout import contiguous, dense, dense_like
from fusedres.norm import Gradients, Norm
from fusedres.ops import registration
from fusedres.ops.registration import define, refuse_double_backward, register, reserve_counters, zeros

NORM = (
    "Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
    "float? momentum, float eps"
)
_FROZEN_NORM = "Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, float eps"
_OTHER_NORM = (
    "Tensor? other_weight, Tensor? other_bias, Tensor(d!)? other_running_mean, Tensor(e!)? other_running_var, "
    "Tensor(f!)? other_num_batches_tracked, float? other_momentum, float other_eps"
)
_OTHER_FROZEN_NORM = (
    "Tensor? other_weight, Tensor? other_bias, Tensor other_running_mean, Tensor other_running_var, float other_eps"
)
_DTYPES = "ScalarType? input_dtype, ScalarType? residual_dtype, ScalarType? weight_dtype, ScalarType? bias_dtype"
_GRADIENTS = "Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias"
Saved = tuple[Tensor, ...]
Dtypes = Sequence["torch.dtype | None"]


@dataclass(frozen=True)
class Family:
    """An operation that normalises.

    ``forward`` and ``fake`` take ``(*inputs, *norms, *options, save_for_backward)``: activations that are dense, and of
    the first one's strides; vectors at unit stride.

    Attributes:
        name: of the operator that takes the statistics of the batch.
        inputs: schema of the tensors in front of the norms, all of which, and the norms' parameters, have gradients.
        options: schema of what is behind them, but for ``save_for_backward``.
        outputs: schema of what ``forward`` returns.
        saved: what the backward reads, of ``(inputs, outputs, needs)``.
        backward: gradients of the inputs and the parameters from ``(ctx, saved, grad, other, dtypes)``: ``other`` is
            the gradient of the fork or of the sum, a dtype is ``None`` where none is needed; where the operation
            ``adds``, both terms stand for one.
        activations: how many of the inputs are.
        norms: how many there are.
        adds: the outputs begin with the sum of both activations and what it is normalised to.
        forks: they begin with the output and its fork, and ``fork`` is the last of the options.
    """

    name: str
    inputs: str
    options: str
    outputs: str
    forward: Callable[..., Any]
    fake: Callable[..., Any]
    saved: Callable[[tuple[Any, ...], tuple[Tensor, ...], Sequence[bool]], Saved]
    backward: Callable[..., Sequence[Tensor | None]]
    activations: int = 1
    norms: int = 1
    adds: bool = False
    forks: bool = False

    def laid_out(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The inputs as the kernels walk them."""
        x = dense(inputs[0])
        if self.activations == 1:
            return x, *inputs[1:]
        other = inputs[1]
        return x, None if other is None else dense_like(other, x), *inputs[2:]

    def compute(self, inputs: tuple[Any, ...], norms: tuple[Norm, ...], options: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """What is below the dispatcher, of inputs that are laid out."""
        if inputs[0].numel() == 0:
            for norm in norms:
                if norm.training and norm.num_batches_tracked is not None:
                    norm.num_batches_tracked.add_(1)
            return zeros(self.fake(*inputs, *norms, *options))
        read = at_unit_stride(norms)
        outputs = self.forward(*inputs, *read, *options)
        if norms[0].training:
            finish_update(norms, read)
        return outputs


def register_family(family: Family) -> Callable[..., tuple[Tensor, ...]]:
    """The operation as a function of ``(*inputs, *norms, *options, save_for_backward)``, with both operators defined.

    It goes around the dispatcher as what :func:`fusedres.ops.registration.register` returns does.
    """
    first = family.inputs.count("Tensor")
    last = first + family.norms
    operators = {training: _operator(family, training, first) for training in (False, True)}
    # Without its Python half, which is for functorch's transforms.
    apply = cast(Any, super(torch.autograd.Function, Normalisation)).apply

    def call(*args: Any) -> tuple[Tensor, ...]:
        inputs, norms, options = args[:first], args[first:last], args[last:]
        if not registration.unobserved(chain(inputs, *norms, options)):
            return operators[norms[0].training](*flat(inputs, norms, options))
        if options[-1]:
            return apply(family, family.compute, inputs, norms, options, *inputs, *_parameters(norms))
        return family.compute(family.laid_out(inputs), norms, options)

    return call


def _operator(family: Family, training: bool, first: int) -> Any:
    """One of both operators; ``first`` is the place of its first norm."""
    width = 7 if training else 5
    last = first + width * family.norms

    def split(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Norm, ...], tuple[Any, ...]]:
        norms = (unflat(args[place : place + width], training) for place in range(first, last, width))
        return args[:first], tuple(norms), args[last:]

    def implementation(*args: Any) -> tuple[Tensor, ...]:
        inputs, norms, options = split(args)
        out, *rest = family.compute(family.laid_out(inputs), norms, options)
        return out, *(out.new_empty(0) if other is None else other for other in rest)

    def fake(*args: Any) -> tuple[Tensor, ...]:
        inputs, norms, options = split(args)
        reserve_counters(inputs[0].device)
        return family.fake(*family.laid_out(inputs), *norms, *options)

    def apply(operator: Any, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        def below(*parts: Any) -> tuple[Tensor, ...]:
            return operator(*flat(*parts))

        inputs, norms, options = split(args)
        return Normalisation.apply(family, below, inputs, norms, options, *inputs, *_parameters(norms))

    given = ((NORM, _OTHER_NORM) if training else (_FROZEN_NORM, _OTHER_FROZEN_NORM))[: family.norms]
    schema = ", ".join([family.inputs, *given, family.options, "bool save_for_backward"])
    name = family.name if training else f"{family.name}_inference"
    return define(f"{name}({schema}) -> ({family.outputs})", implementation, fake, apply)


def flat(inputs: tuple[Any, ...], norms: tuple[Norm, ...], options: tuple[Any, ...] = ()) -> list[Any]:
    """The arguments of an operator."""
    arguments = [*inputs]
    for mean, var, weight, bias, training, momentum, eps, count in norms:
        arguments += (weight, bias, mean, var, count, momentum, eps) if training else (weight, bias, mean, var, eps)
    arguments += options
    return arguments


def unflat(args: Sequence[Any], training: bool) -> Norm:
    """The norm that :func:`flat` took apart."""
    weight, bias, mean, var, *count_and_momentum, eps = args
    count, momentum = count_and_momentum or (None, None)
    return Norm(mean, var, weight, bias, training, momentum, eps, count)


def _parameters(norms: tuple[Norm, ...]) -> tuple[Tensor | None, ...]:
    if len(norms) == 1:
        return norms[0][2:4]
    return tuple(parameter for norm in norms for parameter in norm[2:4])


def at_unit_stride(norms: tuple[Norm, ...]) -> tuple[Norm, ...]:
    """The norms as kernels read them: themselves, or with copies."""
    for norm in norms:
        for tensor in norm[:4]:
            if tensor is not None and not tensor.is_contiguous():
                return tuple(Norm._make([*map(contiguous, norm[:4]), *norm[4:]]) for norm in norms)
    return norms


def finish_update(norms: tuple[Norm, ...], updated: tuple[Norm, ...]) -> None:
    """Tell autograd that kernels wrote the buffers of ``norms``, by way of ``updated`` where those are others."""
    for norm, other in zip(norms, updated, strict=True):
        for buffer, written in zip(norm[:2], other[:2], strict=True):
            if buffer is not written and buffer is not None and written is not None:
                buffer.copy_(written)
        buffers = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
        torch.autograd.graph.increment_version([t for t in buffers if t is not None and not t.is_inference()])


class Normalisation(torch.autograd.Function):
    """The gradients of a family: of the tensors behind ``options``, which are the inputs and the parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        family: Family,
        below: Callable[..., tuple[Tensor, ...]],
        inputs: tuple[Any, ...],
        norms: tuple[Norm, ...],
        options: tuple[Any, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        inputs = family.laid_out(inputs)
        with torch._C._AutoDispatchBelowAutograd():
            outputs = below(inputs, norms, options)
        needs = ctx.needs_input_grad[5:]
        if family.forks and options[-2] and any(needs):
            outputs = (outputs[0], outputs[0].detach(), *outputs[2:])
            without = outputs[2:]
        elif outputs[1] is None:
            without = outputs[2:]
        elif family.adds:
            # As a sum of terms that need no gradient, s needs none, whatever the parameters of its normalisation need.
            without = outputs[2:] if needs[0] or needs[1] else (outputs[0], *outputs[2:])
        else:
            without = outputs[1:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*without)
        ctx.save_for_backward(*family.saved(inputs, outputs, needs))
        ctx.family, ctx.options, ctx.frozen = family, options, not norms[0].training
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        family, needs = ctx.family, ctx.needs_input_grad[5:]
        dtypes = [dtype if needed else None for dtype, needed in zip(ctx.dtypes, needs, strict=True)]
        if family.adds:
            return None, None, None, None, None, *_gradients_of_sum(ctx, grads[1], grads[0], dtypes)
        grad, other = grads[0], grads[1] if family.forks else None
        if grad is None:
            grad, other = other, None
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        found = family.backward(ctx, ctx.saved_tensors, grad, other, dtypes)
        asked_for = [None if dtype is None else d for d, dtype in zip(found, dtypes, strict=True)]
        return None, None, None, None, None, *asked_for


def _gradients_of_sum(
    ctx: Any, grad: Tensor | None, grad_sum: Tensor | None, dtypes: list[torch.dtype | None]
) -> list[Tensor | None]:
    """Both terms have one gradient. It is written as they want it; where they differ, as the sum is."""
    term, *rest = grad_sum, *(None,) * (len(dtypes) - 2)
    if grad is not None:
        saved = ctx.saved_tensors  # to be read once, for checkpoints that free what has been
        asked_for = {dtype for dtype in dtypes[:2] if dtype is not None}
        dtype = next(iter(asked_for)) if len(asked_for) == 1 else (saved[0].dtype if asked_for else None)
        term, *rest = ctx.family.backward(ctx, saved, grad, grad_sum, [dtype, *dtypes[2:]])
    terms = [None if term is None or dtype is None else term.to(dtype) for dtype in dtypes[:2]]
    return [*terms, *(None if dtype is None else d for d, dtype in zip(rest, dtypes[2:], strict=True))]


def register_backward(name: str, saved: str, options: str, launch: Callable[..., None]) -> Callable[..., Any]:
    """The operator of a backward, which allocates the gradients that have a dtype, for ``launch`` to fill.

    Its schema is that of ``grad``, ``other``, ``input``, ``saved``, ``options`` and dtypes; ``launch`` takes the same
    after the ``Gradients``, but for the dtypes.
    """

    def allocate(*args: Any) -> tuple[Tensor, ...]:
        return gradients(dense(args[2]), *args[-4:])

    def fill(grad: Tensor, other: Tensor | None, input: Tensor, *args: Any) -> tuple[Tensor, ...]:
        x = dense(input)
        outputs = gradients(x, *args[-4:])
        launch(wanted(outputs), grad, other, x, *args[:-4])
        return outputs

    arguments = f"Tensor grad, Tensor? other, Tensor input, {saved}, {options}, {_DTYPES}"
    return register(f"{name}({arguments}) -> ({_GRADIENTS})", fill, allocate)


def wanted(outputs: Sequence[Tensor]) -> Gradients:
    """What a launcher fills."""
    return Gradients._make([out if out.numel() else None for out in outputs])


def gradients(x: Tensor, *dtypes: torch.dtype | None) -> tuple[Tensor, ...]:
    """Uninitialised gradients of x, of a residual like x, weight and bias; those without a dtype are empty."""
    activations = [x.new_empty(0) if dtype is None else torch.empty_like(x, dtype=dtype) for dtype in dtypes[:2]]
    parameters = [x.new_empty(0 if dtype is None else x.shape[1], dtype=dtype) for dtype in dtypes[2:]]
    return *activations, *parameters


def statistics(x: Tensor, kept: bool) -> Tensor:
    """Uninitialised, as the launchers return them; empty unless they are ``kept``."""
    return x.new_empty((4, x.shape[1]) if kept else 0, dtype=torch.float32)
