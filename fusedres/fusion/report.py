"""explain: what is fused, what would be, and why not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.functional import layer_norm_refusal, refusal
from fusedres.fusion.blocks import FusedBlock, is_intact
from fusedres.fusion.chains import Chain, norms_that_add
from fusedres.fusion.convert import is_taken
from fusedres.fusion.foreign import is_foreign
from fusedres.fusion.pairs import is_native
from fusedres.fusion.plan import OWN_BLOCKS, Plan, make_plans, own_layers, swap_refusal, walk
from fusedres.fusion.reads import mentions
from fusedres.fusion.rewriting import Call
from fusedres.fusion.savings import bytes_saved
from fusedres.fusion.shapes import Input, Sizes, measure
from fusedres.nn import BatchNormAct2d

COLUMNS = ("module", "pattern", "path", "reason")
SAVED = "bytes_saved"


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
            ``print``), ``path`` (``triton``, ``reference`` or, for what is left alone, ``eager``), ``reason`` and
            ``bytes_saved`` (an int, or ``None`` where it is not known; see :func:`explain`).
        bytes_saved: the sum of the rows'; ``None`` without an input.
        note: why not all is known, where a forward could not be followed to its end.
    """

    def __init__(self, rows: list[dict[str, Any]], step: str | None = None, note: str = "") -> None:
        self.rows = rows
        self.note = note
        self.bytes_saved = sum(row[SAVED] or 0 for row in rows) if step else None
        self._step = step

    def __str__(self) -> str:
        columns = (*COLUMNS[:3], SAVED, *COLUMNS[3:]) if self._step else COLUMNS
        table = [columns, *(tuple(_cell(row[column]) for column in columns) for row in self.rows)]
        if self._step:
            table.append(("total", "", "", _cell(self.bytes_saved), ""))
        widths = [max(len(cells[column]) for cells in table) for column in range(len(columns))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in table]
        return "\n".join([*(line.rstrip() for line in lines), *self._remarks()])

    __repr__ = __str__

    def _remarks(self) -> Iterator[str]:
        if self._step:
            runs = any(row["path"] == "triton" for row in self.rows)
            where = "" if runs else "; no kernel runs here, so this is for a device where they do"
            yield f"{SAVED}: predicted, for one {self._step} step{where}"
            unknown = sum(row[SAVED] is None for row in self.rows)
            if unknown:
                yield f"not known for {unknown} rows: {self.note or 'this input does not reach them as traced'}"


def explain(model: nn.Module, input: Input | None = None) -> Explanation:
    """What :func:`fuse` would do to ``model``, or, once it is fused, what it did; ``model`` is not changed.

    With ``input``, each row says how many bytes of memory traffic the fusion saves: those that eager PyTorch reads and
    writes in that operation less those of the kernels, in a training step (forward and backward) where the model is in
    training mode, else in an inference step. For BatchNorms it is

        (eager's passes - ours) * elements of the input * bytes an element,   less the bits of the ReLU's mask

    with the passes of the table in :mod:`fusedres.fusion.savings`; an ``add_bn`` is taken to have a sum that is read
    elsewhere too. A BatchNorm in evaluation mode counts as inference. For LayerNorm and Linear the passes are over
    their input and output, beside the products, which are the same on both sides. A prediction for devices and dtypes
    that kernels cover: 0 for other dtypes and for what is left alone, whatever ``path`` is. Sizes and dtypes are found
    by a forward over fake tensors, under the autocast that is on: nothing is computed, and parameters, buffers, random
    states, hooks (which are not run) and the model's own attributes stay as they are. ``None``, without ``input`` or
    where its value decides which way the forward goes.

    Args:
        model: any module.
        input: ``None``; a shape, of the model's dtype and device; a tensor, also of the meta device; a tuple of
            arguments or a dict of keyword arguments, each a shape, a tensor or any other value.

    Raises:
        ValueError: ``FUSEDRES_BACKEND`` is unknown.
        TypeError: ``input`` is of another kind.
        Exception: what the model's forward raises for ``input``.
    """
    sizes = None if input is None else measure(model, input)
    rows: list[dict[str, Any]] = []
    fused = any(isinstance(module, FusedBlock) or is_taken(module) for _, module in walk(model))
    for entry in _entries(model, fused):
        row = _row(entry, fused)
        rows.append(row | {SAVED: None if sizes is None else _saved(entry, row["path"], sizes)})
    step = "training" if model.training else "inference"
    return Explanation(rows, step if sizes else None, sizes.stopped if sizes else "")


