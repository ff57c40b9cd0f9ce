"""Fold what follows a BatchNorm into its call.

In a graph that is being rewritten, what a call does beside normalising stands in its keywords: ``residual`` and ``act``
as of a BatchNormAct2d, and ``changes`` (the operand that the addition changed in place), ``other`` (the path of a
second BatchNorm, whose input is then the residual), ``pool``, ``conv``, ``summand`` and ``ends``. ``matching.lower``
turns them into calls of :mod:`fusedres.fusion.runtime`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.fusion.aliasing import Values
from fusedres.fusion.foreign import is_timms, timms_pattern
from fusedres.fusion.rewriting import Chain, Rewriter, describe
from fusedres.fusion.watching import is_standard
from fusedres.nn import BatchNormAct2d


class BatchNormRewriter(Rewriter):
    """Folds ReLU, additions, second BatchNorms, maximum poolings and convolutions behind BatchNorms."""

    def run(self, norms: list[fx.Node]) -> None:
        """Of the calls ``norms``, in their order; ``meta["reason"]`` is then why one is not more."""
        for norm in norms:
            self.name_in_place_results(norm)
        # The last of two BatchNorms that are added takes the addition: its other operand exists by then.
        for norm in reversed(norms):
            if not norm._erased:
                norm.meta["reason"] = self._fold(norm) or ""

    def _fold(self, norm: fx.Node) -> str | None:
        module = self.values.modules[str(norm.target)]
        if is_timms(module) and timms_pattern(module) != ("bn", ""):
            return timms_pattern(module)[1]
        if norm.kwargs or (getattr(module, "act", None) is not None and isinstance(module, BatchNormAct2d)):
            return self._fold_into_own(norm)
        chain = self.chain(norm)
        if chain.reader is None:
            return "its output is used more than once" if len(norm.users) > 1 else None
        if self.act_behind(chain) is not None:
            return self._fold_act(norm, chain, chain.reader)
        residual = self.residual(chain.reader, chain.last)
        if residual is None:
            return f"followed by {describe(chain.reader)}"
        return self._fold_add(norm, chain, residual)

    def _fold_act(self, norm: fx.Node, chain: Chain, act: fx.Node) -> str | None:
        norm.kwargs = {"act": "relu"}
        tail = self.chain(act)
        between = [*chain.nodes[1:], *tail.nodes]
        reader = tail.reader
        window = max_pool_arguments(self.values, reader) if reader is not None and self.options.allows("stem") else None
        pools = window is not None
        recomputes = reader is not None and self.options.save == "recompute" and self._is_conv(reader)
        if reader is not None and (pools or recomputes) and self._can_wait(norm, reader):
            norm.meta["window"] = window
            operand = window if self.values.module(reader) is None else str(reader.target)
            norm.kwargs = {"act": "relu", "pool" if pools else "conv": operand}
            self._move(norm, between, [reader])
            return None if pools else "computed again in the backward"
        self.replace([*chain.nodes[1:], act], norm)
        return None

    def _fold_into_own(self, norm: fx.Node) -> None:
        """Of a BatchNormAct2d that its model calls with a residual or an activation already."""
        other = self._second_norm(norm, norm.kwargs.get("residual"))
        if other is not None:
            gone = self.chain(other).nodes
            self._join(norm, other, dict(norm.kwargs))
            self.replace(gone, other.all_input_nodes[0])

    def _fold_add(self, norm: fx.Node, chain: Chain, residual: fx.Node) -> str | None:
        add = chain.reader
        assert add is not None
        changes = self.changed_operand(add, chain.last)
        if changes == "residual" and not self.is_spare(residual, add):
            return "the addition changes its other operand, which is read elsewhere"
        if not self._can_wait(norm, add):
            return "its input or its statistics may be used before the addition"
        tail = self.chain(add)
        act = self.act_behind(tail)
        other = self._second_norm(add, residual)
        gone = [] if other is None else self.chain(other).nodes
        self._move(norm, chain.nodes[1:], [add] if act is None else [*tail.nodes, act])
        kwargs = {"residual": residual, "act": "relu" if act is not None else None, "changes": changes}
        if other is None:
            norm.kwargs = kwargs
        else:
            self._join(norm, other, kwargs)
            self.replace(gone, other.all_input_nodes[0])
        return None

    def _second_norm(self, reader: fx.Node, value: Any) -> fx.Node | None:
        """The BatchNorm whose result ``value`` is and that can run at ``reader``; nobody else reads or prints it."""
        if not self.options.allows("join"):
            return None
        while isinstance(value, fx.Node) and is_standard(self.values.module(value), nn.Identity):
            value = value.all_input_nodes[0]
        module = self.values.module(value) if isinstance(value, fx.Node) else None
        if not isinstance(module, _BatchNorm) or "given" not in value.meta or value.kwargs:
            return None
        plain = timms_pattern(module) == ("bn", "") if is_timms(module) else getattr(module, "act", None) is None
        if not plain or module is self.values.module(reader) or self.chain(value).reader is not reader:
            return None
        return value if self._can_wait(value, reader) else None

    def _join(self, norm: fx.Node, other: fx.Node, kwargs: dict[str, Any]) -> None:
        """Both BatchNorms in the call ``norm``; that of the main branch comes first."""
        paths, inputs = (str(norm.target), str(other.target)), (norm.args[0], other.args[0])
        if paths[0].count(".") > paths[1].count("."):  # the later of the two is the shortcut
            paths, inputs = paths[::-1], inputs[::-1]
            changes = {"norm": "residual", "residual": "norm"}.get(kwargs.get("changes") or "")
            kwargs |= {"changes": changes}
        norm.target, norm.args = paths[0], (inputs[0],)
        norm.kwargs = kwargs | {"residual": inputs[1], "other": paths[1]}

    def _move(self, norm: fx.Node, gone: list[fx.Node], result: list[fx.Node]) -> None:
        """Let ``norm`` run where ``result`` begins, in its place; metadata that is read before is its input's."""
        input, between = norm.all_input_nodes[0], [norm, *gone]
        for node in between:
            node.replace_all_uses_with(input, delete_user_cb=lambda user: user not in (*between, *result))
        result[0].prepend(norm)
        self.replace([*gone, *result], norm)

    def _can_wait(self, norm: fx.Node, until: fx.Node) -> bool:
        """Whether ``norm`` can run at ``until``: same input, same order of updates of its statistics."""
        still = not self.values.may_change_between(norm.all_input_nodes[0], norm, until)
        return still and self.values.may_move(norm, norm, until)

    def _is_conv(self, node: fx.Node) -> bool:
        conv = self.values.module(node)
        if not is_standard(conv, nn.Conv2d) or len(node.args) != 1 or node.kwargs:
            return False
        assert isinstance(conv, nn.Conv2d)
        extents = zip(conv.dilation, conv.kernel_size, strict=True)
        uneven = conv.padding == "same" and any(step * (size - 1) % 2 for step, size in extents)
        return conv.padding_mode == "zeros" and not uneven  # others read a padded copy


def max_pool_arguments(values: Values, node: fx.Node) -> tuple[Any, ...] | None:
    """Kernel size, stride, padding, dilation and ceil_mode, where ``node`` is a maximum pooling without indices."""
    module = values.module(node)
    if is_standard(module, nn.MaxPool2d) and len(node.args) == 1 and not node.kwargs:
        assert isinstance(module, nn.MaxPool2d)
        shape = module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode
        return None if module.return_indices else shape
    if node.op != "call_function" or node.target not in (F.max_pool2d, torch.max_pool2d):
        return None
    names = {"input": None, "kernel_size": None, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
    given = names | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    shape = tuple(given[name] for name in list(names)[1:])
    plain = len(node.all_input_nodes) == 1 and not given.get("return_indices") and len(node.args) <= len(names)
    return shape if plain else None
