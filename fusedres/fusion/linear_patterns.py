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

from fusedres.fusion.rewriting import Call, Chain, Rewriter, bind, describe
from fusedres.fusion.runtime import is_plain, linear_shape, norm_and_linear
from fusedres.fusion.watching import is_standard


@dataclass(frozen=True)
class _Layer:
    """A call of a Linear or a LayerNorm: ``operand`` is the path of a module, or what a function takes beside x."""

    node: fx.Node
    input: fx.Node | None
    operand: Any
    is_norm: bool
    reason: str

    @property
    def name(self) -> str:
        return self.operand if isinstance(self.operand, str) else describe(self.node)

    @property
    def row(self) -> str:
        """The path of a module, or of the one that calls the function."""
        return self.operand if isinstance(self.operand, str) else self.node.meta.get("owner", "")


class LinearRewriter(Rewriter):
    """Folds LayerNorm, Linear and what follows into one call."""

    def run(self) -> list[Call]:
        """A row for each LayerNorm that a Linear is near."""
        self.layers = {node: layer for node in self.graph.nodes if (layer := self._layer(node)) is not None}
        for node in self.layers:
            self.name_in_place_results(node)
        norms = [layer for layer in self.layers.values() if layer.is_norm]
        calls = [self._rewrite_call(norm) for norm in reversed(norms)]
        return [call for call in reversed(calls) if call is not None]

    def _rewrite_call(self, norm: _Layer) -> Call | None:
        behind, why_not_behind = self._behind(norm)
        if behind is not None:
            return self._fold(norm, behind, norm_first=True)
        before, why_not_before = self._before(norm)
        if before is not None:
            return self._fold(norm, before, norm_first=False)
        reason = "; ".join(dict.fromkeys(filter(None, (why_not_behind, why_not_before))))
        return Call(norm.row, "ln", reason) if reason else None

    def _layer(self, node: fx.Node) -> _Layer | None:
        module = self.values.module(node)
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            inputs = [*node.args, *node.kwargs.values()]
            input: Any = inputs[0] if len(inputs) == 1 and node.kwargs.keys() <= {"input"} else None
            operand: Any = str(node.target)
            is_norm, reason = isinstance(module, nn.LayerNorm), self.refusal(module)
        elif node.op == "call_function" and node.target in (F.linear, F.layer_norm):
            given = bind(node)
            input, *operand = given.values()
            is_norm, shape, reason = node.target is F.layer_norm, given.get("normalized_shape"), None
            if isinstance(shape, (tuple, list)) and len(shape) != 1:
                reason = "it normalises over more than the last dimension"
            if not all(given[name] is None or self._is_own(given[name]) for name in ("weight", "bias")):
                reason = "its weights are not plain tensors of the block"
        else:
            return None
        if reason is None and not isinstance(input, fx.Node):
            reason = "it is not called with one input"
        return _Layer(node, input, operand if isinstance(operand, str) else tuple(operand), is_norm, reason or "")

    def _is_own(self, weight: Any) -> bool:
        """Whether it is a tensor below the root, of a plain kind."""
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return False
        tensor = functools.reduce(getattr, str(weight.target).split("."), self.values.modules[""])
        return isinstance(tensor, Tensor) and is_plain(tensor)

    def _linear(self, node: fx.Node | None) -> _Layer | None:
        layer = None if node is None else self.layers.get(node)
        return None if layer is None or layer.is_norm else layer

    def _behind(self, norm: _Layer) -> tuple[_Layer | None, str]:
        """The Linear that reads ``norm`` and is folded with it, or why there is none; ``""`` where none is near."""
        chain = self.chain(norm.node)
        reader = chain.reader
        if reader is None:
            near = any(self._linear(user) for user in self.values.readers(chain.last))
            return None, "its output is used more than once" if near else ""
        if reader.target is norm_and_linear and reader.args[0] is chain.last:
            return None, "the Linear behind it is fused with the LayerNorm behind that"
        linear = self._linear(reader)
        if linear is None or linear.input not in (chain.last, None):
            near = self._is_apart(reader) and self._linear(self.chain(reader).reader)
            return None, f"{self._name(reader)} is between it and the Linear behind it" if near else ""
        return self._checked(norm, linear, norm, linear)

    def _before(self, norm: _Layer) -> tuple[_Layer | None, str]:
        """The Linear that ``norm`` reads and is folded with it, or why there is none; ``""`` where none is near."""
        source = self._source(norm.input)
        linear = self._linear(source)
        if source is None:
            return None, ""
        if linear is None:
            near = self._is_apart(source) and self._linear(self._source(source.all_input_nodes[0]))
            return None, f"{self._name(source)} is between it and the Linear in front of it" if near else ""
        if self.chain(source).reader is not norm.node:
            return None, f"the output of the Linear {linear.name} is used more than once"
        return self._checked(norm, linear, linear, norm)

    def _checked(self, norm: _Layer, linear: _Layer, first: _Layer, second: _Layer) -> tuple[_Layer | None, str]:
        reason = norm.reason or (f"the Linear {linear.name}: {linear.reason}" if linear.reason else "")
        if not reason and not self._can_wait(first, second.node):
            reason = f"what {first.name} reads may change before {second.name} runs"
        return (None if reason else linear), reason

    def _source(self, value: Any) -> fx.Node | None:
        """The node that ``value`` is, past nn.Identity."""
        while isinstance(value, fx.Node) and is_standard(self.values.module(value), nn.Identity):
            value = value.all_input_nodes[0]
        return value if isinstance(value, fx.Node) else None

    def _is_apart(self, node: fx.Node) -> bool:
        """Whether ``node`` is an operation of one value, such as dropout or GELU, that keeps two layers apart."""
        return node not in self.layers and node.op.startswith("call_") and len(node.all_input_nodes) == 1

    def _can_wait(self, first: _Layer, until: fx.Node) -> bool:
        """Whether ``first`` can run at ``until``: its input and all parameters are then what they were."""
        parameters = self.graph.find_nodes(op="get_attr")[:1]  # one is as good as another: they may overlap
        read = [first.input, *parameters]
        return not any(self.values.may_change_between(value, first.node, until) for value in read)

    def _fold(self, norm: _Layer, linear: _Layer, *, norm_first: bool) -> Call:
        first, second = (norm, linear) if norm_first else (linear, norm)
        gone, chain = self.chain(first.node).nodes, self.chain(second.node)
        act = self.act_behind(chain)
        tail = chain if act is None else self.chain(act)
        add, obstacle = (None, "") if norm_first else self._addition(first, tail)
        if not norm_first and act is None and add is None and self._has_norm_in_front(linear):
            return Call(norm.row, "ln", "the Linear in front of it is fused with the LayerNorm in front of that")
        result = [second.node] if act is None else [*chain.nodes, act]
        added: tuple[Any, Any] = (None, None)
        if add is not None:
            added = self.residual(add, tail.last), self.changed_operand(add, tail.last)
            gone, result = [*gone, *chain.nodes, *(tail.nodes if act is not None else ())], [add]
        with self.graph.inserting_before(result[0]):
            layers = self._operand(norm), self._operand(linear)
            arguments = (first.input, *layers, norm_first, None if act is None else "relu", *added)
            fused = self.graph.call_function(norm_and_linear, arguments)
        self.replace(result, fused)
        self.replace(gone, first.input if norm_first else self._shape(linear, gone))
        no_act = (
            "" if act else "no ReLU" if add or not chain.reader else f"no ReLU: followed by {self._name(chain.reader)}"
        )
        reason = ", ".join(filter(None, (no_act, "with the addition" if add else obstacle)))
        pattern = "ln_linear_act" if norm_first else "linear_ln_act"
        return Call(norm.row, pattern, reason, acts=act is not None, adds=add is not None)

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
        norm = self.layers.get(source) if source is not None else None
        return norm is not None and norm.is_norm and self._behind(norm)[0] is not None

    def _shape(self, linear: _Layer, nodes: list[fx.Node]) -> fx.Node | None:
        """What stands for the shape of ``linear``'s output, where others than ``nodes`` read it from one of them."""
        if all(user in nodes for node in nodes for user in node.users):
            return None
        with self.graph.inserting_before(linear.node):
            return self.graph.call_function(linear_shape, (linear.input, self._operand(linear)))

    def _name(self, node: fx.Node) -> str:
        """What ``node`` calls, for a reason; a child of a Sequential has no more than a number for a name."""
        module = self.values.module(node)
        return describe(node) if module is None else f"{describe(node)} ({type(module).__name__})"

    def _operand(self, layer: _Layer) -> Any:
        """How a rewritten forward passes ``layer`` to the functions of ``runtime``."""
        return self.graph.get_attr(layer.operand) if isinstance(layer.operand, str) else layer.operand
