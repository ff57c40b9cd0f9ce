"""All passes over one flat graph: the same for ``fuse``, ``explain`` and ``torch.compile(backend="fusedres")``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.fusion.aliasing import Values
from fusedres.fusion.foreign import is_timms, timms_pattern
from fusedres.fusion.gradient_forks import EndRewriter
from fusedres.fusion.linear_patterns import LinearRewriter
from fusedres.fusion.options import Options
from fusedres.fusion.patterns import BatchNormRewriter
from fusedres.fusion.preact_sums import SumRewriter
from fusedres.fusion.refusals import own_call
from fusedres.fusion.rewriting import Call
from fusedres.fusion.runtime import FORK, OWN_ACT, POOL, add_norm, norm_act, norm_add_norm, norm_conv, norm_max_pool


def match(root: nn.Module, graph: fx.Graph, refusal: Callable[[nn.Module], str | None], options: Options) -> list[Call]:
    """Fold the patterns of ``graph`` in place; ``refusal`` says why a layer must stay as it is.

    Returns:
        A row for each call of a normalisation, in the order of the calls, BatchNorms first.
    """
    values = Values(root, graph)
    values.without_dead_nodes()
    before = len(graph.nodes)
    rows: list[fx.Node | Call] = []
    for node in graph.nodes:
        module = values.module(node)
        if isinstance(module, _BatchNorm):
            reason = refusal(module) or _odd_arguments(module, node)
            rows.append(Call(str(node.target), "bn", reason) if reason else node)
    norms = [node for node in rows if isinstance(node, fx.Node)]
    for node in norms:
        node.meta["given"] = node.kwargs.keys()
    BatchNormRewriter(values, refusal, options).run(norms)
    linear = LinearRewriter(values, refusal, options).run() if options.allows("linear") else []
    if len(graph.nodes) != before:
        values.without_needless_clones()
    if options.allows("preact"):
        SumRewriter(values, refusal, options).run()
    rows = [row for row in rows if isinstance(row, Call) or not row._erased]
    EndRewriter(values, refusal, options).run([row for row in rows if isinstance(row, fx.Node)])
    called = {str(node.target): module for node in graph.nodes if (module := values.module(node)) is not None}
    own = [call for path, module in called.items() if (call := own_call(module, path)) is not None]
    return [row if isinstance(row, Call) else _lower(values, row) for row in rows] + linear + own


def _odd_arguments(module: nn.Module, node: fx.Node) -> str | None:
    """Why a call is none of an input and what a BatchNormAct2d takes; its arguments are then in one form."""
    given = dict(zip(("input", "residual"), node.args, strict=False)) | dict(node.kwargs)
    input = given.pop("input", None)
    known = {"residual", "act"} if hasattr(module, "act") and not is_timms(module) else set()
    if not isinstance(input, fx.Node) or len(node.args) > 2 or given.keys() - known:
        return "it is not called with one input"
    node.args, node.kwargs = (input,), given
    return None


def _lower(values: Values, node: fx.Node) -> Call:
    """Call functions of :mod:`fusedres.fusion.runtime` for what is folded; the row of ``node``."""
    module, given = values.modules[str(node.target)], dict[str, Any](node.kwargs)
    own = timms_pattern(module)[0] if is_timms(module) else "bn_act" if getattr(module, "act", None) else "bn"
    acts = given["act"] is not None if "act" in given else own == "bn_act"
    added = "_add_bn" if "other" in given else "_add" if given.get("residual") is not None else ""
    behind = "_maxpool" if "pool" in given else "_avgpool" if given.get("ends") == POOL else ""
    call = Call(
        str(node.target),
        f"{'add_' * ('summand' in given)}bn{added}{'_act' * acts}{behind}",
        node.meta["reason"],
        partner=given.get("other", ""),
        recomputes="conv" in given,
        forks=given.get("ends") == FORK,
        window=node.meta["window"] if "pool" in given else None,
    )
    if given.keys() != node.meta["given"]:
        with values.graph.inserting_before(node):
            fused = _fused(values.graph, node, given)
        node.replace_all_uses_with(fused)
        values.graph.erase_node(node)
    return call


def _fused(graph: fx.Graph, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    norm, x, act = graph.get_attr(str(node.target)), node.args[0], given.get("act", OWN_ACT)
    residual, changes, ends = given.get("residual"), given.get("changes"), given.get("ends")
    if "summand" in given:
        return graph.call_function(add_norm, (norm, x, given["summand"], given["in_place"], act))
    if "other" in given:
        other = graph.get_attr(given["other"])
        return graph.call_function(norm_add_norm, (norm, x, other, residual, act, changes, ends))
    if "pool" in given:
        pool = graph.get_attr(given["pool"]) if isinstance(given["pool"], str) else given["pool"]
        return graph.call_function(norm_max_pool, (norm, x, act, pool, ends))
    if "conv" in given:
        return graph.call_function(norm_conv, (norm, x, act, graph.get_attr(given["conv"])))
    return graph.call_function(norm_act, (norm, x, residual, act, changes, ends))
