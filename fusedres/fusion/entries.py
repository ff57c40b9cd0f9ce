"""What a report has rows for: each call of a normalisation in a model, as it is made or as it would be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.fusion.blocks import FusedBlock, is_intact
from fusedres.fusion.chains import Chain, calls_by_end, norms_that_add, with_ends
from fusedres.fusion.convert import is_taken
from fusedres.fusion.foreign import foreign_pattern, is_timms
from fusedres.fusion.options import FUSIONS, Options
from fusedres.fusion.pairs import is_native
from fusedres.fusion.plan import OWN_BLOCKS, Plan, make_plans, own_layers, sealed, walk
from fusedres.fusion.reads import mentions
from fusedres.fusion.rewriting import Call
from fusedres.nn import BatchNormAct2d, SyncBatchNormAct


@dataclass(frozen=True)
class Entry:
    """What a row is about: a call in ``block`` of ``module``, the ``place``-th of ``count`` there.

    ``partner`` is the other BatchNorm of a join, ``fused`` whether the model is; ``left_alone`` is why nothing below a
    compiled or scripted module is touched.
    """

    name: str
    call: Call
    module: nn.Module
    block: nn.Module
    place: int = 0
    count: int = 1
    partner: nn.Module | None = None
    fused: bool = False
    left_alone: str | None = None


def find_entries(model: nn.Module) -> Iterator[Entry]:
    """All of ``model``, in the order of its blocks; what is in compiled, scripted or generated ones comes last."""
    fused = any(isinstance(module, FusedBlock) or is_taken(module) for _, module in walk(model))
    names = {module: name for name, module in walk(model)}
    # What a fused block does is in its code; one that fuse left alone calls layers. LayerNorms are found with a Linear
    # beside them.
    options = Options(FUSIONS - {"linear"}) if fused else Options()
    plans = [plan for plan in make_plans(model, options=options) if sealed(plan.block) is None]
    found = [*_calls(plans, names, fused)]
    seen = {module for entry in found for module in (entry.module, entry.partner) if module is not None}
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


def _calls(plans: list[Plan], names: dict[nn.Module, str], fused: bool) -> Iterator[Entry]:
    chains = _current_chains(plans, fused)
    adding, ends = norms_that_add(chains), calls_by_end(chains)
    inlined = {plan.block.get_submodule(path) for plan in plans for path, _ in _current_sequences(plan, fused)}
    for plan in plans:
        if plan.block in inlined:  # its calls are its parent's
            continue
        children = dict(plan.block.named_modules(remove_duplicate=False))
        current = [now for call in _current_calls(plan, fused) for now in _as_called(plan.block, call)]
        calls = with_ends(current, {maker: end for (block, maker), end in ends.items() if block is plan.block})
        paths = [call.module for call in calls if call.pattern != "print"]
        places = {path: iter(range(paths.count(path))) for path in paths}
        for call in calls:
            module = children[call.module]
            if module in adding and call.pattern in ("bn", "bn_act"):
                adding.remove(module)  # by the first of its calls
                call = replace(call, pattern=f"add_{call.pattern}")
            place = 0 if call.pattern == "print" else next(places[call.module])
            partner = children[call.partner] if call.partner else None
            if partner is not None:
                call = replace(call, reason=f"with {names.get(partner, call.partner)}")
            owner = children.get(call.module.rpartition(".")[0]) if call.module else None
            block = owner if owner in inlined else plan.block  # who calls it in the original forward
            yield Entry(names.get(module, call.module), call, module, block, place, paths.count(call.module), partner)


def _calls_not_found(plans: list[Plan], names: dict[nn.Module, str], found: set[nn.Module]) -> Iterator[Entry]:
    """Of normalisations that no graph shows, because a forward around them is left alone."""
    reasons = {plan.name: plan.reason for plan in plans}
    for norm, name in names.items():
        if isinstance(norm, _BatchNorm) and norm not in found:
            reason = _owner_reason(name, reasons)
            if reason is not None:
                pattern, why = foreign_pattern(norm) if is_timms(norm) else ("bn", "")
                yield Entry(name, Call(name, pattern, "; ".join(filter(None, (reason, why)))), norm, norm)
    for plan in plans:
        for module in _layer_norms_left_alone(plan):
            if module in names and module not in found:
                call = Call("", "ln", f"{plan.name or 'the model'}: {plan.reason}")
                yield Entry(names[module], call, module, module)


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
        elif entry.call.pattern != "print":
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


def _current_calls(plan: Plan, fused: bool) -> tuple[Call, ...]:
    """The calls as the block makes them now, or, where nothing is fused yet, as it would."""
    block = plan.block
    if not fused:
        return plan.calls
    if isinstance(block, FusedBlock) and is_intact(block):
        return block._fusedres_code.calls
    why = "a module or an attribute has changed since" if isinstance(block, FusedBlock) else "its block was left alone"
    return tuple(
        call if call.pattern in ("bn", "ln") or _is_own(plan, call) else Call(call.module, unfused(call), why)
        for call in plan.calls
        if call.pattern != "print"
    )


def _as_called(block: nn.Module, call: Call) -> list[Call]:
    """``call`` as it is now: timm's norms look at their own parts each time, ranks share those of a layer alone."""
    module = block.get_submodule(call.module)
    if is_timms(module) and call.pattern in ("bn", "bn_act"):
        pattern, reason = foreign_pattern(module)
        return [call if pattern == call.pattern else replace(call, pattern=pattern, reason=reason)]
    if not any(
        isinstance(norm, SyncBatchNormAct) for norm in (module, block.get_submodule(call.partner or call.module))
    ):
        return [call]
    if call.partner:
        return [Call(call.module, call.pattern.replace("_bn", "", 1)), Call(call.partner, "bn")]
    pattern = call.pattern.removesuffix("_maxpool")
    return [replace(call, pattern=pattern, recomputes=False, reason="" if call.recomputes else call.reason)]


