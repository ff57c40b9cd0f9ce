"""Find the patterns of a traced graph; fold BatchNorm + add + ReLU into one call."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn

from fusedres.fusion.foreign import foreign_pattern, is_timms
from fusedres.fusion.linear_patterns import rewrite_linears
from fusedres.fusion.rewriting import Call, Chain, Rewriter, Rewritten, describe
from fusedres.fusion.runtime import norm_add
from fusedres.fusion.values import Values, between
from fusedres.nn import BatchNormAct2d


def rewrite(block: nn.Module, graph: fx.Graph, refusal: Callable[[nn.Module], str | None]) -> Rewritten:
    """Fold the patterns of ``graph`` in place; ``refusal`` says why a layer must stay as it is."""
    result = Rewritten()
    _BatchNormRewriter(block, graph, refusal, result).run()
    rewrite_linears(block, graph, refusal, result)
    if result.is_changed:
        Values(block, graph).without_needless_clones()
    return result


class _BatchNormRewriter(Rewriter):
    def run(self) -> None:
        norms = [n for n in self.graph.nodes if isinstance(self.values.module(n), nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            self.name_in_place_results(norm)
        # The last of two BatchNorms that are added takes the addition: its other operand exists by then.
        calls = [self._rewrite_call(norm) for norm in reversed(norms)]
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
            return _own_call(norm, module)
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
        self.drop_prints(str(norm.target), chain.nodes)
        norm.kwargs = {"act": "relu"}
        self._note(norm, act)
        self.replace([*chain.nodes[1:], act], norm)
        return Call(str(norm.target), "bn_act")

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
        self.drop_prints(name, [*chain.nodes, *(tail.nodes if act else ())])
        with self.graph.inserting_before(add):
            module = self.graph.get_attr(name)
            arguments = (module, input, residual, "relu" if act else None, changes)
            fused = self.graph.call_function(norm_add, arguments)
        self._note(norm, act)
        self.replace([*tail.nodes, act] if act else [add], fused)
        self.replace(chain.nodes, input)
        return Call(name, "bn_add_act" if act else "bn_add")

    def _note(self, norm: fx.Node, act: fx.Node | None) -> None:
        self.result.is_changed = True
        self.result.norms.add(str(norm.target))
        self.note_act(act)

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


def _own_call(norm: fx.Node, module: BatchNormAct2d) -> Call:
    """A BatchNormAct2d that its model calls with a residual or an activation already."""
    add = "_add" if len(norm.args) > 1 or norm.kwargs.get("residual") is not None else ""
    act = "_act" if norm.kwargs.get("act", module.act) is not None else ""
    return Call(str(norm.target), f"bn{add}{act}")
