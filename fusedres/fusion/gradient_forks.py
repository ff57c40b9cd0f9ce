"""Let what makes a value end it as its readers need: under two names, or averaged over its pixels.

A block's output feeds the next block's main branch and its skip, and autograd adds the two gradients: three passes over
an activation. Under two names the gradients arrive apart and are added in the reduction of the BatchNorm that made the
value. Where global average pooling alone reads it, the value is never written. A value that user code can reach has one
name and the whole gradient.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.fusion.aliasing import is_standard
from fusedres.fusion.foreign import is_timms
from fusedres.fusion.rewriting import Call, Rewriter
from fusedres.fusion.runtime import (
    FORK,
    OWN_ACT,
    POOL,
    ended_join,
    ended_max_pool,
    ended_norm,
    norm_add,
    norm_add_norm,
    norm_max_pool,
)
from fusedres.nn import SyncBatchNormAct

_ENDED: dict[Any, Callable[..., Any]] = {
    norm_add: ended_norm,
    norm_add_norm: ended_join,
    norm_max_pool: ended_max_pool,
}
_MEANS = {torch.mean, "mean"}
_AVERAGES = {F.adaptive_avg_pool2d, torch.ops.aten.adaptive_avg_pool2d}


class EndRewriter(Rewriter):
    """Decides for each value how it ends, and rewrites the call that makes it."""

    def run(self, calls: list[Call]) -> None:
        """Update the rows ``calls`` of the BatchNorms that end a value otherwise than by writing it once."""
        ends = {node: kind for node in self.graph.nodes if (kind := self._end(node)) is not None}
        made: dict[str, list[str | None]] = {}
        for node in self.graph.nodes:
            if self._module_path(node):
                made.setdefault(self._module_path(node), []).append(ends.get(node))
        for index, call in enumerate(calls):
            kinds = made.get(call.module)
            kind = kinds.pop(0) if kinds else None
            if kind == POOL:
                calls[index] = replace(call, pattern=f"{call.pattern}_avgpool")
            elif kind == FORK:
                calls[index] = replace(call, forks=True)
        for node, kind in ends.items():
            self._rewrite(node, kind)

    def _end(self, node: fx.Node) -> str | None:
        if not self._can_end(node):
            return None
        readers = self.values.readers(node)
        if self._pools(node) and len(readers) == len(node.users) == 1 and self._is_average(readers[0], node):
            return POOL
        forks = self.options.allows("fork") and len(readers) > 1 and self.values.is_out_of_reach(node)
        return FORK if forks else None

    def _can_end(self, node: fx.Node) -> bool:
        """Whether ``node`` can end a value: a BatchNorm and what is folded behind it."""
        if node.target in _ENDED:
            return True
        module = self.values.module(node)
        if not isinstance(module, _BatchNorm) or is_timms(module) or isinstance(module, SyncBatchNormAct):
            return False
        plain = self.refusal(module) is None and isinstance(node.args[0] if node.args else None, fx.Node)
        return plain and node.kwargs.keys() <= {"act", "residual"} and len(node.args) in (1, 2)

    def _pools(self, node: fx.Node) -> bool:
        return self.options.allows("head") and (node.target is norm_add or node.op == "call_module")

    def _module_path(self, node: fx.Node) -> str:
        """Of the BatchNorm that ``node`` calls, itself or by one of our functions, which take it first."""
        if node.op == "call_module":
            return str(node.target) if isinstance(self.values.module(node), _BatchNorm) else ""
        first = node.args[0] if node.op == "call_function" and node.args else None
        attribute = isinstance(first, fx.Node) and first.op == "get_attr"
        return str(first.target) if attribute and str(first.target) in self.values.modules else ""  # pyright: ignore

    def _is_average(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether ``node`` averages ``value`` over height and width."""
        module = self.values.module(node)
        if module is not None:
            pool = is_standard(module, nn.AdaptiveAvgPool2d) and node.args == (value,) and not node.kwargs
            return pool and getattr(module, "output_size", None) in (1, (1, 1), [1, 1])
        given = dict(zip(("input", "size", "keepdim"), node.args, strict=False)) | dict(node.kwargs)
        size = given.pop("size", given.pop("output_size", given.pop("dim", None)))
        if given.pop("input", None) is not value or given.keys() - {"keepdim"}:
            return False
        if node.op == "call_function" and node.target in _AVERAGES:
            return size in (1, (1, 1), [1, 1]) and not given
        axes = [axis % 4 for axis in size if isinstance(axis, int)] if isinstance(size, (tuple, list)) else []
        return node.target in _MEANS and sorted(axes) == [2, 3]

    def _rewrite(self, node: fx.Node, kind: str) -> None:
        with self.graph.inserting_before(node):
            both = self._ended(node, kind)
            value = self.graph.call_function(operator.getitem, (both, 0))
            if kind == POOL:
                average = next(iter(node.users))
                keeps = average.kwargs.get("keepdim") or True in average.args[2:]
                if average.target in _MEANS and not keeps:
                    value = self.graph.call_function(torch.flatten, (value, 1))
                average.replace_all_uses_with(value)
                self.graph.erase_node(average)
            else:
                # The first reader keeps the name, the others read the second.
                first = min(self.values.readers(node))
                second = self.graph.call_function(operator.getitem, (both, 1))
                others = [user for user in self.values.readers(node) if user is not first]
                node.replace_all_uses_with(second, delete_user_cb=lambda user: user in others)
                node.replace_all_uses_with(value)
        self.graph.erase_node(node)

    def _ended(self, node: fx.Node, kind: str) -> fx.Node:
        """The call that makes the value of ``node`` end so."""
        if node.op != "call_module":
            return self.graph.call_function(_ENDED[node.target], (*node.args, kind))
        module = self.graph.get_attr(str(node.target))
        given = dict(zip(("input", "residual"), node.args, strict=False)) | dict(node.kwargs)
        arguments = (module, given["input"], given.get("residual"), given.get("act", OWN_ACT), None, kind)
        return self.graph.call_function(ended_norm, arguments)
