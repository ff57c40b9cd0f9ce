"""Let what makes a value end it as its readers need: under two names, or averaged over its pixels.

A block's output feeds the next block's main branch and its skip, and autograd adds the two gradients: three passes over
an activation. Under two names the gradients arrive apart and are added in the reduction of the BatchNorm that made the
value. Where global average pooling alone reads it, the value is never written. Blocks get a second forward for this,
``_fusedres_branches(self, x, fork, ends)``, called by rewritten forwards of their parents alone: a value that user code
can reach, and one that leaves a hooked block, has one name and the whole gradient.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.fusion.branches import average_end, branches
from fusedres.fusion.chains import Chain, Forks, Maker
from fusedres.fusion.foreign import is_timms
from fusedres.fusion.guests import guests
from fusedres.fusion.joins import Forms, Joined
from fusedres.fusion.options import Options
from fusedres.fusion.rewriting import with_inputs
from fusedres.fusion.runtime import (
    FORK,
    OWN_ACT,
    POOL,
    end,
    ended_join,
    ended_max_pool,
    ended_norm,
    norm_add,
    norm_add_norm,
    norm_max_pool,
)
from fusedres.fusion.values import Values, is_standard
from fusedres.nn import SyncBatchNormAct

_ENDED: dict[Any, Callable[..., Any]] = {
    norm_add: ended_norm,
    norm_add_norm: ended_join,
    norm_max_pool: ended_max_pool,
}
_MEANS = {torch.mean, "mean"}
_AVERAGES = {F.adaptive_avg_pool2d, torch.ops.aten.adaptive_avg_pool2d}


def fork(
    block: nn.Module,
    forms: Forms,
    chains: Mapping[nn.Module, Chain],
    fusable: Callable[[nn.Module], bool],
    options: Options,
) -> Forms:
    """End values of the forward in place, and add the second forward.

    Args:
        block: whose forms they are.
        forms: with the patterns folded and the additions joined.
        chains: how the blocks below ``block`` pass values on.
        fusable: whether the call of a BatchNorm may be replaced.
        options: which of the two ends are allowed.
    """
    second = None if forms.paired else with_inputs(forms.forward.graph, "_fusedres_fork", "_fusedres_ends")
    forward = _Forker(block, forms.forward, chains, fusable, options).run()
    if second is not None:
        copied = replace(forms.forward, graph=second, norms=set(forms.forward.norms), guests=set(forms.forward.guests))
        forked = _Forker(block, copied, chains, fusable, options).run_second()
        forks = forked.chain.forks
        if forks.takes or forks.gives is not None:
            return replace(forms, forward=forward, forked=forked)
    return replace(forms, forward=forward)


class _Forker:
    """Decides for each value how it ends, then rewrites the calls that make them."""

    def __init__(
        self,
        block: nn.Module,
        form: Joined,
        chains: Mapping[nn.Module, Chain],
        fusable: Callable[[nn.Module], bool],
        options: Options,
    ) -> None:
        self.form, self.graph = form, form.graph
        self.values = Values(block, form.graph)
        self.chains = chains
        self.fusable = fusable
        self.options = options
        self.ends: dict[fx.Node, str] = {}
        self.asks: set[str] = set()

    def run(self) -> Joined:
        """End values of which all readers are in the graph."""
        self._decide()
        links = tuple((self._maker(node), kind) for node, kind in self.ends.items())
        self._rewrite({})
        chain = self.form.chain
        self.form.chain = replace(chain, forks=Forks(links=links, asks=frozenset(self.asks)))
        return self.form

    def run_second(self) -> Joined:
        """The same where the input has two names, and let the output end as it is asked."""
        input, other, ends = (node for node in self.graph.nodes if node.op == "placeholder")
        self._decide()
        takes = self._is_forked(input)
        forks, output = Forks(takes), self.graph.output_node()
        value = output.args[0]
        if isinstance(value, fx.Node) and self._gives(value) and self.values.readers(value) == [output]:
            forks = Forks(takes, self._maker(value), self._pools(value))
            self.ends[value] = ""  # as asked
        else:
            with self.graph.inserting_before(output):
                output.args = (self.graph.call_function(end, (value, ends)),)
        self._rewrite({input: other} if takes else {}, ends)
        self.form.chain = Chain(forks=replace(forks, asks=frozenset(self.asks)))
        return self.form

    def _decide(self) -> None:
        for node in self.graph.nodes:
            if not self._gives(node):
                continue
            readers = self.values.readers(node)
            if self._pools(node) and len(readers) == len(node.users) == 1 and self._is_average(readers[0], node):
                self.ends[node] = POOL
            elif self._is_forked(node):
                self.ends[node] = FORK

    def _is_forked(self, value: fx.Node) -> bool:
        """Whether ``value`` has two names from here on: for two readers, or for a block that takes both."""
        readers = self.values.readers(value)
        if not self.options.allows("fork") or not readers:
            return False
        if len(readers) == 1:
            chain = self._chain(readers[0])
            return chain is not None and chain.forks.takes
        called = guests(self.values, value)
        if called is None:
            return False
        self.form.guests |= called
        return True

    def _gives(self, node: fx.Node) -> bool:
        """Whether ``node`` can end a value: a BatchNorm and what is folded behind it, or a block that ends in one."""
        if node.target in _ENDED:
            return True
        module = self.values.module(node)
        if isinstance(module, _BatchNorm):
            plain = not is_timms(module) and not isinstance(module, SyncBatchNormAct) and self.fusable(module)
            return plain and node.kwargs.keys() <= {"act", "residual"} and len(node.args) in (1, 2)
        chain = self._chain(node)
        return chain is not None and chain.forks.gives is not None

    def _pools(self, node: fx.Node) -> bool:
        """Whether the value of ``node``, which gives, can be averaged in place of being written."""
        if not self.options.allows("head"):
            return False
        chain = self._chain(node)
        if chain is not None:
            return chain.forks.pools
        return node.target is norm_add or node.op == "call_module"

    def _chain(self, node: fx.Node) -> Chain | None:
        """How the block that ``node`` calls with one input passes values on."""
        module = self.values.module(node)
        if module is None or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return None
        return self.chains.get(module)

    def _maker(self, node: fx.Node) -> Maker:
        path, before = self._path(node), 0
        for other in self.graph.nodes:
            if other is node:
                break
            before += self._path(other) == path
        return path, before

    def _path(self, node: fx.Node) -> str:
        """Of the child that ``node`` calls, itself or by one of our functions, which take it first."""
        if node.op == "call_module":
            return str(node.target)
        first = node.args[0] if node.op == "call_function" and node.args else None
        return str(first.target) if isinstance(first, fx.Node) and first.op == "get_attr" else ""

    def _is_average(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether ``node`` averages ``value`` over height and width."""
        module = self.values.module(node)
        if module is not None:
            pool = is_standard(module, nn.AdaptiveAvgPool2d) and node.args == (value,) and not node.kwargs
            return pool and average_end(module) == POOL
        given = dict(zip(("input", "size", "keepdim"), node.args, strict=False)) | dict(node.kwargs)
        size = given.pop("size", given.pop("output_size", given.pop("dim", None)))
        if given.pop("input", None) is not value or given.keys() - {"keepdim"}:
            return False
        if node.op == "call_function" and node.target in _AVERAGES:
            return size in (1, (1, 1), [1, 1]) and not given
        axes = [axis % 4 for axis in size if isinstance(axis, int)] if isinstance(size, (tuple, list)) else []
        return node.target in _MEANS and sorted(axes) == [2, 3]

    def _rewrite(self, forks: dict[fx.Node, fx.Node], ends: fx.Node | None = None) -> None:
        """Rewrite what was decided; ``forks`` are second names that are there already, of the input."""
        fed: dict[fx.Node, fx.Node] = {}  # calls of blocks that take both names: the second
        for value, second in forks.items():
            self._hand_out(value, second, fed)
        for node in list(self.graph.nodes):
            kind, second = self.ends.get(node), fed.get(node)
            if kind is None and second is None:
                continue
            both = self._ended(node, second, ends if kind == "" else kind)
            if kind == "":
                output = self.graph.output_node()
                output.args = (both,)
            with self.graph.inserting_before(node):
                value = self.graph.call_function(operator.getitem, (both, 0))
            if kind == POOL:
                self._average(node, both, value)
                continue
            node.replace_all_uses_with(value)
            if kind == FORK:
                with self.graph.inserting_before(node):
                    self._hand_out(value, self.graph.call_function(operator.getitem, (both, 1)), fed)
            self._erase(node, value)

    def _hand_out(self, value: fx.Node, second: fx.Node, fed: dict[fx.Node, fx.Node]) -> None:
        """The first reader of ``value`` keeps its name, the others read ``second``."""
        first, *others = sorted(self.values.readers(value))
        if others:
            value.replace_all_uses_with(second, delete_user_cb=lambda user: user in others)
        else:
            fed[first] = second

    def _ended(self, node: fx.Node, second: fx.Node | None, ends: Any) -> fx.Node:
        """The call that makes the value of ``node`` end as ``ends`` says."""
        with self.graph.inserting_before(node):
            if node.op != "call_module":
                return self.graph.call_function(_ENDED[node.target], (*node.args, ends))
            module = self.graph.get_attr(self._path(node))
            if not isinstance(self.values.module(node), _BatchNorm):
                self.asks.add(self._path(node))
                return self.graph.call_function(branches, (module, node.args[0], second, ends))
            self.form.norms.add(self._path(node))
            given = dict(zip(("input", "residual"), node.args, strict=False)) | dict(node.kwargs)
            arguments = (module, given["input"], given.get("residual"), given.get("act", OWN_ACT), None, ends)
            return self.graph.call_function(ended_norm, arguments)

    def _average(self, node: fx.Node, both: fx.Node, value: fx.Node) -> None:
        """``value`` in place of the average of ``node``, which goes."""
        average = next(iter(node.users))
        if average.op == "call_module":
            self.form.standard[str(average.target)] = nn.AdaptiveAvgPool2d
            with self.graph.inserting_before(both):
                pool = self.graph.get_attr(str(average.target))
                both.update_arg(len(both.args) - 1, self.graph.call_function(average_end, (pool,)))
        elif average.target in _MEANS and not (average.kwargs.get("keepdim") or True in average.args[2:]):
            with self.graph.inserting_before(node):
                value = self.graph.call_function(torch.flatten, (value, 1))
        average.replace_all_uses_with(value)
        self.graph.erase_node(average)
        self.graph.erase_node(node)

    def _erase(self, node: fx.Node, value: fx.Node) -> None:
        self.graph.erase_node(node)
        if not value.users:
            self.graph.erase_node(value)
