"""Projection shortcuts in an nn.Sequential: called child by child, so that their BatchNorm can be joined."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.fusion.foreign import is_timms
from fusedres.fusion.rewriting import Rewriter, Rewritten, addition
from fusedres.fusion.tracing import has_own_call
from fusedres.fusion.values import is_standard


def inline_projections(
    block: nn.Module, graph: fx.Graph, refusal: Callable[[nn.Module], str | None], result: Rewritten
) -> None:
    """Replace calls of an nn.Sequential that ends in a BatchNorm and is added to another's output, in place."""
    _Inliner(block, graph, refusal, result).run()


class _Inliner(Rewriter):
    def run(self) -> None:
        for node in list(self.graph.nodes):
            if self._is_projection(node) and self._is_added_to_norm(node):
                self._inline(node)

    def _is_projection(self, node: fx.Node) -> bool:
        """Whether ``node`` calls a Sequential with one normalisation, a BatchNorm at its end, and nobody watching."""
        sequence = self.values.module(node)
        if not is_standard(sequence, nn.Sequential) or len(node.args) != 1 or node.kwargs:
            return False
        assert isinstance(sequence, nn.Sequential)
        last = sequence[-1] if len(sequence) else None
        if not isinstance(last, _BatchNorm) or is_timms(last) or self.refusal(last) or self.refusal(sequence):
            return False
        parts = [part for child in sequence if child is not last for part in child.modules()]
        # A part with a pattern of its own keeps the Sequential's rewritten forward busy.
        return not any(isinstance(part, (_BatchNorm, nn.LayerNorm)) for part in parts) and not any(
            has_own_call(child) for child in sequence
        )

    def _is_added_to_norm(self, node: fx.Node) -> bool:
        """Whether the only reader of ``node`` adds it to a BatchNorm's result."""
        chain = self.chain(node)
        if chain.reader is None:
            return False
        if isinstance(self.values.module(chain.reader), _BatchNorm):
            return chain.last in (*chain.reader.args[1:], chain.reader.kwargs.get("residual"))
        other = self.residual(chain.reader, chain.last) if addition(chain.reader) else None
        while other is not None and is_standard(self.values.module(other), nn.Identity):
            other = other.all_input_nodes[0]
        return other is not None and isinstance(self.values.module(other), _BatchNorm)

    def _inline(self, node: fx.Node) -> None:
        path, value = str(node.target), node.args[0]
        sequence = self.values.module(node)
        assert isinstance(sequence, nn.Sequential)
        with self.graph.inserting_before(node):
            for name in sequence._modules:
                value = self.graph.call_module(f"{path}.{name}", (value,))
        assert isinstance(value, fx.Node)
        node.replace_all_uses_with(value)
        self.graph.erase_node(node)
        self.result.sequences[path] = len(sequence)
        self.result.is_changed = True
