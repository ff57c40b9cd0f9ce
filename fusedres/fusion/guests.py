"""Who gets to see a value whose gradient is not the one that eager PyTorch would give it."""

from __future__ import annotations

from torch import fx

from fusedres.fusion.rewriting import addition
from fusedres.fusion.values import Values

_HARMLESS_ATTRIBUTES = ("dtype", "layout", "is_cuda", "requires_grad")


def guests(values: Values, value: fx.Node, reader: fx.Node | None = None) -> set[str] | None:
    """The children besides ``reader`` that are called with ``value``; ``None`` if user code may reach it."""
    called: set[str] = set()
    seen: set[fx.Node] = set()
    pending = [value]
    while pending:
        value = pending.pop()
        for user in set(value.users) - {reader} - seen:
            if values.reads_metadata(user) or values.only_prints(user):
                continue
            if addition(user) and addition(user)[0] is not value:
                continue  # if anything, it changes its first operand
            seen.add(user)
            if user.op == "output" or values.mutates(user) or not _keeps_to_itself(values, user):
                return None
            if user.op == "call_module":
                called.add(str(user.target))
            if not values.is_fresh(user):  # perhaps the same tensor
                pending.append(user)
    return called


def _keeps_to_itself(values: Values, node: fx.Node) -> bool:
    """Whether ``node`` neither hands its input to user code nor asks for its gradient."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _HARMLESS_ATTRIBUTES
    return node.op == "call_module" or values.is_pure(node)
