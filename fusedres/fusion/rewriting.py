"""What all rewriting of traced graphs shares: chains of one reader, ReLU and additions, prints of values that go."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fusedres.fusion.runtime import norm_add, norm_add_norm
from fusedres.fusion.values import Values, is_standard, print_function

_RELU_FUNCTIONS = {torch.relu, torch.relu_, F.relu, F.relu_}
_RELU_METHODS = {"relu", "relu_"}
_ADD_FUNCTIONS = {operator.add, operator.iadd, torch.add}
_ADD_METHODS = {"add", "add_", "__add__", "__iadd__"}
_IN_PLACE = {operator.iadd, "add_", "__iadd__", "relu_", torch.relu_, F.relu_}


@dataclass(frozen=True)
class Call:
    """One call of a normalisation, or one print that the fusion drops.

    ``module`` is the path inside the block, or empty for the block itself: prints, and functional forms. ``acts`` and
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
class Rewritten:
    """What was folded: a row for every call that is reported, and the modules no longer called as they were.

    ``norms`` are the BatchNorms, ``standard`` PyTorch's other modules with their classes, ``sequences`` the
    nn.Sequential whose children are called in their place, with their number. ``is_changed`` is whether anything was
    folded: functional forms have no module to name.
    """

    calls: list[Call] = field(default_factory=list)
    norms: set[str] = field(default_factory=set)
    standard: dict[str, type[nn.Module]] = field(default_factory=dict)
    sequences: dict[str, int] = field(default_factory=dict)
    is_changed: bool = False


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

    def __init__(
        self, block: nn.Module, graph: fx.Graph, refusal: Callable[[nn.Module], str | None], result: Rewritten
    ) -> None:
        self.graph = graph
        self.values = Values(block, graph)
        self.refusal = refusal
        self.result = result

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
        if add.target not in _IN_PLACE:
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
        return node.all_input_nodes[0] is value and (node.target in _IN_PLACE or self._is_in_place_relu(node))

    def _is_in_place_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.values.module(node)
            return isinstance(module, nn.ReLU) and module.inplace
        return node.target is F.relu and (True in node.args[1:] or node.kwargs.get("inplace") is True)

    def note(self, node: fx.Node | None) -> None:
        """``node`` is folded: as a module, it is no longer called."""
        module = None if node is None else self.values.module(node)
        if node is not None and module is not None:
            self.result.standard[str(node.target)] = type(module)

    def drop_prints(self, name: str, removed: list[fx.Node]) -> None:
        """Drop the prints that show the values of ``removed``, and what is computed for them alone."""
        pending = self._shows(removed)
        doomed: set[fx.Node] = set()
        while pending:
            node = pending.pop()
            if node not in doomed:
                doomed.add(node)
                pending += node.users
        for node in sorted(doomed, reverse=True):
            if node._erased:
                continue
            if node.target is print_function:
                reason = f"{_print_text(node)} shows a value that the fusion of {name} does not compute"
                self.result.calls.append(Call("", "print", reason))
            inputs = node.all_input_nodes
            self.graph.erase_node(node)
            self._erase_dead(inputs)

    def is_shown(self, nodes: list[fx.Node]) -> bool:
        """Whether a print shows a value of ``nodes``."""
        return bool(self._shows(nodes))

    def _shows(self, nodes: list[fx.Node]) -> list[fx.Node]:
        """The readers of ``nodes`` of which nothing but prints comes."""
        users = (user for node in nodes for user in node.users)
        return [user for user in users if self.values.only_prints(user) and not self.values.reads_metadata(user)]

    def _erase_dead(self, nodes: list[fx.Node]) -> None:
        for node in nodes:
            if not node._erased and not node.users and self.values.is_pure(node):
                inputs = node.all_input_nodes
                self.graph.erase_node(node)
                self._erase_dead(inputs)

    def replace(self, nodes: list[fx.Node], stand_in: fx.Node | None) -> None:
        """Let ``stand_in`` be read in place of ``nodes``, which go; ``None`` where nobody else reads them."""
        if stand_in is not None:
            for node in nodes:
                node.replace_all_uses_with(stand_in, delete_user_cb=lambda user: user not in nodes)
        for node in reversed(nodes):
            self.skip(node)
            self.graph.erase_node(node)

    def skip(self, node: fx.Node) -> None:
        """Note that ``node`` is not called any more, if it is an nn.Identity."""
        if is_standard(self.values.module(node), nn.Identity):
            self.note(node)


def with_inputs(graph: fx.Graph, *names: str) -> fx.Graph | None:
    """A copy with inputs more, that nothing reads yet; ``None`` where the graph has not one input."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    inputs = [node for node in copy.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        return None
    last = inputs[0]
    for name in names:
        with copy.inserting_after(last):
            last = copy.placeholder(name)
    return copy


def addition(node: fx.Node) -> list[Any]:
    """The two operands where ``node`` adds them unscaled; the one that is changed in place, if any, comes first."""
    names = _ADD_FUNCTIONS if node.op == "call_function" else _ADD_METHODS if node.op == "call_method" else ()
    kwargs = dict(node.kwargs)
    operands = [*node.args, *(kwargs.pop(key) for key in ("input", "other") if key in kwargs)]
    plain = node.target in names and kwargs.pop("alpha", 1) == 1 and not kwargs and len(operands) == 2
    return operands if plain else []


def describe(node: fx.Node) -> str:
    """What ``node`` calls, for a reason."""
    if node.op == "output":
        return "the end of its block"
    if node.target in (norm_add, norm_add_norm):
        return "an addition"
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _print_text(node: fx.Node) -> str:
    """The print as it might stand in the source."""
    shown = [
        arg.args[0] if isinstance(arg, fx.Node) and arg.target == "format" and arg.op == "call_method" else arg
        for arg in node.args
    ]
    return f"print({', '.join(repr(arg) for arg in shown)})"
