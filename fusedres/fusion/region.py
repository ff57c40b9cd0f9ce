"""Plans: the largest modules whose forwards trace as one flat graph, and the rewritten code of each."""

from __future__ import annotations

import inspect
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedres.fusion.code import Code, generate
from fusedres.fusion.derived import kind_of
from fusedres.fusion.foreign import TakenNorm
from fusedres.fusion.matching import match
from fusedres.fusion.options import Options
from fusedres.fusion.proxies import UntraceableError, is_torchs
from fusedres.fusion.refusals import OWN_BLOCKS, has_forward, layer_refusal, leaf_reason, root_refusal, sealed
from fusedres.fusion.tracing import trace
from fusedres.nn import OWN_NORMS

TENSOR = "tensor"
Key = tuple[tuple[str, Any], ...]  # of each argument its name, and TENSOR or the type and value of a constant


@dataclass
class Plan:
    """A module with a forward that was looked at: the region that it is, or the ``reason`` why it is none.

    ``refused`` are the paths of what the filter refuses, ``reached`` the modules that the graphs went through or call.
    """

    name: str
    module: nn.Module
    codes: list[Code] = field(default_factory=list)
    reason: str = ""
    refused: frozenset[str] = frozenset()
    reached: Set[nn.Module] = frozenset()
    is_rewritten: bool = False


def make_plans(model: nn.Module, refused: set[nn.Module], options: Options, dry: bool = False) -> list[Plan]:
    """The regions of ``model``, outermost first, and the modules around them and between that are none.

    A region that is fused already keeps its own options and refusals. ``dry`` is whether BatchNorms are still PyTorch's.
    """
    plans: list[Plan] = []
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, name: str, options: Options, reached: Set[nn.Module]) -> None:
        if module in seen or isinstance(module, (_BatchNorm, nn.LayerNorm)) or not _may_hold_layers(module):
            return
        if module not in reached:
            seen.add(module)
            if has_forward(module):
                region = vars(module).get("_fusedres_region")
                options = options if region is None else region.options
                plan = _plan(name, module, refused, options, dry)
                plans.append(plan)
                reached = plan.reached
        if module in reached or sealed(module) is None:
            for child, part in module.named_children():
                visit(part, f"{name}.{child}" if name else child, options, reached)

    visit(model, "", options, frozenset())
    return plans


def _plan(name: str, module: nn.Module, refused: set[nn.Module], options: Options, dry: bool) -> Plan:
    plan = Plan(name, module, reason="filter_fn" if module in refused else root_refusal(module) or "")
    if plan.reason:
        return plan
    region = vars(module).get("_fusedres_region")
    plan.refused = frozenset(path for path, part in module.named_modules() if part in refused)
    if region is not None:
        plan.refused = region.refused
    try:
        given = inspect.signature(kind_of(module).forward).parameters
        key = tuple((name, TENSOR) for name in positional(kind_of(module))[0] if given[name].default is inspect.Parameter.empty)
        codes = [make_code(module, key, plan.refused, options, True, dry)]
        if codes[0].training:
            codes.append(make_code(module, key, plan.refused, options, False, dry))
    except UntraceableError as error:
        plan.reason = str(error)
        return plan
    plan.codes = codes
    parts = (part for code in codes for part in (*code.inlined, *code.layers))
    plan.reached = {module.get_submodule(part.path) for part in parts}
    calls = [call for code in codes for call in code.calls if not call.own]
    plan.is_rewritten = any(call.pattern not in ("bn", "ln") or call.forks for call in calls)
    return plan


def make_code(
    root: nn.Module,
    key: Key,
    refused_paths: frozenset[str],
    options: Options,
    training: bool | None = None,
    dry: bool = False,
) -> Code:
    """The rewritten forward of ``root`` for arguments of the form ``key``.

    Raises:
        UntraceableError: its forward cannot be followed.
    """
    modules = dict(root.named_modules(remove_duplicate=False))
    refused = {modules[path] for path in refused_paths if path in modules}

    def leaf(module: nn.Module) -> str | None:
        reason = leaf_reason(module)
        return "filter_fn" if reason is None and module in refused else reason

    def refusal(layer: nn.Module) -> str | None:
        if layer in refused:
            return "filter_fn"
        reason = layer_refusal(layer)
        taken = type(layer) in OWN_NORMS or isinstance(layer, TakenNorm) or not isinstance(layer, _BatchNorm)
        return reason if reason is not None or taken or dry else "filter_fn, or added since"

    arguments = {name: Tensor if kind == TENSOR else kind[1] for name, kind in key}
    traced = trace(root, leaf, arguments, training)
    called = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    calls = match(root, traced.graph, refusal, options)
    return generate(root, traced, calls, key, called)


def positional(kind: type[nn.Module]) -> tuple[tuple[str, ...], ...]:
    """The names of the parameters of its forward that can be given by position, and of all."""
    given = list(inspect.signature(kind.forward).parameters.values())[1:]
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in given if p.kind in by_position), tuple(p.name for p in given)


def _may_hold_layers(module: nn.Module) -> bool:
    """Whether ``module`` has a normalisation, or weights of its own for the functions of one."""
    return any(
        isinstance(part, (_BatchNorm, nn.LayerNorm, *OWN_BLOCKS))
        or (part._parameters and not is_torchs(type(part).__module__))
        for part in module.modules()
    )
