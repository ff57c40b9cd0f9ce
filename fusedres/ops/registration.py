"""The operator library, and registration of operators that have an Autograd kernel of their own.

Such a kernel is a :class:`torch.autograd.Function` that calls the operator again below autograd, as ATen's own
operators do. Unlike ``torch.library.register_autograd`` it may mutate, and dispatch is paid once; by eager code, which
calls what :func:`register` returns, not even that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

_library = torch.library.Library("fusedres", "FRAGMENT")
# Masks and products are laid out like their inputs, so a compiler must not change the strides in between.
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)

_VMAP = torch._C._dispatch_key_parse("VmapMode")  # that of batched gradients, which are no torch.func transform
_is_included = torch._C._dispatch_tls_is_dispatch_key_included

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_VALUES = frozenset((type(None), bool, int, float, str, torch.dtype, tuple, list))  # sequences of numbers


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    function: type[torch.autograd.Function] | None = None,
    counter: int | tuple[int, ...] = (),
) -> Callable[..., Any]:
    """Define ``fusedres::<schema>`` for CPU and CUDA tensors, and return it as a function for calls from Python.

    That function goes around the dispatcher where nobody would notice, see :func:`_unobserved`, as the two passes
    through it take the host longer than all else that is ours; everywhere else it calls the operator.

    Empty inputs, for which nothing can be launched, have the outputs of ``fake``, filled with zeros; the argument
    ``counter``, or each of several, counts them all the same.

    With ``function``, the last argument of the operator is ``save_for_backward``: where it is true the call goes to
    ``function.apply(operator, *arguments)``, where ``operator`` may be the function below instead; they have one name.
    Not so where a compiler runs the operator in a graph that it has differentiated.
    """
    name = schema.split("(")[0]

    def run(*args: Any) -> Any:
        if args[0].numel() > 0:
            return implementation(*args)
        for place in (counter,) if isinstance(counter, int) else counter:
            if args[place] is not None:
                args[place].add_(1)
        outputs = fake(*args)
        return outputs.zero_() if isinstance(outputs, Tensor) else tuple(output.zero_() for output in outputs)

    _library.define(schema, tags=_TAGS)
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"fusedres::{name}", fake, lib=_library)
    operator = getattr(torch.ops.fusedres, name).default
    run.__name__ = operator.__name__
    if function is not None:
        _library.impl(name, _autograd(operator, function), "Autograd")
    # Without its Python half, which is for functorch's transforms.
    apply = None if function is None else cast(Any, super(torch.autograd.Function, function)).apply

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not _unobserved(args):
            return operator(*args)
        if apply is not None and args[-1]:
            return apply(run, *args)
        return run(*args)

    return call


def _autograd(operator: Any, function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The Autograd kernel of ``operator``."""

    def autograd(*args: Any) -> Any:
        if args[-1] and torch.is_grad_enabled():
            return function.apply(operator, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return autograd


def _unobserved(args: tuple[Any, ...]) -> bool:
    """Whether the dispatcher would do nothing but call us: no mode, transform, tracer, profiler or kind of tensor.

    A negated view, such as the imaginary part of a conjugate, is resolved by the dispatcher.
    """
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._are_functorch_transforms_active()
        or _is_included(_VMAP)
        or torch._C._get_tracing_state() is not None
        or torch.autograd.profiler._is_profiler_enabled  # pyright: ignore[reportPrivateImportUsage]
    ):
        return False
    for arg in args:
        kind = type(arg)
        if kind in _PLAIN:
            if arg.is_neg():
                return False
        elif kind not in _VALUES:
            return False
    return True


def refuse_double_backward(
    reason: str = "the kernels have no double backward; FUSEDRES_BACKEND=reference takes PyTorch's own operators",
) -> None:
    """For the start of a backward.

    Raises:
        NotImplementedError: it is to be differentiated (``create_graph=True``).
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(reason)


def reserve_counters(device: torch.device) -> None:
    """For the fakes of operators whose kernels count arrivals, see :func:`fusedres.kernels.workspace.reserve`."""
    if device.type == "cuda" and torch.cuda.is_available():
        from fusedres.kernels.workspace import reserve

        reserve(device)
