"""explain: what is fused, what would be, and why not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.functional import layer_norm_refusal, path_for, pool_refusal, refusal
from fusedres.fusion.entries import Entry, find_entries, unfused
from fusedres.fusion.foreign import TakenNorm
from fusedres.fusion.plan import sealed, swap_refusal
from fusedres.fusion.rewriting import Call
from fusedres.fusion.savings import bytes_saved, window
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
            ``bn_add``, ``bn_add_act``, ``add_bn``, ``add_bn_act``, ``bn_add_bn``, ``bn_add_bn_act``,
            ``bn_act_maxpool``, any but those after ``bn_add_act`` with ``_avgpool``, ``ln``, ``ln_linear_act``,
            ``linear_ln_act`` or ``print``), ``path`` (``triton``, ``reference``; ``raises`` where
            ``FUSEDRES_BACKEND=triton`` and no kernel covers it; ``eager`` for what is left alone), ``reason`` and
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
    for entry in find_entries(model):
        row = _row(entry)
        rows.append(row | {SAVED: None if sizes is None else _saved(entry, row["path"], sizes)})
    step = "training" if model.training else "inference"
    return Explanation(rows, step if sizes else None, sizes.stopped if sizes else "")


def _saved(entry: Entry, path: str, sizes: Sizes) -> int | None:
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


def _row(entry: Entry) -> dict[str, Any]:
    call, module, path, reason = entry.call, entry.module, "", entry.call.reason
    pattern = call.pattern
    if call.pattern != "print":
        left_alone = entry.left_alone or _row_refusal(call, module, entry.fused)
        refused = _kernel_refusal(call, module, entry.block) if left_alone is None else None
        pattern = pattern if left_alone is None else unfused(call)
        path = "eager" if left_alone is not None else path_for(refused)
        forks = "the gradients of its readers are added in its backward" if call.forks and path != "eager" else None
        reason = "; ".join(dict.fromkeys(filter(None, (left_alone, refused, call.reason, forks))))
    return {"module": entry.name, "pattern": pattern, "path": path, "reason": reason}


def _cell(value: Any) -> str:
    return "?" if value is None else f"{value:,}" if isinstance(value, int) else value


def _row_refusal(call: Call, module: nn.Module, fused: bool) -> str | None:
    """Why ``module`` runs as PyTorch's own; ``None`` where it does not."""
    if unfused(call) == "ln":
        return call.reason if call.pattern == "ln" else None
    left_alone = swap_refusal(module)
    if left_alone is None and fused and not isinstance(module, (BatchNormAct2d, TakenNorm)):
        left_alone = "filter_fn, or added since"
    return None if _is_derived(module) else left_alone


def _is_derived(module: nn.Module) -> bool:
    """Whether it runs our forward in a class that others made since, as parametrization and FSDP2 do."""
    ours = type(module).forward in (BatchNormAct2d.forward, TakenNorm.forward)
    return ours and "forward" not in vars(module) and sealed(module) is None


def _kernel_refusal(call: Call, module: nn.Module, block: nn.Module) -> str | None:
    """Why the reference runs in place of a kernel, as far as that is known without an input."""
    reason = refusal(*_device_and_dtype(module, block))
    if reason is None and isinstance(module, nn.LayerNorm):
        return layer_norm_refusal(module.normalized_shape[-1])
    if reason is None and call.window is not None and call.pattern.endswith("_maxpool"):
        kernel, _, _, dilation, ceil_mode = window(call)
        return pool_refusal(kernel, dilation, ceil_mode)
    return reason


def _device_and_dtype(*modules: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Those of the parameters or buffers of the first that has any, for want of an input."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device, tensor.dtype
    return torch.empty(0).device, torch.get_default_dtype()
