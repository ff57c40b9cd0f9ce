"""Whether a call of a module is its class's forward and nothing more."""

from __future__ import annotations

from torch import nn


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook would see ``module`` called, or not called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_standard(module: object, *classes: type) -> bool:
    """Of exactly one of ``classes``, running that class's forward, with nobody watching."""
    return (
        type(module) in classes
        and isinstance(module, nn.Module)
        and "forward" not in vars(module)
        and module._compiled_call_impl is None
        and not is_hooked(module)
    )
