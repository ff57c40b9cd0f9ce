"""Find BatchNorm + add + ReLU in a traced graph and fold it into one call."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from fusedres.fusion.runtime import norm_add
from fusedres.fusion.values import Values, between, is_standard, print_function
from fusedres.nn import BatchNormAct2d

_RELU_FUNCTIONS = {torch.relu, torch.relu_, F.relu, F.relu_}
_RELU_METHODS = {"relu", "relu_"}
_ADD_FUNCTIONS = {operator.add, operator.iadd, torch.add}
_ADD_METHODS = {"add", "add_", "__add__", "__iadd__"}
_IN_PLACE = {operator.iadd, "add_", "__iadd__", "relu_", torch.relu_, F.relu_}


@dataclass(frozen=True)
class Call:
    """One call of a BatchNorm, or one print that the fusion drops: ``module`` is the path inside the block."""

    module: str
    pattern: str
    reason: str = ""


@dataclass
class Rewritten:
    """What was folded: a row for every BatchNorm call in order, and the modules no longer called as they were."""

    calls: list[Call] = field(default_factory=list)
    norms: set[str] = field(default_factory=set)
    acts: set[str] = field(default_factory=set)


@dataclass
class _Chain:
    """``start`` followed by nn.Identity, up to its one reader."""

    nodes: list[fx.Node]
    reader: fx.Node | None

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]


def rewrite(block: nn.Module, graph: fx.Graph, refusal: Callable[[nn.Module], str | None]) -> Rewritten:
    """Fold the patterns of ``graph`` in place; ``refusal`` says why a BatchNorm must stay as it is."""
    return _Rewriter(block, graph, refusal).run()


class _Rewriter:
    def __init__(self, block: nn.Module, graph: fx.Graph, refusal: Callable[[nn.Module], str | None]) -> None:
        self.graph = graph
        self.values = Values(block, graph)
        self.refusal = refusal
        self.result = Rewritten()

    def run(self) -> Rewritten:
        norms = [n for n in self.graph.nodes if isinstance(self.values.module(n), nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            self._name_in_place_results(norm)
        # The last of two BatchNorms that are added takes the addition: its other operand exists by then.
        calls = [self._rewrite_call(norm) for norm in reversed(norms)]
        self.result.calls[:0] = reversed(calls)
        if self.result.norms:
            self.values.without_needless_clones()
        return self.result

    def _rewrite_call(self, norm: fx.Node) -> Call:
        module, name = self.values.module(norm), str(norm.target)
        assert module is not None
        reason = self.refusal(module)
        if reason is not None:
            return Call(name, "bn", reason)
        if isinstance(module, BatchNormAct2d) and (module.act is not None or norm.kwargs or len(norm.args) != 1):
            return _own_call(norm, module)
        if norm.kwargs or len(norm.args) != 1 or not isinstance(norm.args[0], fx.Node):
            return Call(name, "bn", "it is not called with one input")
        chain = self._chain(norm)
        if chain.reader is None:
            return Call(name, "bn", "its output is used more than once" if len(norm.users) > 1 else "")
        if self._is_act(chain.reader, chain.last):
            return self._fold_act(norm, chain)
        residual = self._residual(chain.reader, chain.last)
        if residual is None:
            return Call(name, "bn", f"followed by {_describe(chain.reader)}")
        return self._fold_add(norm, chain, residual)

    def _fold_act(self, norm: fx.Node, chain: _Chain) -> Call:
        act = chain.reader
        assert act is not None
        self._drop_prints(norm, chain.nodes)
        norm.kwargs = {"act": "relu"}
        self._note(norm, act)
        self._replace([*chain.nodes[1:], act], norm)
        return Call(str(norm.target), "bn_act")

    def _fold_add(self, norm: fx.Node, chain: _Chain, residual: fx.Node) -> Call:
        add, input, name = chain.reader, norm.args[0], str(norm.target)
        assert add is not None and isinstance(input, fx.Node)
        changes = None
        if _is_in_place(add):
            changes = "norm" if add.args[0] is chain.last else "residual"
        if changes == "residual" and not self._is_spare(residual, add):
            return Call(name, "bn", "the addition changes its other operand, which is read elsewhere")
        if not self._can_wait(norm, input, add):
            return Call(name, "bn", "its input or its statistics may be used before the addition")
        tail = self._chain(add)
        act = tail.reader if tail.reader is not None and self._is_act(tail.reader, tail.last) else None
        self._drop_prints(norm, [*chain.nodes, *(tail.nodes if act else ())])
        with self.graph.inserting_before(add):
            module = self.graph.get_attr(name)
            arguments = (module, input, residual, "relu" if act else None, changes)
            fused = self.graph.call_function(norm_add, arguments)
        self._note(norm, act)
        self._replace([*tail.nodes, act] if act else [add], fused)
        self._replace(chain.nodes, input)
        return Call(name, "bn_add_act" if act else "bn_add")

    def _is_spare(self, value: fx.Node, reader: fx.Node) -> bool:
        """Whether nobody can tell that ``reader`` does not change ``value``: it is new, and read nowhere else."""
        others = [user for user in value.users if user is not reader and not self.values.reads_metadata(user)]
        return self.values.is_fresh(value) and not others

    def _note(self, norm: fx.Node, act: fx.Node | None) -> None:
        self.result.norms.add(str(norm.target))
        if act is not None and act.op == "call_module":
            self.result.acts.add(str(act.target))

    def _chain(self, node: fx.Node) -> _Chain:
        nodes = [node]
        while True:
            readers = self.values.readers(nodes[-1])
            reader = readers[0] if len(readers) == 1 else None
            if reader is None or not is_standard(self.values.module(reader), nn.Identity):
                return _Chain(nodes, reader)
            nodes.append(reader)

    def _is_act(self, node: fx.Node, input: fx.Node) -> bool:
        """Whether ``node`` is relu(input)."""
        if node.all_input_nodes != [input]:
            return False
        if node.op == "call_function":
            return node.target in _RELU_FUNCTIONS
        if node.op == "call_method":
            return node.target in _RELU_METHODS
        return is_standard(self.values.module(node), nn.ReLU)

    def _residual(self, node: fx.Node, input: fx.Node) -> fx.Node | None:
        """The other operand where ``node`` adds another traced value to ``input``, unscaled."""
        names = _ADD_FUNCTIONS if node.op == "call_function" else _ADD_METHODS if node.op == "call_method" else ()
        kwargs = dict(node.kwargs)
        operands = [*node.args, *(kwargs.pop(key) for key in ("input", "other") if key in kwargs)]
        if node.target not in names or kwargs.pop("alpha", 1) != 1 or kwargs or len(operands) != 2:
            return None
        others = [operand for operand in operands if operand is not input]
        return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None

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

    def _name_in_place_results(self, norm: fx.Node) -> None:
        """Let ``y.add_(x)`` and the like, where ``y`` is read again, be read under the result's name."""
        values = [norm]
        for value in values:
            for node in sorted(value.users):
                if self._changes(node, value):
                    value.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: user > node)
                    values.append(node)
                    break
                if self._is_act(node, value) or self._residual(node, value) is not None:
                    values.append(node)

    def _changes(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether ``node`` is an addition or a ReLU that writes its result into ``value``."""
        return node.all_input_nodes[0] is value and (_is_in_place(node) or self._is_in_place_relu(node))

    def _is_in_place_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.values.module(node)
            return isinstance(module, nn.ReLU) and module.inplace
        return node.target is F.relu and (True in node.args[1:] or node.kwargs.get("inplace") is True)

    def _drop_prints(self, norm: fx.Node, removed: list[fx.Node]) -> None:
        """Drop the prints that show the values of ``removed``, and what is computed for them alone."""
        pending = [
            user
            for node in removed
            for user in node.users
            if self.values.only_prints(user) and not self.values.reads_metadata(user)
        ]
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
                reason = f"{_print_text(node)} shows a value that the fusion of {norm.target} does not compute"
                self.result.calls.append(Call("", "print", reason))
            inputs = node.all_input_nodes
            self.graph.erase_node(node)
            self._erase_dead(inputs)

    def _erase_dead(self, nodes: list[fx.Node]) -> None:
        for node in nodes:
            if not node._erased and not node.users and self.values.is_pure(node):
                inputs = node.all_input_nodes
                self.graph.erase_node(node)
                self._erase_dead(inputs)

    def _replace(self, nodes: list[fx.Node], stand_in: fx.Node) -> None:
        for node in nodes:
            node.replace_all_uses_with(stand_in, delete_user_cb=lambda user: user not in nodes)
        for node in reversed(nodes):
            self.graph.erase_node(node)


def _is_in_place(node: fx.Node) -> bool:
    return node.target in _IN_PLACE


def _own_call(norm: fx.Node, module: BatchNormAct2d) -> Call:
    """A BatchNormAct2d that its model calls with a residual or an activation already."""
    add = "_add" if len(norm.args) > 1 or norm.kwargs.get("residual") is not None else ""
    act = "_act" if norm.kwargs.get("act", module.act) is not None else ""
    return Call(str(norm.target), f"bn{add}{act}")


def _describe(node: fx.Node) -> str:
    if node.op == "output":
        return "the end of its block"
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _print_text(node: fx.Node) -> str:
    """The print as it might stand in the source."""
    shown = [
        arg.args[0] if isinstance(arg, fx.Node) and arg.target == "format" and arg.op == "call_method" else arg
        for arg in node.args
    ]
    return f"print({', '.join(repr(arg) for arg in shown)})"
