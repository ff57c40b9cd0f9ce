"""Why a module is left as it is, and a walk over those that are not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.fusion.derived import kind_of, original_class
from fusedres.fusion.foreign import is_timms
from fusedres.fusion.proxies import is_torchs
from fusedres.fusion.rewriting import Call
from fusedres.fusion.runtime import is_plain
from fusedres.fusion.watching import is_hooked
from fusedres.nn import OWN_NORMS, BatchNormActMaxPool2d, LayerNormLinear, LinearLayerNorm, ResidualMLPBlock

Filter = Callable[[nn.Module, str], bool]
# Fused by those who built them; the pattern is reported under their LayerNorm.
OWN_BLOCKS: dict[type[nn.Module], Call] = {
    LayerNormLinear: Call("norm", "ln_linear_act", own=True),
    LinearLayerNorm: Call("norm", "linear_ln_act", own=True),
    ResidualMLPBlock: Call("norm", "linear_ln_act", "with the addition", adds=True, own=True),
}


def own_call(block: nn.Module, path: str = "") -> Call | None:
    """The row of one of ``OWN_BLOCKS`` at ``path``."""
    call = OWN_BLOCKS.get(type(block))
    if call is None:
        return None
    return replace(call, module=f"{path}.{call.module}".lstrip("."), acts=getattr(block, "act", None) is not None)


def sealed(module: nn.Module) -> str | None:
    """Why nothing below ``module`` may change."""
    if module._compiled_call_impl is not None or isinstance(module, torch._dynamo.eval_frame.OptimizedModule):
        return "it is compiled already; call fuse before compiling"
    return "it is a ScriptModule" if isinstance(module, torch.jit.ScriptModule) else None


def _own_forward(module: nn.Module) -> str | None:
    return "its forward was replaced on the instance" if "forward" in vars(module) else sealed(module)


def swap_refusal(norm: nn.Module) -> str | None:
    """Why ``norm`` cannot become one of :mod:`fusedres.nn`, or timm's get our forward."""
    ours = type(norm) in (nn.BatchNorm2d, *OWN_NORMS) or is_timms(norm)
    return _own_forward(norm) if ours else f"{type(norm).__name__} is not nn.BatchNorm2d"


def layer_refusal(layer: nn.Module) -> str | None:
    """Why a fused forward cannot stand for the call of ``layer``: a Linear, a LayerNorm or a BatchNorm."""
    kind = nn.LayerNorm if isinstance(layer, nn.LayerNorm) else nn.Linear
    if type(layer) is not kind and not isinstance(layer, _BatchNorm):
        return f"{type(layer).__name__} is not nn.{kind.__name__}"
    if is_hooked(layer):
        return "it has hooks"
    if isinstance(layer, _BatchNorm):
        return swap_refusal(layer)
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) != 1:
        return "it normalises over more than the last dimension"
    odd = [f"its {name} is a {type(p).__name__}" for name, p in layer.named_parameters() if not is_plain(p)]
    return _own_forward(layer) or (odd[0] if odd else None)


def root_refusal(module: nn.Module) -> str | None:
    """Why the forward of ``module`` cannot be rewritten, before anybody looks at it; hooks on it do not matter."""
    if type(module) in OWN_BLOCKS:
        return "it is fused by those who built it"
    if isinstance(module, fx.GraphModule):
        return "its forward is generated"
    return _own_forward(module) or (None if _is_users(module) else f"{type(module).__name__} is a wrapper of PyTorch's")


def leaf_reason(module: nn.Module) -> str | None:
    """Why a graph calls ``module`` and does not go into it; ``""`` where it is PyTorch's or ours."""
    reason = _own_forward(module) or ("it has hooks" if is_hooked(module) else None)
    if reason is not None:
        return reason
    if isinstance(module, (_BatchNorm, nn.LayerNorm, BatchNormActMaxPool2d, *OWN_BLOCKS)):
        return ""
    own = type(module).__module__.startswith("torch.nn.modules.") or not module._modules
    return "" if own and not _is_users(module) and not isinstance(module, fx.GraphModule) else root_refusal(module)


def _is_users(module: nn.Module) -> bool:
    """Whether the forward of ``module`` is Python of a user's, or calls the parts of an nn.Sequential."""
    forward = kind_of(module).forward
    return forward is nn.Sequential.forward or not is_torchs(getattr(forward, "__module__", ""))


def has_forward(module: nn.Module) -> bool:
    """Whether ``module`` has one to rewrite; containers may, such as torchvision's IntermediateLayerGetter."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return kind_of(module).forward is not nn.Module.forward
    return not isinstance(module, (_BatchNorm, nn.LayerNorm))


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Like ``named_modules``, without what is below compiled and scripted modules."""
    seen: set[nn.Module] = set()
    pending = [("", model)]
    while pending:
        name, module = pending.pop()
        if module not in seen:
            seen.add(module)
            yield name, module
            children = [] if sealed(module) else list(module.named_children())
            pending += [(f"{name}.{child}" if name else child, part) for child, part in reversed(children)]


@contextlib.contextmanager
def original_classes(model: nn.Module) -> Iterator[None]:
    """The roots of regions as they were before."""
    fused = [module for module in model.modules() if original_class(module) and not isinstance(module, _BatchNorm)]
    classes = [type(module) for module in fused]
    for module in fused:
        module.__class__ = kind_of(module)
    try:
        yield
    finally:
        for module, current in zip(fused, classes, strict=True):
            module.__class__ = current
