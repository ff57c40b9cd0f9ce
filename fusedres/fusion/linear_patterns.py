"""Find LayerNorm next to Linear in a traced graph and fold both, the ReLU and the skip behind them into one call.

Every Linear and every LayerNorm goes into one pattern at most; what saves more passes over an activation goes first:

- A LayerNorm goes with the Linear behind it: the normalised input, which the Linear would read, is never written.
- Else with the Linear in front of it, where that is not taken: ReLU and addition behind come for free. Where neither
  is behind and the Linear has a LayerNorm of its own in front, the Linear goes with that one.

Paired from the last LayerNorm to the first, so LayerNorm -> Linear -> LayerNorm -> ReLU folds the last three, and
Linear -> LayerNorm -> Linear -> ReLU too.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from fusedres.fusion.aliasing import is_standard
from fusedres.fusion.rewriting import Call, Chain, Rewriter, describe
from fusedres.fusion.runtime import is_plain, linear_norm, linear_norm_add, linear_shape, norm_linear


@dataclass(frozen=True)
class _Layer:
    """A call of a Linear or a LayerNorm: a child of the block at ``path``, or a function with ``arguments``."""

    node: fx.Node
    input: fx.Node | None
    path: str
    arguments: tuple[Any, ...]
    reason: str | None

    @property
    def name(self) -> str:
        return self.path or describe(self.node)


@dataclass(frozen=True)
class _Pair:
    """A LayerNorm and a Linear that are next to each other: the one that runs first, what follows it, the other."""

    first: _Layer
    chain: Chain
    second: _Layer
    reason: str | None = None


class LinearRewriter(Rewriter):
    """Folds LayerNorm, Linear and what follows into one call."""

    def run(self) -> list[Call]:
        """A row for each LayerNorm that a Linear is near."""
        norms = [node for node in self.graph.nodes if self._layer_norm(node) is not None]
        for node in [node for node in self.graph.nodes if self._linear(node) is not None] + norms:
            self.name_in_place_results(node)
        calls = [self._rewrite_call(node) for node in reversed(norms)]
        return [call for call in reversed(calls) if call is not None]

    def _rewrite_call(self, node: fx.Node) -> Call | None:
        norm = self._layer_norm(node)
        assert norm is not None
        behind, before = self._pair_behind(norm), self._pair_before(norm)
        if isinstance(behind, _Pair) and behind.reason is None:
            return self._fold_norm_linear(behind)
        if isinstance(before, _Pair) and before.reason is None:
            return self._fold_linear_norm(before)
        reasons = [side.reason if isinstance(side, _Pair) else side for side in (behind, before)]
        reason = "; ".join(dict.fromkeys(filter(None, reasons)))
        return Call(self._row(norm), "ln", reason) if reason else None

    def _layer_norm(self, node: fx.Node) -> _Layer | None:
        if node.op == "call_function" and node.target is F.layer_norm:
            input, shape, *rest = _bind(node, input=None, normalized_shape=None, weight=None, bias=None, eps=1e-5)
            reason = None
            if isinstance(shape, (tuple, list)) and len(shape) != 1:
                reason = "it normalises over more than the last dimension"
            return self._function(node, input, (shape, *rest), rest[:2], reason)
        return self._child(node) if isinstance(self.values.module(node), nn.LayerNorm) else None

    def _linear(self, node: fx.Node) -> _Layer | None:
        if node.op == "call_function" and node.target is F.linear:
            input, *weights = _bind(node, input=None, weight=None, bias=None)
            return self._function(node, input, tuple(weights), weights)
        return self._child(node) if isinstance(self.values.module(node), nn.Linear) else None

    def _function(
        self, node: fx.Node, input: Any, arguments: tuple[Any, ...], weights: list[Any], reason: str | None = None
    ) -> _Layer:
        if not all(weight is None or self._is_own(weight) for weight in weights):
            reason = "its weights are not plain tensors of the block"
        return _Layer(node, input, "", arguments, reason or _input_reason(input))

    def _child(self, node: fx.Node) -> _Layer:
        module = self.values.module(node)
        assert module is not None
        inputs = [*node.args, *node.kwargs.values()]
        input: Any = inputs[0] if len(inputs) == 1 and node.kwargs.keys() <= {"input"} else None
        return _Layer(node, input, str(node.target), (), self.refusal(module) or _input_reason(input))

    def _is_own(self, weight: Any) -> bool:
        """Whether it is a tensor below the block, of a plain kind."""
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return False
        tensor = functools.reduce(getattr, str(weight.target).split("."), self.values.modules[""])
        return isinstance(tensor, Tensor) and is_plain(tensor)

    def _pair_behind(self, norm: _Layer) -> _Pair | str | None:
        """``norm`` and the Linear that reads it, or why there is none; ``None`` where no Linear is near."""
        chain = self.chain(norm.node)
        reader = chain.reader
        if reader is None:
            near = any(self._reads(user, chain.last) for user in self.values.readers(chain.last))
            return "its output is used more than once" if near else None
        if reader.target in (linear_norm, linear_norm_add) and reader.args[0] is chain.last:
            return "the Linear behind it is fused with the LayerNorm behind that"
        linear = self._reads(reader, chain.last)
        if linear is not None:
            return self._pair(norm, chain, linear)
        behind = self.chain(reader)
        near = self._is_apart(reader) and behind.reader is not None and self._reads(behind.reader, behind.last)
        return f"{self._name(reader)} is between it and the Linear behind it" if near else None

    def _pair_before(self, norm: _Layer) -> _Pair | str | None:
        """The Linear that ``norm`` reads and ``norm``, or why there is none; ``None`` where no Linear is near."""
        source = self._source(norm.input)
        if source is None:
            return None
        linear = self._linear(source)
        if linear is None:
            far = self._source(source.all_input_nodes[0]) if self._is_apart(source) else None
            near = far is not None and self._linear(far) is not None
            return f"{self._name(source)} is between it and the Linear in front of it" if near else None
        chain = self.chain(source)
        if chain.reader is not norm.node:
            return f"the output of the Linear {linear.name} is used more than once"
        return self._pair(linear, chain, norm)

    def _pair(self, first: _Layer, chain: Chain, second: _Layer) -> _Pair:
        norm, linear = (second, first) if self._linear(first.node) else (first, second)
        reason = norm.reason
        if reason is None and linear.reason is not None:
            reason = f"the Linear {linear.name}: {linear.reason}"
        if reason is None and not self._can_wait(first, second.node):
            reason = f"what {first.name} reads may change before {second.name} runs"
        return _Pair(first, chain, second, reason)

    def _reads(self, node: fx.Node, value: fx.Node) -> _Layer | None:
        """The Linear that ``node`` calls on ``value``."""
        linear = self._linear(node)
        return linear if linear is not None and (linear.path or linear.input is value) else None

    def _source(self, value: Any) -> fx.Node | None:
        """The node that ``value`` is, past nn.Identity."""
        while isinstance(value, fx.Node) and is_standard(self.values.module(value), nn.Identity):
            value = value.all_input_nodes[0]
        return value if isinstance(value, fx.Node) else None

    def _is_apart(self, node: fx.Node) -> bool:
        """Whether ``node`` is an operation of one value, such as dropout or GELU, that keeps two layers apart."""
        layer = self._linear(node) or self._layer_norm(node)
        return layer is None and node.op.startswith("call_") and len(node.all_input_nodes) == 1

    def _can_wait(self, first: _Layer, until: fx.Node) -> bool:
        """Whether ``first`` can run at ``until``: its input and all parameters are then what they were."""
        parameters = self.graph.find_nodes(op="get_attr")[:1]  # one is as good as another: they may overlap
        read = [first.input, *parameters]
        return not any(self.values.may_change_between(value, first.node, until) for value in read)

    def _fold_norm_linear(self, pair: _Pair) -> Call:
        norm, linear = pair.first, pair.second
        tail = self.chain(linear.node)
        act = self.act_behind(tail)
        result = [*tail.nodes, act] if act is not None else [linear.node]
        with self.graph.inserting_before(linear.node):
            arguments = (norm.input, self._operand(norm), self._operand(linear), "relu" if act else None)
            fused = self.graph.call_function(norm_linear, arguments)
        self.replace(result, fused)
        self.replace(pair.chain.nodes, norm.input)
        return Call(self._row(norm), "ln_linear_act", "" if act else self._no_act(tail), acts=act is not None)

    def _fold_linear_norm(self, pair: _Pair) -> Call:
        linear, norm = pair.first, pair.second
        chain = self.chain(norm.node)
        act = self.act_behind(chain)
        tail = self.chain(act) if act is not None else chain
        add, obstacle = self._addition(linear, tail)
        if act is None and add is None and self._has_norm_in_front(linear):
            return Call(self._row(norm), "ln", "the Linear in front of it is fused with the LayerNorm in front of that")
        gone, result = pair.chain.nodes, [*chain.nodes, act] if act is not None else [norm.node]
        if add is not None:
            gone, result = [*gone, *chain.nodes, *(tail.nodes if act is not None else ())], [add]
        with self.graph.inserting_before(add or norm.node):
            arguments = (linear.input, self._operand(linear), self._operand(norm), "relu" if act else None)
            if add is None:
                fused = self.graph.call_function(linear_norm, arguments)
            else:
                added = (self.residual(add, tail.last), self.changed_operand(add, tail.last))
                fused = self.graph.call_function(linear_norm_add, (*arguments, *added))
        self.replace(result, fused)
        self.replace(gone, self._shape(linear, gone))
        notes = ("" if act else "no ReLU" if add else self._no_act(chain), "with the addition" if add else obstacle)
        reason = ", ".join(filter(None, notes))
        return Call(self._row(norm), "linear_ln_act", reason, acts=act is not None, adds=add is not None)

    def _addition(self, linear: _Layer, tail: Chain) -> tuple[fx.Node | None, str]:
        """The addition behind ``tail`` that can be folded; else why not, if there is one."""
        add = tail.reader
        residual = self.residual(add, tail.last) if add is not None else None
        if add is None or residual is None:
            return None, ""
        if self.changed_operand(add, tail.last) == "residual" and not self.is_spare(residual, add):
            return None, "without the addition, which changes its other operand"
        if not self._can_wait(linear, add):
            return None, f"without the addition: what {linear.name} reads may change before it"
        return add, ""

    def _has_norm_in_front(self, linear: _Layer) -> bool:
        """Whether a LayerNorm in front of ``linear`` can be fused with it."""
        source = self._source(linear.input)
        norm = self._layer_norm(source) if source is not None else None
        pair = self._pair_behind(norm) if norm is not None else None
        return isinstance(pair, _Pair) and pair.reason is None

    def _shape(self, linear: _Layer, nodes: list[fx.Node]) -> fx.Node | None:
        """What stands for the shape of ``linear``'s output, where others than ``nodes`` read it from one of them."""
        if all(user in nodes for node in nodes for user in node.users):
            return None
        with self.graph.inserting_before(linear.node):
            return self.graph.call_function(linear_shape, (linear.input, self._operand(linear)))

    def _no_act(self, chain: Chain) -> str:
        return "no ReLU" if chain.reader is None else f"no ReLU: followed by {self._name(chain.reader)}"

    def _name(self, node: fx.Node) -> str:
        """What ``node`` calls, for a reason; a child of a Sequential has no more than a number for a name."""
        module = self.values.module(node)
        return describe(node) if module is None else f"{describe(node)} ({type(module).__name__})"

    def _row(self, norm: _Layer) -> str:
        """The path of ``norm``, or of the module that calls the function."""
        return norm.path or norm.node.meta.get("owner", "")

    def _operand(self, layer: _Layer) -> Any:
        """How a rewritten forward passes ``layer`` to the functions of ``runtime``."""
        return self.graph.get_attr(layer.path) if layer.path else layer.arguments


def _bind(node: fx.Node, **parameters: Any) -> list[Any]:
    """The values of ``parameters``, given with their defaults, in a call of a function."""
    return list((parameters | dict(zip(parameters, node.args, strict=False)) | node.kwargs).values())


def _input_reason(input: Any) -> str | None:
    return None if isinstance(input, fx.Node) else "it is not called with one input"
