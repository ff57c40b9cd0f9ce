"""What a report has rows for: each call of a normalisation in a model, as it is made or as it would be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.fusion.convert import is_taken
from fusedres.fusion.derived import kind_of
from fusedres.fusion.foreign import is_timms, timms_pattern
from fusedres.fusion.install import FusedRegion
from fusedres.fusion.options import FUSIONS, Options
from fusedres.fusion.refusals import OWN_BLOCKS, original_classes, own_call, sealed, walk
from fusedres.fusion.region import Plan, make_plans
from fusedres.fusion.rewriting import Call
from fusedres.nn import BatchNormAct2d, SyncBatchNormAct


@dataclass(frozen=True)
class Entry:
    """What a row is about: a call in ``block`` of ``module``, the ``place``-th of ``count`` there.

    ``fused`` is whether the model is; ``left_alone`` is why nothing below a compiled or scripted module is touched.
    """

    name: str
    call: Call
    module: nn.Module
    block: nn.Module
    place: int = 0
    count: int = 1
    fused: bool = False
    left_alone: str | None = None


def find_entries(model: nn.Module) -> Iterator[Entry]:
    """All of ``model``, in the order of its regions; what is in compiled, scripted or generated ones comes last."""
    fused = any(isinstance(module, FusedRegion) or is_taken(module) for _, module in walk(model))
    names = {module: name for name, module in walk(model)}
    # What fuse left alone calls layers.
    options = Options(FUSIONS - {"linear"}) if fused else Options()
    with original_classes(model):
        plans = [p for p in make_plans(model, set(), options, not fused) if sealed(p.module) is None]
        roots = [module for module in names if "_fusedres_region" in vars(module)]
        kept = {part for root in roots for part in root.modules()}
        found = [entry for plan in plans for entry in _calls(plan, names, fused, plan.module in kept)]
        seen = {entry.module for entry in found}
        seen |= {p.module.get_submodule(c.partner) for p in plans for code in p.codes for c in code.calls if c.partner}
        found += _calls_not_found(plans, names, seen)
    for entry in found:
        yield replace(entry, fused=fused)
    for module, name in names.items():
        if sealed(module) is not None and not isinstance(module, _BatchNorm):
            yield from _sealed_entries(name, module)
        elif isinstance(module, fx.GraphModule):
            yield from (
                Entry(name, Call("", "bn"), module, module, left_alone="its forward is generated")
                for node in module.graph.nodes
                if node.target is F.batch_norm or ("aten." in str(node.target) and "batch_norm" in str(node.target))
            )


def unfused(call: Call) -> str:
    """The pattern's normalisation alone."""
    return "ln" if "ln" in call.pattern.split("_") else "bn"


def _calls(plan: Plan, names: dict[nn.Module, str], fused: bool, inside: bool) -> Iterator[Entry]:
    root = plan.module
    own = own_call(root)
    if own is not None:
        norm = root.get_submodule(own.module)
        yield Entry(names.get(norm, own.module), own, norm, root)
        return
    left = fused and not inside
    made = [_now(root, call, left) for code in plan.codes[:1] for call in code.calls]
    other = [_now(root, call, left) for code in plan.codes[1:] for call in code.calls]
    calls = [now for call in _merged(made, other if len(plan.codes) > 1 else made) for now in _as_called(root, call)]
    paths = [call.module for call in calls]
    places = {path: iter(range(paths.count(path))) for path in paths}
    for call in calls:
        module = root.get_submodule(call.module)
        if call.partner:
            partner = root.get_submodule(call.partner)
            call = replace(call, reason=f"with {names.get(partner, call.partner)}")
        yield Entry(
            names.get(module, call.module), call, module, root, next(places[call.module]), paths.count(call.module)
        )


def _now(root: nn.Module, call: Call, left: bool) -> Call:
    """``call`` as it is made where the region around it was ``left`` alone."""
    norm = root.get_submodule(call.module)
    own = is_timms(norm) or (isinstance(norm, BatchNormAct2d) and not is_taken(norm))
    if not left or own or call.own or call.pattern in ("bn", "ln"):
        return call
    return Call(call.module, unfused(call), "its block was left alone")


