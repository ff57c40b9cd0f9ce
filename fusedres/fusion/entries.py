"""What a report has rows for: each call of a normalisation in a model, as it is made or as it would be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.fusion.convert import is_taken
from fusedres.fusion.derived import kind_of
from fusedres.fusion.foreign import TakenNorm, is_timms, timms_pattern
from fusedres.fusion.install import FusedRegion
from fusedres.fusion.options import FUSIONS, Options
from fusedres.fusion.refusals import original_classes, own_call, sealed, swap_refusal, walk
from fusedres.fusion.region import Plan, make_plans
from fusedres.fusion.rewriting import Call
from fusedres.fusion.state import State
from fusedres.nn import BatchNormAct2d, SyncBatchNormAct


@dataclass(frozen=True)
class Entry:
    """What a row is about: ``call`` in ``block`` of ``module``; ``eager`` is why PyTorch's own runs, if it does."""

    name: str
    call: Call
    module: nn.Module
    block: nn.Module
    eager: str | None = None


def find_entries(model: nn.Module) -> Iterator[Entry]:
    """All of ``model``, region by region; what no graph shows, and what is compiled or scripted, comes last."""
    names = {module: name for name, module in walk(model)}
    fused = _is_fused(model)
    # What fuse left alone calls layers.
    options = Options(FUSIONS - {"linear"}) if fused else Options()
    with original_classes(model):
        plans = [plan for plan in make_plans(model, set(), options, not fused) if sealed(plan.module) is None]
        kept = {part for root in names if "_fusedres_region" in vars(root) for part in root.modules()}
        entries = [entry for plan in plans for entry in _shown(plan, names, fused and plan.module not in kept)]
        shown = {entry.module for entry in entries}.union(*(plan.reached for plan in plans))
        entries += _not_shown(plans, {module: name for module, name in names.items() if module not in shown})
    for entry in entries:
        yield replace(entry, eager=entry.eager or _why_eager(entry, fused))
    for module, name in names.items():
        if sealed(module) is not None and not isinstance(module, _BatchNorm):
            yield from _sealed(name, module)


def unfused(call: Call) -> str:
    """The pattern's normalisation alone."""
    return "ln" if "ln" in call.pattern.split("_") else "bn"


def _is_fused(model: nn.Module) -> bool:
    return any(isinstance(module, FusedRegion) or is_taken(module) for _, module in walk(model))


def _why_eager(entry: Entry, fused: bool) -> str | None:
    call, module = entry.call, entry.module
    if unfused(call) == "ln":
        return call.reason if call.pattern == "ln" else None
    ours = isinstance(module, (BatchNormAct2d, TakenNorm))
    # Also in a class that others made since, as parametrization and FSDP2 do.
    if ours and type(module).forward in (BatchNormAct2d.forward, TakenNorm.forward) and "forward" not in vars(module):
        return sealed(module)
    return swap_refusal(module) or ("filter_fn, or added since" if fused and not ours else None)


def _shown(plan: Plan, names: dict[nn.Module, str], left: bool) -> Iterator[Entry]:
    """What the graphs of a region, or those who built a block, call; ``left`` is whether fuse left it alone."""
    root, own = plan.module, own_call(plan.module)
    codes = [[own]] if own else [list(code.calls) for code in plan.codes]
    for call in _merged([[now for call in calls for now in _now(root, call, left)] for calls in codes]):
        module = root.get_submodule(call.module)
        if call.partner:
            partner = root.get_submodule(call.partner)
            call = replace(call, reason=f"with {names.get(partner, call.partner)}")
        yield Entry(names.get(module, call.module), call, module, root)


