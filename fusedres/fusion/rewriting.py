"""What all rewriting of flat graphs shares: chains of one reader, ReLU and additions."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fusedres.fusion.aliasing import Values, addition, is_standard
from fusedres.fusion.options import Options
from fusedres.fusion.runtime import norm_add, norm_add_norm

_RELU_FUNCTIONS = {torch.relu, torch.relu_, F.relu, F.relu_}
_RELU_METHODS = {"relu", "relu_"}
IN_PLACE = {operator.iadd, "add_", "__iadd__", "relu_", torch.relu_, F.relu_}


@dataclass(frozen=True)
class Call:
    """One call of a normalisation.

    ``module`` is its path below the root of the graph, or that of the module that calls a function. ``acts`` and
    ``adds`` say what goes with a LayerNorm and a Linear, where the pattern's name does not. ``partner`` is the path of
    the other BatchNorm of a projection join; ``recomputes`` is whether the backward computes the output again, and
    ``forks`` whether it adds the gradients of two readers. ``window`` is that of a maximum pooling: kernel size,
    stride, padding, dilation and ceil_mode.
    """

    module: str
    pattern: str
    reason: str = ""
    acts: bool = False
    adds: bool = False
    partner: str = ""
    recomputes: bool = False
    forks: bool = False
    window: tuple[Any, ...] | None = None


@dataclass
class Chain:
    """``start`` followed by nn.Identity, up to its one reader."""

    nodes: list[fx.Node]
    reader: fx.Node | None

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]


class Rewriter:
    """Base of what folds one family of patterns in ``graph``; ``refusal`` says why a module must stay as it is."""

    def __init__(self, values: Values, refusal: Callable[[nn.Module], str | None], options: Options) -> None:
        self.graph, self.values = values.graph, values
        self.refusal = refusal
        self.options = options

    def chain(self, node: fx.Node) -> Chain:
        """``node`` and the nn.Identity behind it."""
        nodes = [node]
        while True:
            readers = self.values.readers(nodes[-1])
            reader = readers[0] if len(readers) == 1 else None
            if reader is None or not is_standard(self.values.module(reader), nn.Identity):
                return Chain(nodes, reader)
            nodes.append(reader)

    def act_behind(self, chain: Chain) -> fx.Node | None:
        """The reader of ``chain`` where it is a ReLU."""
        return chain.reader if chain.reader is not None and self.is_act(chain.reader, chain.last) else None

    def is_act(self, node: fx.Node, input: fx.Node) -> bool:
        """Whether ``node`` is relu(input)."""
        if node.all_input_nodes != [input]:
            return False
        if node.op == "call_function":
            return node.target in _RELU_FUNCTIONS
        if node.op == "call_method":
            return node.target in _RELU_METHODS
        return is_standard(self.values.module(node), nn.ReLU)

    def residual(self, node: fx.Node, input: fx.Node) -> fx.Node | None:
        """The other operand where ``node`` adds another traced value to ``input``, unscaled."""
        others = [operand for operand in addition(node) if operand is not input]
        return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None

    def changed_operand(self, add: fx.Node, input: fx.Node) -> str | None:
        """Which operand ``add`` changes in place: ``"norm"``, that is ``input``, ``"residual"`` or ``None``."""
        if add.target not in IN_PLACE:
            return None
        return "norm" if add.args[0] is input else "residual"

    def is_spare(self, value: fx.Node, reader: fx.Node) -> bool:
        """Whether nobody can tell that ``reader`` does not change ``value``: it is new, and read nowhere else."""
        others = [user for user in value.users if user is not reader and not self.values.reads_metadata(user)]
        return self.values.is_fresh(value) and not others

    def name_in_place_results(self, start: fx.Node) -> None:
        """Let ``y.add_(x)`` and the like, where ``y`` is read again, be read under the result's name."""
        values = [start]
        for value in values:
            for node in sorted(value.users):
                if self._changes(node, value):
                    value.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: user > node)
                    values.append(node)
                    break
                if self.is_act(node, value) or self.residual(node, value) is not None:
                    values.append(node)

    def _changes(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether ``node`` is an addition or a ReLU that writes its result into ``value``."""
        return node.all_input_nodes[0] is value and (node.target in IN_PLACE or self._is_in_place_relu(node))

    def _is_in_place_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.values.module(node)
            return isinstance(module, nn.ReLU) and module.inplace
        return node.target is F.relu and (True in node.args[1:] or node.kwargs.get("inplace") is True)

    def replace(self, nodes: list[fx.Node], stand_in: fx.Node | None) -> None:
        """Let ``stand_in`` be read in place of ``nodes``, which go; ``None`` where nobody else reads them."""
        if stand_in is not None:
            for node in nodes:
                node.replace_all_uses_with(stand_in, delete_user_cb=lambda user: user not in nodes)
        for node in reversed(nodes):
            self.graph.erase_node(node)

    def attribute(self, call: fx.Node, before: fx.Node) -> fx.Node:
        """The module that ``call`` calls, as a value."""
        with self.graph.inserting_before(before):
            return self.graph.get_attr(str(call.target))


def describe(node: fx.Node) -> str:
    """What ``node`` calls, for a reason."""
    if node.op == "output":
        return "the end of its network"
    if node.target in (norm_add, norm_add_norm):
        return "an addition"
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
