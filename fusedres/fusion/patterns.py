"""Find the patterns of a traced graph; fold a BatchNorm and what follows it into one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.fusion.foreign import foreign_pattern, is_timms
from fusedres.fusion.linear_patterns import rewrite_linears
from fusedres.fusion.options import Options
from fusedres.fusion.projections import inline_projections
from fusedres.fusion.rewriting import Call, Chain, Rewriter, Rewritten, describe
from fusedres.fusion.runtime import OWN_ACT, norm_add, norm_add_norm, norm_conv, norm_max_pool
from fusedres.fusion.values import Values, between, is_standard, max_pool_arguments
from fusedres.nn import BatchNormAct2d


def rewrite(
    block: nn.Module, graph: fx.Graph, refusal: Callable[[nn.Module], str | None], options: Options
) -> Rewritten:
    """Fold the patterns of ``graph`` in place; ``refusal`` says why a layer must stay as it is."""
    result = Rewritten()
    if options.allows("join"):
        inline_projections(block, graph, refusal, result)
    _BatchNormRewriter(block, graph, refusal, result, options).run()
    if options.allows("linear"):
        rewrite_linears(block, graph, refusal, result)
    if result.is_changed:
        Values(block, graph).without_needless_clones()
    return result


class _BatchNormRewriter(Rewriter):
    def __init__(
        self,
        block: nn.Module,
        graph: fx.Graph,
        refusal: Callable[[nn.Module], str | None],
        result: Rewritten,
        options: Options,
    ) -> None:
        super().__init__(block, graph, refusal, result)
        self.options = options

    def run(self) -> None:
        norms = [n for n in self.graph.nodes if isinstance(self.values.module(n), _BatchNorm)]
        for norm in norms:
            self.name_in_place_results(norm)
        # The last of two BatchNorms that are added takes the addition: its other operand exists by then.
        calls = [self._rewrite_call(norm) for norm in reversed(norms) if not norm._erased]
        self.result.calls[:0] = reversed(calls)

    def _rewrite_call(self, norm: fx.Node) -> Call:
        module, name = self.values.module(norm), str(norm.target)
        assert module is not None
        reason = self.refusal(module)
        if reason is not None:
            return Call(name, "bn", reason)
        if is_timms(module):
            return Call(name, *foreign_pattern(module))
        if not norm.args and norm.kwargs.keys() == {"input"}:
            norm.args, norm.kwargs = (norm.kwargs["input"],), {}
        if isinstance(module, BatchNormAct2d) and (module.act is not None or norm.kwargs or len(norm.args) != 1):
            return self._fold_own(norm, module)
        if norm.kwargs or len(norm.args) != 1 or not isinstance(norm.args[0], fx.Node):
            return Call(name, "bn", "it is not called with one input")
        chain = self.chain(norm)
        if chain.reader is None:
            return Call(name, "bn", "its output is used more than once" if len(norm.users) > 1 else "")
        if self.act_behind(chain) is not None:
            return self._fold_act(norm, chain)
        residual = self.residual(chain.reader, chain.last)
        if residual is None:
            return Call(name, "bn", f"followed by {describe(chain.reader)}")
        return self._fold_add(norm, chain, residual)

    def _fold_act(self, norm: fx.Node, chain: Chain) -> Call:
        act = chain.reader
        assert act is not None
        tail = self.chain(act)
        if tail.reader is not None and self._can_wait(norm, norm.all_input_nodes[0], tail.reader):
            if self.options.allows("stem") and max_pool_arguments(self.values, tail.reader) is not None:
                return self._fold_max_pool(norm, chain, tail)
            if self.options.save == "recompute" and self._is_conv(tail.reader):
                return self._fold_conv(norm, chain, tail)
        self.drop_prints(str(norm.target), chain.nodes)
        norm.kwargs = {"act": "relu"}
        self._note(norm, act)
        self.replace([*chain.nodes[1:], act], norm)
        return Call(str(norm.target), "bn_act")

    def _fold_max_pool(self, norm: fx.Node, chain: Chain, tail: Chain) -> Call:
        pool = tail.reader
        assert pool is not None
        window = max_pool_arguments(self.values, pool)
        operand = window if self.values.module(pool) is None else self._attribute(pool, pool)
        self._fold_behind(norm, [*chain.nodes, *tail.nodes], pool, norm_max_pool, operand)
        return Call(str(norm.target), "bn_act_maxpool", window=window)

    def _fold_conv(self, norm: fx.Node, chain: Chain, tail: Chain) -> Call:
        conv = tail.reader
        assert conv is not None
        self._fold_behind(norm, [*chain.nodes, *tail.nodes], conv, norm_conv, self._attribute(conv, conv))
        return Call(str(norm.target), "bn_act", "computed again in the backward", recomputes=True)

    def _fold_behind(
        self, norm: fx.Node, gone: list[fx.Node], last: fx.Node, function: Callable[..., Any], operand: Any
    ) -> None:
        """``function(norm, input, "relu", operand)`` for ``norm``, its activation and the operation ``last`` behind."""
        self.drop_prints(str(norm.target), gone)
        module = self._attribute(norm, last)
        with self.graph.inserting_before(last):
            fused = self.graph.call_function(function, (module, norm.args[0], "relu", operand))
        for node in (*gone[1:], last):
            self.note(node)
        self._note(norm, None)
        self.replace([last], fused)
        self.replace(gone, norm.all_input_nodes[0])

    def _attribute(self, call: fx.Node, before: fx.Node) -> fx.Node:
        """The module that ``call`` calls, as a value."""
        with self.graph.inserting_before(before):
            return self.graph.get_attr(str(call.target))

    def _is_conv(self, node: fx.Node) -> bool:
        conv = self.values.module(node)
        if not is_standard(conv, nn.Conv2d) or len(node.args) != 1 or node.kwargs:
            return False
        assert isinstance(conv, nn.Conv2d)
        extents = zip(conv.dilation, conv.kernel_size, strict=True)
        uneven = conv.padding == "same" and any(step * (size - 1) % 2 for step, size in extents)
        return conv.padding_mode == "zeros" and not uneven  # others read a padded copy

    def _fold_own(self, norm: fx.Node, module: BatchNormAct2d) -> Call:
        """A BatchNormAct2d that its model calls with a residual or an activation already."""
        arguments = dict(zip(("input", "residual"), norm.args, strict=False)) | dict(norm.kwargs)
        residual = arguments.get("residual")
        act = "_act" if arguments.get("act", module.act) is not None else ""
        other, input = self._joined_norm(norm, residual), arguments.get("input")
        if other is None or not isinstance(input, fx.Node):
            return Call(str(norm.target), f"bn{'_add' if residual is not None else ''}{act}")
        chain = self.chain(other)
        self._join(norm, norm, input, other, arguments.get("act", OWN_ACT), None, [norm])
        self.replace(chain.nodes, other.all_input_nodes[0])
        return Call(str(norm.target), f"bn_add_bn{act}", partner=str(other.target))

    def _joined_norm(self, reader: fx.Node, value: Any) -> fx.Node | None:
        """The BatchNorm whose result ``value`` is and that can run at ``reader``; nobody else reads or prints it."""
        if not self.options.allows("join"):
            return None
        while isinstance(value, fx.Node) and is_standard(self.values.module(value), nn.Identity):
            value = value.all_input_nodes[0]
        module = self.values.module(value) if isinstance(value, fx.Node) else None
        if not isinstance(module, _BatchNorm) or module is self.values.module(reader) or is_timms(module):
            return None
        if self.refusal(module) is not None or getattr(module, "act", None) is not None:
            return None
        plain = len(value.args) == 1 and isinstance(value.args[0], fx.Node) and not value.kwargs
        chain = self.chain(value)
        if not plain or chain.reader is not reader or self.is_shown(chain.nodes):
            return None
        return value if self._can_wait(value, value.all_input_nodes[0], reader) else None

    def _join(
        self, norm: fx.Node, at: fx.Node, input: fx.Node, other: fx.Node, act: Any, changes: str | None,
        result: list[fx.Node],
    ) -> None:  # fmt: skip
        """Both BatchNorms in one call in front of ``at``, read in place of ``result``; the block's own comes first."""
        one, two = (self._attribute(norm, at), input), (self._attribute(other, at), other.args[0])
        if self._is_inlined(norm):
            one, two = two, one
            changes = {"norm": "residual", "residual": "norm"}.get(changes or "")
        arguments = (*one, *two, act, changes)
        with self.graph.inserting_before(at):
            fused = self.graph.call_function(norm_add_norm, arguments)
        self._note(other, None)
        self._note(norm, None)
        self.replace(result, fused)

    def _fold_add(self, norm: fx.Node, chain: Chain, residual: fx.Node) -> Call:
        add, input, name = chain.reader, norm.args[0], str(norm.target)
        assert add is not None and isinstance(input, fx.Node)
        changes = self.changed_operand(add, chain.last)
        if changes == "residual" and not self.is_spare(residual, add):
            return Call(name, "bn", "the addition changes its other operand, which is read elsewhere")
        if not self._can_wait(norm, input, add):
            return Call(name, "bn", "its input or its statistics may be used before the addition")
        tail = self.chain(add)
        act = self.act_behind(tail)
        result, kind = ([*tail.nodes, act], "relu") if act else ([add], None)
        other = self._joined_norm(add, residual)
        others = [] if other is None else self.chain(other).nodes
        self.drop_prints(name, [*others, *chain.nodes, *(tail.nodes if act else ())])
        self.note(act)
        if other is not None:
            self._join(norm, add, input, other, kind, changes, result)
            self.replace(others, other.all_input_nodes[0])
        else:
            module = self._attribute(norm, add)
            with self.graph.inserting_before(add):
                fused = self.graph.call_function(norm_add, (module, input, residual, kind, changes))
            self._note(norm, None)
            self.replace(result, fused)
        self.replace(chain.nodes, input)
        act_name = "_act" if act else ""
        if other is None:
            return Call(name, f"bn_add{act_name}")
        names = (str(other.target), name) if self._is_inlined(norm) else (name, str(other.target))
        return Call(names[0], f"bn_add_bn{act_name}", partner=names[1])

    def _is_inlined(self, norm: fx.Node) -> bool:
        """Whether ``norm`` belongs to an nn.Sequential whose children are called in its place."""
        return str(norm.target).rpartition(".")[0] in self.result.sequences

    def _note(self, norm: fx.Node, act: fx.Node | None) -> None:
        self.result.is_changed = True
        self.result.norms.add(str(norm.target))
        self.note(act)

    def _can_wait(self, norm: fx.Node, input: fx.Node, until: fx.Node) -> bool:
        """Whether ``norm`` can run at ``until``: same input, same order of updates of its statistics."""
        module = self.values.module(norm)
        for node in self.graph.nodes:
            if node is until:
                break
            owner = str(node.target).rpartition(".")[0]
            if node.op == "get_attr" and self.values.modules.get(owner) is module:
                return False  # its statistics, perhaps read in between
        for node in between(norm, until):
            other = self.values.module(node)
            if other is not None and any(part is module for part in other.modules()):
                return False
        return not self.values.may_change_between(input, norm, until)
