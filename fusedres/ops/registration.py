"""The operator library, and registration of operators that have an Autograd kernel of their own.

Such a kernel is a :class:`torch.autograd.Function` that calls the operator again below autograd, as ATen's own
operators do. Unlike ``torch.library.register_autograd`` it may mutate, and dispatch is paid once; by eager code, which
calls what :func:`register` returns, not even that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

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
) -> Callable[..., Any]:
    """Define ``fusedres::<schema>`` for CPU and CUDA tensors, and return it as a function for calls from Python.

    That function goes around the dispatcher where nobody would notice, see :func:`unobserved`, as the two passes
    through it take the host longer than all else that is ours; everywhere else it calls the operator.

    Empty inputs, for which nothing can be launched, have the outputs of ``fake``, filled with zeros.

    With ``function``, the last argument of the operator is ``save_for_backward``: where it is true the operator goes to
    ``function.apply(operator, *arguments)``, and the function that is returned is for calls below autograd.
    """

    def run(*args: Any) -> Any:
        return implementation(*args) if args[0].numel() > 0 else zeros(fake(*args))

    def apply(operator: Any, args: tuple[Any, ...]) -> Any:
        assert function is not None
        return function.apply(operator, *args)

    operator = define(schema, run, fake, None if function is None else apply)

    def call(*args: Any) -> Any:
        return run(*args) if unobserved(args) else operator(*args)

    return call


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    apply: Callable[[Any, tuple[Any, ...]], Any] | None = None,
) -> Any:
    """The operator of ``schema``, whose last argument says whether gradients go to ``apply(operator, arguments)``.

    Not so where a compiler runs the operator in a graph that it has differentiated.
    """
    name = schema.split("(")[0]
    _library.define(schema, tags=_TAGS)
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"fusedres::{name}", fake, lib=_library)
    operator = getattr(torch.ops.fusedres, name).default

    def autograd(*args: Any) -> Any:
        if apply is not None and args[-1] and torch.is_grad_enabled():
            return apply(operator, args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    if apply is not None:
        _library.impl(name, autograd, "Autograd")
    return operator


def zeros(outputs: Any) -> Any:
    """The outputs of a fake for an empty input."""
    return outputs.zero_() if isinstance(outputs, Tensor) else tuple(output.zero_() for output in outputs)


def unobserved(args: Iterable[Any]) -> bool:
    """Whether the dispatcher would do nothing but call us: no mode, transform, tracer, profiler or kind of tensor.

    A negated view, such as the imaginary part of a conjugate, is resolved by the dispatcher.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
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
