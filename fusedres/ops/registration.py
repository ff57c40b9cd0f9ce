"""The operator library, and registration of operators that have an Autograd kernel of their own.

Such a kernel is a :class:`torch.autograd.Function` that calls the operator again below autograd, as ATen's own
operators do. Unlike ``torch.library.register_autograd`` it may mutate, and dispatch is paid once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("fusedres", "FRAGMENT")
# Masks and products are laid out like their inputs, so a compiler must not change the strides in between.
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    function: type[torch.autograd.Function] | None = None,
    counter: int | tuple[int, ...] = (),
) -> None:
    """Define ``fusedres::<schema>`` for CPU and CUDA tensors.

    Empty inputs, for which nothing can be launched, have the outputs of ``fake``, filled with zeros; the argument
    ``counter``, or each of several, counts them all the same.

    With ``function``, the last argument of the operator is ``save_for_backward``: where it is true the call goes to
    ``function.apply(operator, *arguments)``.
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
    if function is None:
        return
    operator = getattr(torch.ops.fusedres, name).default

    def autograd(*args: Any) -> Any:
        if args[-1]:
            return function.apply(operator, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    _library.impl(name, autograd, "Autograd")


def refuse_double_backward() -> None:
    """For the start of a backward.

    Raises:
        NotImplementedError: it is to be differentiated (``create_graph=True``).
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "the kernels have no double backward; FUSEDRES_BACKEND=reference takes PyTorch's own operators"
        )


def reserve_counters(device: torch.device) -> None:
    """For the fakes of operators whose kernels count arrivals, see :func:`fusedres.kernels.workspace.reserve`."""
    if device.type == "cuda" and torch.cuda.is_available():
        from fusedres.kernels.workspace import reserve

        reserve(device)