@dataclass(frozen=True)
class _Entry:
    """What a row is about: a call in ``block`` of ``module``, the ``place``-th of ``count`` there."""

    name: str
    call: Call
    module: nn.Module
    block: nn.Module
    place: int = 0
    count: int = 1


def _entries(model: nn.Module, fused: bool) -> Iterator[_Entry]:
    names = {module: name for name, module in walk(model)}
    seen: set[nn.Module] = set()
    plans = make_plans(model)
    adding = norms_that_add(_current_chains(plans, fused))
    for plan in plans:
        children = dict(plan.block.named_modules(remove_duplicate=False))
        calls = _current_calls(plan, fused)
        paths = [call.module for call in calls if call.pattern != "print"]
        places = {path: iter(range(paths.count(path))) for path in paths}
        for call in calls:
            module = children[call.module]
            if module in adding and call.pattern in ("bn", "bn_act"):
                adding.remove(module)  # by the first of its calls
                call = replace(call, pattern=f"add_{call.pattern}")
            seen.add(module)
            place = 0 if call.pattern == "print" else next(places[call.module])
            yield _Entry(
                names.get(module, call.module), call, module, plan.block, place, paths.count(call.module)
            )  # fmt: skip
    reasons = {plan.name: plan.reason for plan in plans}
    for norm, name in names.items():
        if isinstance(norm, _BatchNorm) and norm not in seen:
            reason = _owner_reason(name, reasons)
            if reason is not None:
                yield _Entry(name, Call(name, "bn", reason), norm, norm)
    for plan in plans:
        for module in _layer_norms_left_alone(plan):
            if module in names and module not in seen:
                call = Call("", "ln", f"{plan.name or 'the model'}: {plan.reason}")
                yield _Entry(names[module], call, module, module)


def _saved(entry: _Entry, path: str, sizes: Sizes) -> int | None:
    """Over all calls of the block; ``None`` where they are not those that were traced."""
    call, module, block = entry.call, entry.module, entry.block
    if path in ("", "eager") or call.pattern in ("bn", "ln"):
        return 0
    calls = [record.get(module, []) for record in sizes.blocks.get(block, [])]
    if not calls or any(len(made) != entry.count for made in calls):
        return None
    training = (module if isinstance(module, _BatchNorm) else block).training
    device, _ = _device_and_dtype(module, block)
    saved = [bytes_saved(call, made[entry.place], training, device) for made in calls]
    return None if None in saved else sum(filter(None, saved))


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
    return isinstance(module, BatchNormAct2d) and not is_taken(module)


def _row(entry: _Entry, fused: bool) -> dict[str, Any]:
    call, module, path, reason = entry.call, entry.module, "", entry.call.reason
    if call.pattern != "print":
        left_alone = _row_refusal(call, module, fused)
        refused = _kernel_refusal(module, entry.block) if left_alone is None else None
        path = "eager" if left_alone is not None else "reference" if refused else "triton"
        reason = "; ".join(dict.fromkeys(filter(None, (left_alone, refused, call.reason))))
    return {"module": entry.name, "pattern": call.pattern, "path": path, "reason": reason}


def _cell(value: Any) -> str:
    return "?" if value is None else f"{value:,}" if isinstance(value, int) else value


def _row_refusal(call: Call, module: nn.Module, fused: bool) -> str | None:
    """Why ``module`` runs as PyTorch's own; ``None`` where it does not."""
    if _unfused(call) == "ln":
        return call.reason if call.pattern == "ln" else None
    if is_foreign(module) and call.pattern != "bn":
        return None
    left_alone = swap_refusal(module)
    if left_alone is None and fused and not isinstance(module, BatchNormAct2d):
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
