"""Let the BatchNorm that reads a sum do the addition, as in pre-activation networks.

Of two BatchNorms around an addition the one in front has it (``bn_add``). In passes over an activation that is 7 in the
forward and 5 in inference, where the one behind would need 8 and 6; in the backward it is the other way round, 13 and
11, where the sum also goes on as the identity path.
"""

from __future__ import annotations

import operator
from dataclasses import replace

from torch import fx
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.fusion.aliasing import addition
from fusedres.fusion.foreign import is_foreign, is_timms
from fusedres.fusion.rewriting import IN_PLACE, Call, Rewriter
from fusedres.fusion.runtime import add_norm


class SumRewriter(Rewriter):
    """Folds an addition and the BatchNorm behind it into one call that gives both results."""

    def run(self, calls: list[Call]) -> None:
        """Update the rows ``calls`` of the BatchNorms that add."""
        rows = self._rows(calls)
        for value in list(self.graph.nodes):
            norm = self._norm_behind(value) if self._is_sum(value) else None
            if norm is None:
                continue
            if norm in rows:
                call = calls[rows[norm]]
                calls[rows[norm]] = replace(call, pattern=f"add_{call.pattern}")
            self._fold(value, norm)

    def _rows(self, calls: list[Call]) -> dict[fx.Node, int]:
        """The places in ``calls`` of the BatchNorm calls without an addition."""
        places: dict[str, list[int]] = {}
        for index, call in enumerate(calls):
            if call.pattern in ("bn", "bn_act"):
                places.setdefault(call.module, []).append(index)
        plain = [node for node in self.graph.nodes if isinstance(self.values.module(node), _BatchNorm)]
        plain = [n for n in plain if len(n.args) < 2 and n.kwargs.get("residual") is None]
        return {node: places[str(node.target)].pop(0) for node in plain if places.get(str(node.target))}

    def _is_sum(self, node: fx.Node) -> bool:
        summands = addition(node)
        if not summands or not all(isinstance(summand, fx.Node) for summand in summands):
            return False
        # In place, into something that nobody else reads, is as good as out of place.
        return node.target not in IN_PLACE or self.is_spare(summands[0], node)

    def _norm_behind(self, value: fx.Node) -> fx.Node | None:
        """The BatchNorm of ``value`` that can run where it is made, and whose readers beside it are known."""
        for user in sorted(self.values.readers(value)):
            module = self.values.module(user)
            if not isinstance(module, _BatchNorm) or user.args != (value,) or user.kwargs.keys() - {"act"}:
                continue
            if self.refusal(module) is not None or (is_timms(module) and not is_foreign(module)):
                continue
            movable = self.values.may_move(user, value, user)
            movable = movable and not self.values.may_change_between(value, value, user)
            return user if movable and self.values.is_out_of_reach(value, user) else None
        return None

    def _fold(self, value: fx.Node, norm: fx.Node) -> None:
        module = self.attribute(norm, value)
        with self.graph.inserting_before(value):
            arguments = (module, *addition(value), value.target in IN_PLACE)
            both = self.graph.call_function(add_norm, arguments, dict(norm.kwargs))
            parts = [self.graph.call_function(operator.getitem, (both, index)) for index in (0, 1)]
        for node, part in ((norm, parts[1]), (value, parts[0])):
            node.replace_all_uses_with(part)
            self.graph.erase_node(node)
        if not parts[0].users:
            self.graph.erase_node(parts[0])
