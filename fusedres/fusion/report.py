"""explain: what is fused, what would be, and why not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.functional import layer_norm_refusal, refusal
from fusedres.fusion.blocks import FusedBlock, is_intact
from fusedres.fusion.chains import Chain, norms_that_add
from fusedres.fusion.convert import is_taken
from fusedres.fusion.foreign import TakenNorm, foreign_pattern, is_timms
from fusedres.fusion.pairs import is_native
from fusedres.fusion.plan import OWN_BLOCKS, Plan, make_plans, own_layers, swap_refusal, walk
from fusedres.fusion.reads import mentions
from fusedres.fusion.rewriting import Call
from fusedres.nn import BatchNormAct2d

COLUMNS = ("module", "pattern", "path", "reason")


class Explanation:
    """A row for each call of a BatchNorm, for LayerNorms beside a Linear, and for each print that is dropped.

    ``str`` is a table of them.

    A LayerNorm and a Linear are one row, ``ln_linear_act`` or ``linear_ln_act`` in the order in which they run, under
    the name of the LayerNorm, or of the block that calls ``F.layer_norm``. The pattern's name is the same with and
    without ReLU or addition: ``reason`` says ``no ReLU`` (and what follows instead) and ``with the addition``. A
    LayerNorm that is left alone is ``ln``, and has a row only where a Linear is in front of or behind it, at most one
    operation away, or may be: beside a Linear in a block whose forward is left alone.

    Attributes:
        rows: dicts of ``module`` (qualified name; the block's for a print), ``pattern`` (``bn``, ``bn_act``,
            ``bn_add``, ``bn_add_act``, ``add_bn``, ``add_bn_act``, ``ln``, ``ln_linear_act``, ``linear_ln_act`` or
            ``print``), ``path`` (``triton``, ``reference`` or, for what is left alone, ``eager``) and ``reason``.
    """

    def __init__(self, rows: list[dict[str, str]]) -> None:
        self.rows = rows

    def __str__(self) -> str:
        table = [COLUMNS, *(tuple(row[column] for column in COLUMNS) for row in self.rows)]
        widths = [max(len(cells[column]) for cells in table) for column in range(len(COLUMNS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in table]
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__


def explain(model: nn.Module) -> Explanation:
    """What :func:`fuse` would do to ``model``, or, once it is fused, what it did; ``model`` is not changed.

    Raises:
        ValueError: ``FUSEDRES_BACKEND`` is unknown.
    """
    names = {module: name for name, module in walk(model)}
    fused = any(isinstance(module, FusedBlock) or is_taken(module) for module in names)
    rows: list[dict[str, str]] = []
    seen: set[nn.Module] = set()
    plans = make_plans(model)
    adding = norms_that_add(_current_chains(plans, fused))
    for plan in plans:
        children = dict(plan.block.named_modules(remove_duplicate=False))
        for call in _current_calls(plan, fused):
            module = children[call.module]
            if module in adding and call.pattern in ("bn", "bn_act"):
                adding.remove(module)  # by the first of its calls
                call = replace(call, pattern=f"add_{call.pattern}")
            seen.add(module)
            rows.append(_row(names.get(module, call.module), call, module, plan.block, fused))
    reasons = {plan.name: plan.reason for plan in plans}
    for norm, name in names.items():
        if isinstance(norm, _BatchNorm) and norm not in seen:
            reason = _owner_reason(name, reasons)
            if reason is not None:
                pattern, why = foreign_pattern(norm) if is_timms(norm) else ("bn", "")
                call = Call(name, pattern, "; ".join(filter(None, (reason, why))))
                rows.append(_row(name, call, norm, norm, fused))
    for plan in plans:
        for module in _layer_norms_left_alone(plan):
            if module in names and module not in seen:
                call = Call("", "ln", f"{plan.name or 'the model'}: {plan.reason}")
                rows.append(_row(names[module], call, module, module, fused))
    return Explanation(rows)


def _current_calls(plan: Plan, fused: bool) -> tuple[Call, ...]:
    """The calls as the block makes them now, or, where nothing is fused yet, as it would."""
    block = plan.block
    if not fused:
        return plan.calls
    if isinstance(block, FusedBlock) and is_intact(block):
        return block._fusedres_code.calls
    why = "a module or an attribute has changed since" if isinstance(block, FusedBlock) else "its block was left alone"
    return tuple(
        call if call.pattern in ("bn", "ln") or _is_own(plan, call) else Call(call.module, _unfused(call), why)
        for call in plan.calls
        if call.pattern != "print"
    )


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


def _unfused(call: Call) -> str:
    return "ln" if "ln" in call.pattern.split("_") else "bn"


def _is_own(plan: Plan, call: Call) -> bool:
    if type(plan.block) in OWN_BLOCKS:
        return True
    module = plan.block.get_submodule(call.module)
    return is_timms(module) or (isinstance(module, BatchNormAct2d) and not is_taken(module))


def _row(name: str, call: Call, module: nn.Module, block: nn.Module, fused: bool) -> dict[str, str]:
    path, reason = "", call.reason
    if call.pattern != "print":
        left_alone = _row_refusal(call, module, fused)
        refused = _kernel_refusal(module, block) if left_alone is None else None
        path = "eager" if left_alone is not None else "reference" if refused else "triton"
        reason = "; ".join(dict.fromkeys(filter(None, (left_alone, refused, call.reason))))
    return {"module": name, "pattern": call.pattern, "path": path, "reason": reason}


def _row_refusal(call: Call, module: nn.Module, fused: bool) -> str | None:
    """Why ``module`` runs as PyTorch's own; ``None`` where it does not."""
    if _unfused(call) == "ln":
        return call.reason if call.pattern == "ln" else None
    left_alone = swap_refusal(module)
    if left_alone is None and fused and not isinstance(module, (BatchNormAct2d, TakenNorm)):
        left_alone = "filter_fn, or added since"
    return left_alone


def _kernel_refusal(module: nn.Module, block: nn.Module) -> str | None:
    """Why the reference runs in place of a kernel, as far as that is known without an input."""
    reason = refusal(*_device_and_dtype(module, block))
    if reason is None and isinstance(module, nn.LayerNorm):
        return layer_norm_refusal(module.normalized_shape[-1])
    return reason


def _layer_norms_left_alone(plan: Plan) -> Iterator[nn.Module]:
    """LayerNorms beside a Linear in a block whose graph is not known; the block itself where it calls functions."""
    layers, kind = list(own_layers(plan.block)), type(plan.block)
    if plan.reason and (any(isinstance(layer, nn.Linear) for layer in layers) or mentions(kind, "linear")):
        norms = [layer for layer in layers if isinstance(layer, nn.LayerNorm)]
        yield from norms or [plan.block] * mentions(kind, "layer_norm")


def _device_and_dtype(*modules: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Those of the parameters or buffers of the first that has any, for want of an input."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device, tensor.dtype
    return torch.empty(0).device, torch.get_default_dtype()


def _owner_reason(name: str, reasons: dict[str, str]) -> str | None:
    """Why no graph shows a call of ``name``; ``None`` where graphs of all around it show that there is none."""
    owners = ["", *(name[:end] for end, letter in enumerate(name) if letter == ".")]
    owners = [owner for owner in owners if owner in reasons and owner != name]
    for owner in reversed(owners):
        if reasons[owner]:
            return f"{owner or 'the model'}: {reasons[owner]}"
    return None if owners else "no forward around it"