def _merged(training: list[Call], evaluation: list[Call]) -> list[Call]:
    """The calls of both modes; where they differ, the reason says which mode a row is for."""
    if training == evaluation:
        return training
    return [
        replace(call, reason=": ".join(filter(None, (f"in {mode} only", call.reason)))) if call not in other else call
        for mode, calls, other in (("training", training, evaluation), ("evaluation", evaluation, training))
        for call in calls
        if mode == "training" or call not in other
    ]


def _as_called(root: nn.Module, call: Call) -> list[Call]:
    """``call`` as the runtime makes it: ranks share the statistics of a layer alone."""
    parts = (root.get_submodule(call.module), root.get_submodule(call.partner or call.module))
    if not any(isinstance(norm, SyncBatchNormAct) for norm in parts):
        return [call]
    if call.partner:
        return [Call(call.module, call.pattern.replace("_bn", "", 1)), Call(call.partner, "bn")]
    pattern = call.pattern.removesuffix("_maxpool").removesuffix("_avgpool")
    reason = "" if call.recomputes else call.reason
    return [replace(call, pattern=pattern, recomputes=False, forks=False, reason=reason)]


def _calls_not_found(plans: list[Plan], names: dict[nn.Module, str], found: set[nn.Module]) -> Iterator[Entry]:
    """Of normalisations that no graph shows, because a forward around them is left alone."""
    for norm, name in names.items():
        if norm in found or not isinstance(norm, (_BatchNorm, nn.LayerNorm)):
            continue
        around = [plan for plan in plans if not plan.name or name.startswith(f"{plan.name}.")]
        inner = max(around, key=lambda plan: len(plan.name), default=None)
        if inner is not None and not inner.reason:
            continue  # a region that does not call it
        reason = "no forward around it" if inner is None else _reason(inner)
        if isinstance(norm, _BatchNorm):
            pattern, why = timms_pattern(norm) if is_timms(norm) else ("bn", "")
            yield Entry(name, Call(name, pattern, "; ".join(filter(None, (reason, why)))), norm, norm)
        elif inner is not None and any(type(part) is nn.Linear for part in inner.module.modules()):
            yield Entry(name, Call("", "ln", reason), norm, norm)
    for plan in plans:
        codes = [getattr(kind.__dict__.get("forward"), "__code__", None) for kind in kind_of(plan.module).__mro__]
        if plan.reason and any("layer_norm" in code.co_names for code in codes if code is not None):
            yield Entry(plan.name, Call("", "ln", _reason(plan)), plan.module, plan.module)


def _reason(plan: Plan) -> str:
    return f"{plan.name or 'the model'}: {plan.reason}"


def _sealed_entries(name: str, module: nn.Module) -> Iterator[Entry]:
    """What a compiled or scripted ``module`` holds: patterns where it was fused before, else left alone."""
    reason = f"{name or 'the model'}: {sealed(module)}"
    if isinstance(module, torch.jit.ScriptModule):
        parts = {path: (getattr(part, "original_name", ""), part) for path, part in module.named_modules(prefix=name)}
        beside = any(kind == "Linear" for kind, _ in parts.values())
        for path, (kind, part) in parts.items():
            if "BatchNorm" in kind or (kind == "LayerNorm" and beside):
                pattern = "bn" if "BatchNorm" in kind else "ln"
                yield Entry(path, Call("", pattern), part, part, left_alone=reason)
        return
    inner = getattr(module, "_orig_mod", module)
    assert isinstance(inner, nn.Module)
    with _opened(inner):
        entries = list(find_entries(inner))
    for entry in entries:
        path = ".".join(filter(None, (name, "_orig_mod" if inner is not module else "", entry.name)))
        own = isinstance(entry.module, BatchNormAct2d) or type(entry.block) in OWN_BLOCKS
        if entry.fused or entry.left_alone or own:
            yield replace(entry, name=path)
        else:
            call = Call(entry.call.module, unfused(entry.call))
            yield replace(entry, name=path, call=call, left_alone=reason)


@contextlib.contextmanager
def _opened(module: nn.Module) -> Iterator[None]:
    """``module`` as if ``module.compile()`` had not been called."""
    compiled = vars(module).pop("_compiled_call_impl", None)
    try:
        yield
    finally:
        if compiled is not None:
            vars(module)["_compiled_call_impl"] = compiled
