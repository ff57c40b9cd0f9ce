"""Let what makes a value end it as its readers need: under two names, or averaged over its pixels.

A block's output feeds the next block's main branch and its skip, and autograd adds the two gradients: three passes over
an activation. Under two names the gradients arrive apart and are added in the reduction of the BatchNorm that made the
value. Where global average pooling alone reads it, the value is never written. A value that user code can reach has one
name and the whole gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn

from fusedres.fusion.foreign import is_timms
from fusedres.fusion.rewriting import Rewriter
from fusedres.fusion.runtime import FORK, POOL
from fusedres.fusion.watching import is_standard
from fusedres.nn import SyncBatchNormAct

_MEANS = {torch.mean, "mean"}
_AVERAGES = {F.adaptive_avg_pool2d, torch.ops.aten.adaptive_avg_pool2d}


class EndRewriter(Rewriter):
    """Decides for each BatchNorm and what is folded behind it how its value ends."""

    def run(self, norms: list[fx.Node]) -> None:
        """``ends`` of the calls ``norms`` is then ``FORK`` or ``POOL``, where they do not write their value once."""
        ends = {node: kind for node in norms if (kind := self._end(node)) is not None}
        for node, kind in ends.items():
            node.kwargs = {**node.kwargs, "ends": kind}
            if kind == POOL:
                self._take_average(node, next(iter(node.users)))
            else:
                self._fork(node)

    def _end(self, node: fx.Node) -> str | None:
        module, kwargs = self.values.module(node), node.kwargs
        is_own = kwargs.keys() == node.meta["given"]
        if "summand" in kwargs or "conv" in kwargs:
            return None
        if is_own and (is_timms(module) or isinstance(module, SyncBatchNormAct)):
            return None
        readers = self.values.readers(node)
        pools = self.options.allows("head") and "pool" not in kwargs and "other" not in kwargs
        if pools and len(readers) == len(node.users) == 1 and self._is_average(readers[0], node):
            return POOL
        forks = self.options.allows("fork") and len(readers) > 1 and self.values.is_out_of_reach(node)
        return FORK if forks else None

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

    def _take_average(self, node: fx.Node, average: fx.Node) -> None:
        keeps = average.kwargs.get("keepdim") or True in average.args[2:]
        value = node
        if average.target in _MEANS and not keeps:
            with self.graph.inserting_after(node):
                value = self.graph.call_function(torch.flatten, (node, 1))
        average.replace_all_uses_with(value)
        self.graph.erase_node(average)

    def _fork(self, node: fx.Node) -> None:
        """The first reader keeps the name, the others read the second."""
        readers = sorted(self.values.readers(node))
        one, two = self.split(node)
        node.replace_all_uses_with(two, delete_user_cb=lambda user: user in readers[1:])
        node.replace_all_uses_with(one, delete_user_cb=lambda user: user not in (one, two))
