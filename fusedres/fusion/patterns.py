"""Fold a BatchNorm and what follows it into one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.fusion.aliasing import is_standard, max_pool_arguments
from fusedres.fusion.foreign import foreign_pattern, is_timms
from fusedres.fusion.rewriting import Call, Chain, Rewriter, describe
from fusedres.fusion.runtime import OWN_ACT, norm_add, norm_add_norm, norm_conv, norm_max_pool
from fusedres.nn import BatchNormAct2d


class BatchNormRewriter(Rewriter):
    """Folds a BatchNorm and what follows it into one call."""

    def run(self) -> list[Call]:
        """A row for each call of a BatchNorm."""
        norms = [n for n in self.graph.nodes if isinstance(self.values.module(n), _BatchNorm)]
        for norm in norms:
            self.name_in_place_results(norm)
        # The last of two BatchNorms that are added takes the addition: its other operand exists by then.
        calls = [self._rewrite_call(norm) for norm in reversed(norms) if not norm._erased]
        return calls[::-1]

    def _rewrite_call(self, norm: fx.Node) -> Call:
        module, name = self.values.module(norm), str(norm.target)
        assert module is not None
        reason = self.refusal(module)
        if reason is not None:
            return Call(name, "bn", reason)
        if is_timms(module) and foreign_pattern(module) != ("bn", ""):
            return Call(name, *foreign_pattern(module))
        if not norm.args and norm.kwargs.keys() == {"input"}:
            norm.args, norm.kwargs = (norm.kwargs["input"],), {}
        if isinstance(module, BatchNormAct2d) and (module.act is not None or norm.kwargs or len(norm.args) != 1):
            return self._fold_own(norm, module)
        if norm.kwargs or len(norm.args) != 1 or not isinstance(norm.args[0], fx.Node):
            return Call(name, "bn", "it is not called with one input")
        chain = self.chain(norm)
        if chain.reader is None:
            return Call(name, "bn", "its output is used more than once" if len(norm.users) > 1 else "")
        if self.act_behind(chain) is not None:
            return self._fold_act(norm, chain)
        residual = self.residual(chain.reader, chain.last)
        if residual is None:
            return Call(name, "bn", f"followed by {describe(chain.reader)}")
        return self._fold_add(norm, chain, residual)

    def _fold_act(self, norm: fx.Node, chain: Chain) -> Call:
        act = chain.reader
        assert act is not None
        tail = self.chain(act)
        if tail.reader is not None and self._can_wait(norm, norm.all_input_nodes[0], tail.reader):
            if self.options.allows("stem") and max_pool_arguments(self.values, tail.reader) is not None:
                return self._fold_max_pool(norm, chain, tail)
            if self.options.save == "recompute" and self._is_conv(tail.reader):
                return self._fold_conv(norm, chain, tail)
        if is_timms(self.values.module(norm)):  # its forward takes no activation
            module = self.attribute(norm, norm)
            with self.graph.inserting_before(norm):
                fused = self.graph.call_function(norm_add, (module, norm.args[0], None, "relu", None))
            self.replace([*chain.nodes, act], fused)
        else:
            norm.kwargs = {"act": "relu"}
            self.replace([*chain.nodes[1:], act], norm)
        return Call(str(norm.target), "bn_act")

    def _fold_max_pool(self, norm: fx.Node, chain: Chain, tail: Chain) -> Call:
        pool = tail.reader
        assert pool is not None
        window = max_pool_arguments(self.values, pool)
        operand = window if self.values.module(pool) is None else self.attribute(pool, pool)
        self._fold_behind(norm, [*chain.nodes, *tail.nodes], pool, norm_max_pool, operand)
        return Call(str(norm.target), "bn_act_maxpool", window=window)

    def _fold_conv(self, norm: fx.Node, chain: Chain, tail: Chain) -> Call:
        conv = tail.reader
        assert conv is not None
        self._fold_behind(norm, [*chain.nodes, *tail.nodes], conv, norm_conv, self.attribute(conv, conv))
        return Call(str(norm.target), "bn_act", "computed again in the backward", recomputes=True)

    def _fold_behind(
        self, norm: fx.Node, gone: list[fx.Node], last: fx.Node, function: Callable[..., Any], operand: Any
    ) -> None:
        """``function(norm, input, "relu", operand)`` for ``norm``, its activation and the operation ``last`` behind."""
        module = self.attribute(norm, last)
        with self.graph.inserting_before(last):
            fused = self.graph.call_function(function, (module, norm.args[0], "relu", operand))
        self.replace([last], fused)
        self.replace(gone, norm.all_input_nodes[0])

    def _is_conv(self, node: fx.Node) -> bool:
        conv = self.values.module(node)
        if not is_standard(conv, nn.Conv2d) or len(node.args) != 1 or node.kwargs:
            return False
        assert isinstance(conv, nn.Conv2d)
        extents = zip(conv.dilation, conv.kernel_size, strict=True)
        uneven = conv.padding == "same" and any(step * (size - 1) % 2 for step, size in extents)
        return conv.padding_mode == "zeros" and not uneven  # others read a padded copy

    def _fold_own(self, norm: fx.Node, module: BatchNormAct2d) -> Call:
        """A BatchNormAct2d that its model calls with a residual or an activation already."""
        arguments = dict(zip(("input", "residual"), norm.args, strict=False)) | dict(norm.kwargs)
        residual = arguments.get("residual")
        act = "_act" if arguments.get("act", module.act) is not None else ""
        other, input = self._joined_norm(norm, residual), arguments.get("input")
        if other is None or not isinstance(input, fx.Node):
            return Call(str(norm.target), f"bn{'_add' if residual is not None else ''}{act}")
        chain = self.chain(other)
        self._join(norm, norm, input, other, arguments.get("act", OWN_ACT), None, [norm])
        self.replace(chain.nodes, other.all_input_nodes[0])
        return Call(str(norm.target), f"bn_add_bn{act}", partner=str(other.target))

    def _joined_norm(self, reader: fx.Node, value: Any) -> fx.Node | None:
        """The BatchNorm whose result ``value`` is and that can run at ``reader``; nobody else reads or prints it."""
        if not self.options.allows("join"):
            return None
        while isinstance(value, fx.Node) and is_standard(self.values.module(value), nn.Identity):
            value = value.all_input_nodes[0]
        module = self.values.module(value) if isinstance(value, fx.Node) else None
        if not isinstance(module, _BatchNorm) or module is self.values.module(reader):
            return None
        timms = is_timms(module)
        if self.refusal(module) is not None or (not timms and getattr(module, "act", None) is not None):
            return None
        if timms and foreign_pattern(module) != ("bn", ""):
            return None
        plain = len(value.args) == 1 and isinstance(value.args[0], fx.Node) and not value.kwargs
        chain = self.chain(value)
        if not plain or chain.reader is not reader:
            return None
        return value if self._can_wait(value, value.all_input_nodes[0], reader) else None

    def _join(
        self, norm: fx.Node, at: fx.Node, input: fx.Node, other: fx.Node, act: Any, changes: str | None,
        result: list[fx.Node],
    ) -> None:  # fmt: skip
        """Both BatchNorms in one call in front of ``at``, in place of ``result``; that of the main branch comes first."""
        one, two = (self.attribute(norm, at), input), (self.attribute(other, at), other.args[0])
        if self._is_shortcut(norm, other):
            one, two = two, one
            changes = {"norm": "residual", "residual": "norm"}.get(changes or "")
        arguments = (*one, *two, act, changes)
        with self.graph.inserting_before(at):
            fused = self.graph.call_function(norm_add_norm, arguments)
        self.replace(result, fused)

    def _fold_add(self, norm: fx.Node, chain: Chain, residual: fx.Node) -> Call:
        add, input, name = chain.reader, norm.args[0], str(norm.target)
        assert add is not None and isinstance(input, fx.Node)
        changes = self.changed_operand(add, chain.last)
        if changes == "residual" and not self.is_spare(residual, add):
            return Call(name, "bn", "the addition changes its other operand, which is read elsewhere")
        if not self._can_wait(norm, input, add):
            return Call(name, "bn", "its input or its statistics may be used before the addition")
        tail = self.chain(add)
        act = self.act_behind(tail)
        result, kind = ([*tail.nodes, act], "relu") if act else ([add], None)
        other = self._joined_norm(add, residual)
        others = [] if other is None else self.chain(other).nodes
        if other is not None:
            self._join(norm, add, input, other, kind, changes, result)
            self.replace(others, other.all_input_nodes[0])
        else:
            module = self.attribute(norm, add)
            with self.graph.inserting_before(add):
                fused = self.graph.call_function(norm_add, (module, input, residual, kind, changes))
            self.replace(result, fused)
        self.replace(chain.nodes, input)
        act_name = "_act" if act else ""
        if other is None:
            return Call(name, f"bn_add{act_name}")
        names = (str(other.target), name) if self._is_shortcut(norm, other) else (name, str(other.target))
        return Call(names[0], f"bn_add_bn{act_name}", partner=names[1])

    def _is_shortcut(self, norm: fx.Node, other: fx.Node) -> bool:
        """Whether ``norm``, the later of the two, is below the module that ``other`` belongs to."""
        return str(norm.target).count(".") > str(other.target).count(".")

    def _can_wait(self, norm: fx.Node, input: fx.Node, until: fx.Node) -> bool:
        """Whether ``norm`` can run at ``until``: same input, same order of updates of its statistics."""
        return self.values.may_move(norm, norm, until) and not self.values.may_change_between(input, norm, until)
