"""explain: what is fused, what would be, and why not."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.functional import path_for, refusal
from fusedres.fusion.entries import Entry, find_entries, unfused
from fusedres.fusion.savings import bytes_saved, shape_refusal
from fusedres.fusion.shapes import Input, Seen, measure

COLUMNS = ("module", "pattern", "path", "reason")
SAVED = "bytes_saved"


class Explanation:
    """A row for each call of a BatchNorm, and for LayerNorms beside a Linear.

    ``str`` is a table of them.

    A LayerNorm and a Linear are one row, ``ln_linear_act`` or ``linear_ln_act`` in the order in which they run, under
    the name of the LayerNorm, or of the block that calls ``F.layer_norm``. The pattern's name is the same with and
    without ReLU or addition: ``reason`` says ``no ReLU`` (and what follows instead) and ``with the addition``. A
    LayerNorm that is left alone is ``ln``, and has a row only where a Linear is in front of or behind it, at most one
    operation away, or may be: beside a Linear in a block whose forward is left alone.

    Attributes:
        rows: dicts of ``module`` (qualified name), ``pattern`` (``bn``, ``bn_act``,
            ``bn_add``, ``bn_add_act``, ``add_bn``, ``add_bn_act``, ``bn_add_bn``, ``bn_add_bn_act``,
            ``bn_act_maxpool``, any but those after ``bn_add_act`` with ``_avgpool``, ``ln``, ``ln_linear_act`` or
            ``linear_ln_act``), ``path`` (``triton``, ``reference``; ``raises`` where
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
    sizes, note = ({}, "") if input is None else measure(model, input)
    entries = list(find_entries(model))
    counts, rows = Counter(entry.module for entry in entries), list[dict[str, Any]]()
    places = {module: itertools.count() for module in counts}
    for entry in entries:
        seen, place, count = sizes.get(entry.module, []), next(places[entry.module]), counts[entry.module]
        calls = [] if len(seen) % count else seen[place::count]  # else they are not those that were traced
        rows.append({**_row(entry), SAVED: None if input is None else _saved(entry, calls)})
    step = "training" if model.training else "inference"
    return Explanation(rows, None if input is None else step, note)


def _row(entry: Entry) -> dict[str, Any]:
    call, left_alone = entry.call, entry.eager is not None
    refused = None if left_alone else refusal(*_device_and_dtype(entry)) or shape_refusal(call, entry.module)
    path = "eager" if left_alone else path_for(refused)
    forks = "the gradients of its readers are added in its backward" if call.forks and not left_alone else None
    reason = "; ".join(dict.fromkeys(filter(None, (entry.eager, refused, call.reason, forks))))
    pattern = unfused(call) if left_alone else call.pattern
    return {"module": entry.name, "pattern": pattern, "path": path, "reason": reason}


def _saved(entry: Entry, calls: list[Seen]) -> int | None:
    """Over all calls."""
    if entry.eager is not None or entry.call.pattern in ("bn", "ln") or shape_refusal(entry.call, entry.module):
        return 0
    training = (entry.module if isinstance(entry.module, _BatchNorm) else entry.block).training
    saved = [bytes_saved(entry.call, seen, training, _device_and_dtype(entry)[0]) for seen in calls]
    return sum(filter(None, saved)) if saved and None not in saved else None


def _device_and_dtype(entry: Entry) -> tuple[torch.device, torch.dtype]:
    """Those of the first parameter or buffer of the layer, or else of its block, for want of an input."""
    tensors = (tensor for part in (entry.module, entry.block) for tensor in (*part.parameters(), *part.buffers()))
    first = next(tensors, torch.empty(0))
    return first.device, first.dtype


def _cell(value: Any) -> str:
    return "?" if value is None else f"{value:,}" if isinstance(value, int) else value