def _now(root: nn.Module, call: Call, left: bool) -> list[Call]:
    """``call`` as it is made: ranks share the statistics of a layer alone, and what was ``left`` alone calls layers."""
    norm, partner = root.get_submodule(call.module), root.get_submodule(call.partner or call.module)
    own = call.own or is_timms(norm) or (isinstance(norm, BatchNormAct2d) and not is_taken(norm))
    if left and not own and call.pattern not in ("bn", "ln"):
        return [Call(call.module, unfused(call), "its block was left alone")]
    if not isinstance(norm, SyncBatchNormAct) and not isinstance(partner, SyncBatchNormAct):
        return [call]
    if call.partner:
        return [Call(call.module, call.pattern.replace("_bn", "", 1)), Call(call.partner, "bn")]
    pattern = call.pattern.removesuffix("_maxpool").removesuffix("_avgpool")
    return [Call(call.module, pattern, "" if call.recomputes else call.reason)]


def _merged(codes: list[list[Call]]) -> list[Call]:
    """The calls of both modes; where they differ, the reason says which mode a row is for."""
    modes = [("training", codes[0], codes[-1]), ("evaluation", codes[-1], codes[0])] if codes else []
    return [
        call if call in other else replace(call, reason=": ".join(filter(None, (f"in {mode} only", call.reason))))
        for mode, calls, other in modes
        for call in calls
        if mode == "training" or call not in other
    ]


def _not_shown(plans: list[Plan], names: dict[nn.Module, str]) -> Iterator[Entry]:
    """Of modules that no graph shows, as a forward around them is left alone, and of functions in such forwards."""
    for module, name in names.items():
        around = [plan for plan in plans if not plan.name or name.startswith(f"{plan.name}.")]
        inner = max(around, key=lambda plan: len(plan.name), default=None)
        reason = f"{inner.name or 'the model'}: {inner.reason}" if inner else "no forward around it"
        if isinstance(module, fx.GraphModule):
            called = [str(node.target) for node in module.graph.nodes]
            norms = [function for function in called if re.match(r"aten\..*batch_norm|<function batch_norm ", function)]
            yield from (Entry(name, Call("", "bn"), module, module, "its forward is generated") for _ in norms)
        elif inner and not inner.reason:
            continue  # a region that does not call it
        elif isinstance(module, _BatchNorm):
            pattern, why = timms_pattern(module) if is_timms(module) else ("bn", "")
            yield Entry(name, Call("", pattern, "; ".join(filter(None, (reason, why)))), module, module)
        elif isinstance(module, nn.LayerNorm) and inner and any(type(p) is nn.Linear for p in inner.module.modules()):
            yield Entry(name, Call("", "ln", reason), module, module)
    for plan in plans:
        codes = [getattr(vars(kind).get("forward"), "__code__", None) for kind in kind_of(plan.module).__mro__]
        if plan.reason and any("layer_norm" in code.co_names for code in codes if code is not None):
            yield Entry(plan.name, Call("", "ln", plan.reason), plan.module, plan.module)


def _sealed(name: str, module: nn.Module) -> Iterator[Entry]:
    """What a compiled or scripted ``module`` holds: patterns where it was fused before, else left alone."""
    reason = f"{name or 'the model'}: {sealed(module)}"
    if isinstance(module, torch.jit.ScriptModule):
        kinds = {path: getattr(part, "original_name", "") for path, part in module.named_modules(prefix=name)}
        norms = {path: kind for path, kind in kinds.items() if "BatchNorm" in kind or kind == "LayerNorm"}
        for path, kind in norms.items():
            if kind != "LayerNorm" or "Linear" in kinds.values():
                yield Entry(path, Call("", "ln" if kind == "LayerNorm" else "bn"), module, module, reason)
        return
    inner = getattr(module, "_orig_mod", module)
    prefix = [name] if inner is module else [name, "_orig_mod"]
    state = State(inner)
    vars(inner).pop("_compiled_call_impl", None)
    try:
        fused, entries = _is_fused(inner), list(find_entries(inner))
    finally:
        state.restore()
    for entry in entries:
        own = fused or entry.call.own or isinstance(entry.module, BatchNormAct2d)
        eager = entry.eager if own else entry.eager or reason
        yield replace(entry, name=".".join(filter(None, (*prefix, entry.name))), eager=eager)
