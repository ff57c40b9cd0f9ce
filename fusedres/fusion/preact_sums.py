"""Let the BatchNorm that reads a sum do the addition, as in pre-activation networks.

Of two BatchNorms around an addition the one in front has it (``bn_add``). In passes over an activation that is 7 in the
forward and 5 in inference, where the one behind would need 8 and 6; in the backward it is the other way round, 13 and
11, where the sum also goes on as the identity path.
"""

from __future__ import annotations

from torch import fx

from fusedres.fusion.aliasing import IN_PLACE_ADDITIONS, addition
from fusedres.fusion.foreign import computes_one_norm, is_timms
from fusedres.fusion.rewriting import Rewriter


class SumRewriter(Rewriter):
    """Folds an addition and the BatchNorm behind it into one call that gives both results."""

    def run(self) -> None:
        """``summand`` of a call is what it adds to its input, and whether in place."""
        for value in list(self.graph.nodes):
            norm = self._norm_behind(value) if self._is_sum(value) else None
            if norm is not None:
                self._fold(value, norm)

    def _is_sum(self, node: fx.Node) -> bool:
        summands = addition(node)
        if not summands or not all(isinstance(summand, fx.Node) for summand in summands):
            return False
        # In place, into something that nobody else reads, is as good as out of place.
        return node.target not in IN_PLACE_ADDITIONS or self.is_spare(summands[0], node)

    def _norm_behind(self, value: fx.Node) -> fx.Node | None:
        """The BatchNorm of ``value`` that can run where it is made, and whose readers beside it are known."""
        for user in sorted(self.values.readers(value)):
            if "given" not in user.meta or user.args != (value,) or user.kwargs.keys() - {"act"}:
                continue
            module = self.values.module(user)
            if is_timms(module) and not computes_one_norm(module):
                continue
            movable = self.values.may_move(user, value, user)
            movable = movable and not self.values.may_change_between(value, value, user)
            return user if movable and self.values.is_out_of_reach(value, user) else None
        return None

    def _fold(self, value: fx.Node, norm: fx.Node) -> None:
        first, second = addition(value)
        value.prepend(norm)
        norm.args = (first,)
        norm.kwargs = {**norm.kwargs, "summand": second, "in_place": value.target in IN_PLACE_ADDITIONS}
        total, normalised = self.split(norm)
        norm.replace_all_uses_with(normalised, delete_user_cb=lambda user: user not in (total, normalised))
        value.replace_all_uses_with(total)
        self.graph.erase_node(value)
        if not total.users:
            self.graph.erase_node(total)
