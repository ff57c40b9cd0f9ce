"""Regions: the largest modules whose forwards trace as one flat graph, found, rewritten, and kept up to date.

A region keeps a :class:`Code` for each form of its arguments and each state of its modules that it was called with, up
to a bound. What fits none of them runs the original forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from fusedres.fusion.code import Bound, Code, generate
from fusedres.fusion.foreign import TakenNorm, is_timms
from fusedres.fusion.matching import match
from fusedres.fusion.options import Options
from fusedres.fusion.refusals import (
    OWN_BLOCKS,
    has_forward,
    kind_of,
    layer_refusal,
    leaf_reason,
    root_refusal,
    sealed,
)
from fusedres.fusion.rewriting import Call
from fusedres.fusion.state import one_at_a_time
from fusedres.fusion.tracing import Trace, UntraceableError, trace
from fusedres.nn import OWN_NORMS

_PLAIN = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
_CONSTANTS = (type(None), bool, int, float, str)
_TENSOR = "tensor"
_TRACES = 8  # of one region, after those that fuse makes
Key = tuple[Any, ...]


@dataclass
class Region:
    """What a fused module keeps: its codes, and what is needed for more. Copies and pickles with the module."""

    options: Options
    refused: frozenset[str] = frozenset()
    codes: list[Code] = field(default_factory=list)
    bounds: list[Bound] = field(default_factory=list)
    traces: int = 0
    pending: list[str] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "bounds": []}

    def __deepcopy__(self, memo: Any) -> Region:
        return replace(self, codes=list(self.codes), bounds=[], pending=[])

    def bind(self, root: nn.Module) -> None:
        """For ``root`` as it is."""
        self.bounds = [bound for code in self.codes if (bound := code.bind(root)) is not None]

    def find(self, root: nn.Module, key: Key) -> Bound | None:
        """The code that stands for a call of ``root`` as it is now."""
        if torch.compiler.is_compiling():
            for bound in self.bounds:
                if bound.key == key and bound.fits_compiled(root):
                    return bound
            return None
        for bound in self.bounds:
            if bound.key == key and bound.fits(root):
                return bound
        return self._find_anew(root, key)

    def _find_anew(self, root: nn.Module, key: Key) -> Bound | None:
        with one_at_a_time:
            for code in self.codes:
                bound = code.bind(root) if code.key == key else None
                if bound is not None and bound.fits(root):
                    self.bounds = [b for b in self.bounds if b.code is not code] + [bound]
                    return bound
            if self.traces >= _TRACES:
                return None
            self.traces += 1
            try:
                code = make_code(root, key, self.refused, self.options, None)
            except UntraceableError:
                return None
            self.codes = [*self.codes, code]
            self.pending = [path for path, _ in code.leaves]
            bound = code.bind(root)
            if bound is None or not bound.fits(root):
                return None
            self.bounds = [*self.bounds, bound]
            return bound


@dataclass
class Plan:
    """A module with a forward that was looked at: the region that it is, or the ``reason`` why it is none."""

    name: str
    module: nn.Module
    codes: list[Code] = field(default_factory=list)
    reason: str = ""
    refused: frozenset[str] = frozenset()
    is_rewritten: bool = False


def make_plans(model: nn.Module, refused: set[nn.Module], options: Options, dry: bool = False) -> list[Plan]:
    """The regions of ``model``, outermost first, and the modules around them and between that are none.

    A region that is fused already keeps its own options and refusals. ``dry`` is whether BatchNorms are still PyTorch's.
    """
    plans: list[Plan] = []
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, name: str, options: Options) -> None:
        if module in seen or not _has_layers(module):
            return
        seen.add(module)
        if isinstance(module, (_BatchNorm, nn.LayerNorm)):
            return
        plan = Plan(name, module)
        if has_forward(module):
            plans.append(plan)
            plan.reason = "filter_fn" if module in refused else (root_refusal(module) or "")
            if not plan.reason and _trace_region(plan, refused, options, dry):
                reached = {module.get_submodule(path) for code in plan.codes for path in _reached(code)}
                leaves = {module.get_submodule(path) for code in plan.codes for path, _ in code.leaves}
                region = vars(module).get("_fusedres_region")
                visit_rest(module, name, reached - leaves, options if region is None else region.options)
                return
        if sealed(module) is None:
            visit_children(module, name, options)

    def visit_children(module: nn.Module, name: str, options: Options) -> None:
        for child, part in module.named_children():
            visit(part, f"{name}.{child}" if name else child, options)

    def visit_rest(module: nn.Module, name: str, reached: set[nn.Module], options: Options) -> None:
        """What the graph of a region does not show: inside of its leaves, and what it does not call."""
        for child, part in module.named_children():
            path = f"{name}.{child}" if name else child
            if part in reached or not has_forward(part):
                visit_rest(part, path, reached, options)
            else:
                visit(part, path, options)

    visit(model, "", options)
    return plans


def _reached(code: Code) -> Iterator[str]:
    yield from (part.path for part in code.inlined)
    yield from (path for path, _ in code.modules)


def _trace_region(plan: Plan, refused: set[nn.Module], options: Options, dry: bool) -> bool:
    """Whether ``plan`` is of a region; its codes, or the reason why not, are then in it."""
    module = plan.module
    key = default_key(module)
    names = frozenset(path for path, part in module.named_modules() if part in refused)
    region = vars(module).get("_fusedres_region")
    if region is not None:
        names, options = region.refused, region.options
    plan.refused = names
    try:
        code = make_code(module, key, names, options, True, dry)
        plan.codes = [code]
        if code.training:
            plan.codes.append(make_code(module, key, names, options, False, dry))
    except UntraceableError as error:
        plan.reason, plan.codes = str(error), []
        return False
    plan.is_rewritten = any(is_fused(call) for code in plan.codes for call in code.calls)
    return True


def is_fused(call: Call) -> bool:
    """Whether ``call`` is more than a BatchNorm that is called."""
    return not call.own and (call.pattern not in ("bn", "ln") or call.forks)


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

    traced = trace(root, leaf, _constants(root, key), training)
    called = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    calls = match(root, traced.graph, refusal, options)
    return generate(root, traced, calls, key, called)


def parameters(forward: Callable[..., Any]) -> list[tuple[str, Any]]:
    """Names and defaults of the parameters after ``self`` that can be given by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    given = list(inspect.signature(forward).parameters.values())[1:]
    return [(parameter.name, parameter.default) for parameter in given if parameter.kind in kinds]


