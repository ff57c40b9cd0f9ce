"""Let the BatchNorm that reads a sum do the addition: in one graph, and where the other is in another module.

Of two BatchNorms around an addition the one in front has it (``bn_add``). In passes over an activation that is 7 in the
forward and 5 in inference, where the one behind would need 8 and 6; in the backward it is the other way round, 13 and
11, where the sum also goes on as the identity path.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.fusion.chains import Chain, Forks, merge_forks
from fusedres.fusion.guests import guests
from fusedres.fusion.options import Options
from fusedres.fusion.pairs import add_norm, joined, operands, pair, total
from fusedres.fusion.rewriting import Call, Rewritten, addition, with_inputs
from fusedres.fusion.values import Values, between

_IN_PLACE = (operator.iadd, "add_", "__iadd__")


@dataclass
class Joined:
    """A forward, and what its joins rely on.

    Attributes:
        graph: of the forward.
        norms: the BatchNorms that add, or end a value as its readers need.
        standard: PyTorch's modules that are not called any more, with their classes.
        guests: the children that are called with a value which user code must not reach. The gradient of a sum lacks
            what comes from the BatchNorm, for that is added when the gradient goes on to the summands; the gradient of
            one of two names lacks what comes from the other.
        chain: see :class:`Chain`.
    """

    graph: fx.Graph
    norms: set[str] = field(default_factory=set)
    standard: dict[str, type[nn.Module]] = field(default_factory=dict)
    guests: set[str] = field(default_factory=set)
    chain: Chain = field(default_factory=Chain)


@dataclass
class Forms:
    """What became of a block's forward in one mode.

    Attributes:
        folded: the patterns of a single BatchNorm, and a row for each call of one.
        forward: the forward.
        paired: the forward that takes and gives pairs, where it can do either.
        forked: the forward that takes its input under two names and ends as it is asked, where it can do either.
    """

    folded: Rewritten
    forward: Joined
    paired: Joined | None
    forked: Joined | None = None

    def is_rewritten(self, native: bool) -> bool:
        """Whether there is anything that the block cannot do; a ``native`` one takes and gives pairs."""
        forward = self.forward
        links = forward.chain.links or forward.chain.forks.links
        return bool(self.folded.is_changed or forward.norms or links or (self.paired and not native))


def join(
    block: nn.Module,
    graph: fx.Graph,
    folded: Rewritten,
    chains: Mapping[nn.Module, Chain],
    fusable: Callable[[nn.Module], bool],
    options: Options,
) -> Forms:
    """Join additions and BatchNorms of ``graph`` in place, and update the rows of ``folded``.

    Args:
        block: whose forward it is.
        graph: with the patterns of a single BatchNorm folded.
        folded: what was folded.
        chains: how the blocks below ``block`` pass pairs on.
        fusable: whether the call of a BatchNorm may be replaced.
        options: whether to.
    """
    if not options.allows("preact"):
        return Forms(folded, Joined(graph), None)
    second = with_inputs(graph, "_fusedres_residual")
    forward = _Joiner(block, graph, chains, fusable).run(folded.calls)
    if second is None:
        return Forms(folded, forward, None)
    paired = _Joiner(block, second, chains, fusable).run_with_residual(list(folded.calls))
    useful = paired.chain.takes is not None or paired.chain.gives is not None
    return Forms(folded, forward, paired if useful else None)


def merge_chains(training: Forms, evaluation: Forms) -> Chain:
    """What holds in both modes."""
    ends = {(form.paired.chain.takes, form.paired.chain.gives) for form in (training, evaluation) if form.paired}
    takes, gives = ends.pop() if training.paired and evaluation.paired and len(ends) == 1 else (None, None)
    links = evaluation.forward.chain.links
    forks = merge_forks(*(_forks(form) for form in (training, evaluation)))
    return Chain(takes, gives, tuple(link for link in training.forward.chain.links if link in links), forks)


def _forks(form: Forms) -> Forks:
    """Of both forwards."""
    first = form.forward.chain.forks
    return first if form.forked is None else replace(form.forked.chain.forks, links=first.links)


def _has_one_input(node: fx.Node) -> bool:
    """Whether ``node`` calls a BatchNorm with one input, and perhaps an activation."""
    return len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs.keys() - {"act"}


def _rows(values: Values, calls: list[Call]) -> dict[fx.Node, int]:
    """The places in ``calls`` of the BatchNorm calls without an addition."""
    places: dict[str, list[int]] = {}
    for index, call in enumerate(calls):
        if call.pattern in ("bn", "bn_act"):
            places.setdefault(call.module, []).append(index)
    rows: dict[fx.Node, int] = {}
    for node in values.graph.nodes:
        name = _norm_name(values, node)
        if name is not None and places.get(name):
            rows[node] = places[name].pop(0)
    return rows


def _norm_name(values: Values, node: fx.Node) -> str | None:
    """The BatchNorm that ``node`` calls without an addition."""
    added = len(node.args) > 1 or node.kwargs.get("residual") is not None
    return str(node.target) if isinstance(values.module(node), _BatchNorm) and not added else None


class _Joiner:
    """Looks at each value that could be a pair: the first input, additions, and calls of blocks that give one."""

    def __init__(
        self,
        block: nn.Module,
        graph: fx.Graph,
        chains: Mapping[nn.Module, Chain],
        fusable: Callable[[nn.Module], bool],
    ) -> None:
        self.graph = graph
        self.values = Values(block, graph)
        self.chains = chains
        self.fusable = fusable
        self.result = Joined(graph)
        self.links: list[tuple[str, str]] = []
        self.fed: dict[fx.Node, fx.Node] = {}  # calls of blocks, and what they became once they were given a pair

    def run(self, calls: list[Call]) -> Joined:
        """Pass pairs on inside of the graph."""
        rows = _rows(self.values, calls)
        nodes: list[fx.Node] = list(self.graph.nodes)
        for node in nodes:
            node = self.fed.get(node, node)
            consumer = self._consumer(node) if self._gives(node) else None
            if consumer is None:
                continue
            source, target = self._path(node), self._path(consumer)
            self._feed(consumer, node, *self._split(node))
            if source or consumer not in rows:
                self.links.append((source, target))
            else:
                call = calls[rows[consumer]]
                calls[rows[consumer]] = Call(call.module, f"add_{call.pattern}", call.reason)
        self.result.chain = Chain(links=tuple(self.links))
        return self.result

    def run_with_residual(self, calls: list[Call]) -> Joined:
        """The same in the graph whose input has a residual, and let the output be a pair."""
        input, residual = (node for node in self.graph.nodes if node.op == "placeholder")
        consumer = self._consumer(input)
        takes = None if consumer is None else self._path(consumer)
        if consumer is not None:
            self._feed(consumer, input, input, residual)
        else:
            with self.graph.inserting_before(residual.next):
                whole = self.graph.call_function(total, (input, residual))
            input.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not whole)
        self.run(calls)
        self.result.chain = Chain(takes, self._give())
        return self.result

    def _give(self) -> str | None:
        """Let the graph return a pair: that of its last node, or what it returned and None."""
        output = list(self.graph.nodes)[-1]
        value = output.args[0]
        if isinstance(value, fx.Node) and self._gives(value) and self._may_wait(value, output):
            gives = self._path(value)
            output.args = (self._as_pair(value),)
            self._erase(value)
            return gives
        output.args = ((value, None),)
        return None

    def _gives(self, node: fx.Node) -> bool:
        """Whether ``node`` can be had as a pair."""
        if node.op == "call_module" or node.target is joined:
            chain = self._chain(node)
            return chain is not None and chain.gives is not None
        summands = addition(node)
        if not summands or not all(isinstance(summand, fx.Node) for summand in summands):
            return False
        # In place, into something that nobody else reads, is as good as out of place.
        return node.target not in _IN_PLACE or (
            self.values.is_fresh(summands[0])
            and all(user is node or self.values.reads_metadata(user) for user in summands[0].users)
        )

    def _chain(self, node: fx.Node) -> Chain | None:
        """How the block that ``node`` calls with one input passes pairs on."""
        if node.op == "call_module" and (len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node)):
            return None
        module = self.values.modules.get(self._path(node))
        return None if module is None else self.chains.get(module)

    def _path(self, node: fx.Node) -> str:
        """Of the child that ``node`` calls, itself or by one of our functions; ``""`` for an addition."""
        if node.op == "call_module":
            return str(node.target)
        first = node.args[0] if node.args and not addition(node) else None
        return str(first.target) if isinstance(first, fx.Node) and first.op == "get_attr" else ""

    def _consumer(self, value: fx.Node) -> fx.Node | None:
        """What can be given ``value`` as a pair: a BatchNorm, or a block that is its only reader."""
        users = sorted(user for user in value.users if not self.values.reads_metadata(user))
        for user in users:
            if self._is_norm(user, value):
                called = guests(self.values, value, user) if self._can_run_at(user, value) else None
                if called is None:
                    return None
                self.result.guests |= called
                return user
        if len(users) == 1 and users[0].op == "call_module" and users[0].args == (value,):
            chain = self._chain(users[0])
            if chain is not None and chain.takes is not None and self._may_wait(value, users[0]):
                return users[0]
        return None

    def _is_norm(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether ``node`` is a BatchNorm of ``value`` that may be replaced."""
        module = self.values.module(node)
        return isinstance(module, _BatchNorm) and _has_one_input(node) and self.fusable(module)

    def _can_run_at(self, norm: fx.Node, start: fx.Node) -> bool:
        """Whether ``norm`` may run right after its input: same input, same order of updates of its statistics."""
        path = self._path(norm)
        module = self.values.modules[path]
        for node in self.graph.nodes:
            if node is norm:
                break
            owner = str(node.target).rpartition(".")[0]
            if node.op == "get_attr" and self.values.modules.get(owner) is module:
                return False  # its statistics, perhaps read in between
        for node in between(start, norm):
            other = self.values.modules.get(self._path(node))
            if other is not None and self._path(node) and any(part is module for part in other.modules()):
                return False
        return not self.values.may_change_between(start, start, norm)

    def _may_wait(self, value: fx.Node, reader: fx.Node) -> bool:
        """Whether ``value`` can be added up at ``reader``, its only reader: nothing changes its summands before."""
        if any(user is not reader and not self.values.reads_metadata(user) for user in value.users):
            return False
        parts = addition(value) or [value]
        return not any(self.values.may_change_between(part, value, reader) for part in parts)

    def _split(self, value: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The two parts of the pair that ``value`` becomes."""
        parts = self._as_pair(value)
        with self.graph.inserting_before(parts.next):
            input = self.graph.call_function(operator.getitem, (parts, 0))
            return input, self.graph.call_function(operator.getitem, (parts, 1))

    def _as_pair(self, value: fx.Node) -> fx.Node:
        with self.graph.inserting_before(value):
            if value.op == "call_module":
                return self.graph.call_function(operands, (self.graph.get_attr(self._path(value)), *value.args))
            if value.target is joined:
                return self.graph.call_function(operands, value.args)
            return self.graph.call_function(pair, (*addition(value), value.target in _IN_PLACE))

    def _feed(self, consumer: fx.Node, whole: fx.Node, input: fx.Node, residual: fx.Node) -> None:
        """Give ``consumer`` the pair in place of ``whole``."""
        path = self._path(consumer)
        if self._is_norm(consumer, whole):
            self.result.norms.add(path)
            with self.graph.inserting_before(residual.next):
                arguments = (self.graph.get_attr(path), input, residual)
                both = self.graph.call_function(add_norm, arguments, dict(consumer.kwargs))
                sum = self.graph.call_function(operator.getitem, (both, 0))
                out = self.graph.call_function(operator.getitem, (both, 1))
            whole.replace_all_uses_with(sum, delete_user_cb=lambda user: user not in (consumer, both))
            self._erase(sum)
            consumer.replace_all_uses_with(out)
        else:
            with self.graph.inserting_before(consumer):
                out = self.graph.call_function(joined, (self.graph.get_attr(path), input, residual))
            self.fed[consumer] = out
            consumer.replace_all_uses_with(out)
        self._erase(consumer)
        if whole is not input:
            whole.replace_all_uses_with(input)  # shapes and devices
            self._erase(whole)

    def _erase(self, node: fx.Node) -> None:
        if not node.users:
            self.graph.erase_node(node)
