"""Plans: the largest modules whose forwards trace as one flat graph, and the rewritten code of each."""

from __future__ import annotations

import functools
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
from fusedres.fusion.proxies import UntraceableError
from fusedres.fusion.refusals import OWN_BLOCKS, has_forward, layer_refusal, leaf_reason, root_refusal, sealed
from fusedres.fusion.tracing import trace
from fusedres.nn import OWN_NORMS

TENSOR = "tensor"
Names = tuple[tuple[str, ...], frozenset[str], frozenset[str]]
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

    @property
    def is_rewritten(self) -> bool:
        calls = [call for code in self.codes for call in code.calls if not call.own]
        return any(call.pattern not in ("bn", "ln") or call.forks for call in calls)


def make_plans(model: nn.Module, refused: set[nn.Module], options: Options, dry: bool = False) -> list[Plan]:
    """The regions of ``model``, outermost first, and the modules around them and between that are none.

    A region that is fused keeps its own options and refusals. ``dry`` is whether BatchNorms are still PyTorch's.
    """
    plans: list[Plan] = []
    seen, refused = set[nn.Module](), set(refused)

    def visit(module: nn.Module, name: str, options: Options, reached: Set[nn.Module]) -> None:
        if module in seen or isinstance(module, (_BatchNorm, nn.LayerNorm)) or not _may_hold_layers(module):
            return
        if module not in reached:
            seen.add(module)
            region = vars(module).get("_fusedres_region")
            if region is not None:
                options = region.options
                refused.update(part for path, part in module.named_modules() if path in region.refused)
            if has_forward(module):
                reason = "filter_fn" if module in refused else root_refusal(module) or ""
                paths = frozenset(path for path, part in module.named_modules() if part in refused)
                plans.append(Plan(name, module, reason=reason, refused=paths))
                _complete(plans[-1], options, dry)
                reached = plans[-1].reached
        if module in reached or sealed(module) is None:
            for child, part in module.named_children():
                visit(part, f"{name}.{child}" if name else child, options, reached)

    visit(model, "", options, frozenset())
    return plans


def _complete(plan: Plan, options: Options, dry: bool) -> None:
    """Trace what ``plan`` is of, in both modes, or say why it cannot be."""
    if plan.reason:
        return
    module = plan.module
    by_position, _, optional = parameters(kind_of(module))
    key = tuple((name, TENSOR) for name in by_position if name not in optional)
    try:
        codes = [make_code(module, key, plan.refused, options, True, dry)]
        if codes[0].training:
            codes.append(make_code(module, key, plan.refused, options, False, dry))
    except UntraceableError as error:
        plan.reason = str(error)
        return
    plan.codes = codes
    plan.reached = {module.get_submodule(part.path) for code in codes for part in (*code.inlined, *code.layers)}


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
        taken = dry or type(layer) in OWN_NORMS or isinstance(layer, TakenNorm) or not isinstance(layer, _BatchNorm)
        return layer_refusal(layer) or (None if taken else "filter_fn, or added since")

    arguments = {name: Tensor if kind == TENSOR else kind[1] for name, kind in key}
    traced = trace(root, leaf, arguments, training)
    called = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    calls = match(root, traced.graph, refusal, options)
    return generate(root, traced, calls, key, called)


@functools.cache
def parameters(kind: type[nn.Module]) -> Names:
    """The names of the parameters of its forward that can be given by position, of all, and of the optional ones."""
    given = list(inspect.signature(kind.forward).parameters.values())[1:]
    by_position = tuple(p.name for p in given if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    optional = frozenset(p.name for p in given if p.default is not p.empty)
    return by_position, frozenset(p.name for p in given), optional


def _may_hold_layers(module: nn.Module) -> bool:
    """Whether ``module`` has a normalisation, or weights of its own for the functions of one."""
    return any(
        isinstance(part, (_BatchNorm, nn.LayerNorm, *OWN_BLOCKS))
        or (part._parameters and not type(part).__module__.startswith("torch.nn.modules."))
        for part in module.modules()
    )