def _current_chains(plans: list[Plan], fused: bool) -> dict[nn.Module, Chain]:
    """How the blocks pass pairs on now, or as they would."""
    chains: dict[nn.Module, Chain] = {}
    for plan in plans:
        block, chain = plan.block, plan.chain
        if isinstance(block, FusedBlock):
            chain = block._fusedres_code.chain if is_intact(block) else None
        elif fused and not is_native(block):
            chain = None
        if chain is not None:
            chains[block] = chain
    return chains


def _current_sequences(plan: Plan, fused: bool) -> tuple[tuple[str, int], ...]:
    """The nn.Sequential whose children the block calls itself, or would."""
    block = plan.block
    if not fused:
        return () if plan.code is None else plan.code.sequences
    return block._fusedres_code.sequences if isinstance(block, FusedBlock) and is_intact(block) else ()


def _is_own(plan: Plan, call: Call) -> bool:
    if type(plan.block) in OWN_BLOCKS:
        return True
    module = plan.block.get_submodule(call.module)
    return is_timms(module) or (isinstance(module, BatchNormAct2d) and not is_taken(module))


def _layer_norms_left_alone(plan: Plan) -> Iterator[nn.Module]:
    """LayerNorms beside a Linear in a block whose graph is not known; the block itself where it calls functions."""
    layers, kind = list(own_layers(plan.block)), type(plan.block)
    if plan.reason and (any(isinstance(layer, nn.Linear) for layer in layers) or mentions(kind, "linear")):
        norms = [layer for layer in layers if isinstance(layer, nn.LayerNorm)]
        yield from norms or [plan.block] * mentions(kind, "layer_norm")


def _owner_reason(name: str, reasons: dict[str, str]) -> str | None:
    """Why no graph shows a call of ``name``; ``None`` where graphs of all around it show that there is none."""
    owners = ["", *(name[:end] for end, letter in enumerate(name) if letter == ".")]
    owners = [owner for owner in owners if owner in reasons and owner != name]
    for owner in reversed(owners):
        if reasons[owner]:
            return f"{owner or 'the model'}: {reasons[owner]}"
    return None if owners else "no forward around it"