def default_key(module: nn.Module) -> Key:
    """The form of a call with tensors for all that has to be given."""
    return tuple(
        _TENSOR if default is inspect.Parameter.empty else ("default", name)
        for name, default in parameters(kind_of(module).forward)
    )


def arguments(
    names: list[tuple[str, Any]], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Key, list[Any]] | None:
    """The form of a call and its tensors; ``None`` where no code stands for such a call."""
    if len(args) > len(names):
        return None
    key: list[Any] = []
    tensors: list[Any] = []
    found = 0
    for index, (name, default) in enumerate(names):
        value = args[index] if index < len(args) else kwargs.get(name, default)
        found += index >= len(args) and name in kwargs
        if type(value) in _PLAIN:
            for other in tensors:
                if other is value:
                    return None
            key.append(_TENSOR)
            tensors.append(value)
        elif value is inspect.Parameter.empty:
            return None
        elif value is default:
            key.append(("default", name))
        elif type(value) in _CONSTANTS:
            key.append((type(value).__name__, value))
        else:
            return None
    return (tuple(key), tensors) if found == len(kwargs) else None


def _constants(root: nn.Module, key: Key) -> dict[str, Any]:
    names = parameters(kind_of(root).forward)
    return {
        name: default if kind[0] == "default" else kind[1]
        for (name, default), kind in zip(names, key, strict=True)
        if kind != _TENSOR
    }


def has_global_hooks() -> bool:
    """Whether somebody watches every module."""
    return bool(_has_any_global_hook())


def _has_layers(module: nn.Module) -> bool:
    return any(isinstance(part, (_BatchNorm, nn.LayerNorm)) or is_timms(part) for part in module.modules()) or _maybe(
        module
    )


def _maybe(module: nn.Module) -> bool:
    """Whether ``module`` may call the functions of a LayerNorm: users' code with weights of its own."""
    return any(isinstance(part, tuple(OWN_BLOCKS)) for part in module.modules()) or any(
        part._parameters and not type(part).__module__.startswith("torch.") for part in module.modules()
    )
