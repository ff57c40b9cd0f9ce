"""The dynamic subclass that gives the root of a region its rewritten forward."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from typing import Any

import torch
from torch import nn

from fusedres.fusion.derived import Derived, disguise
from fusedres.fusion.options import Options
from fusedres.fusion.region import Region, arguments, has_global_hooks, make_plans, parameters


class FusedRegion(Derived):
    """Mixed into the class of a region's root."""

    _fusedres_region: Region | None = None

    def __setstate__(self, state: Any) -> None:
        """Of a copy, or of what was pickled: its code is for its own modules."""
        super().__setstate__(state)  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(self, nn.Module)
        if self._fusedres_region is not None:
            self._fusedres_region.bind(self)


def install(root: nn.Module, region: Region) -> None:
    """Give ``root`` the forward of ``region``.

    Raises:
        TypeError: its class has no subclass that an instance can be turned into.
    """
    root.__class__ = _fused_class(type(root))
    vars(root)["_fusedres_region"] = region
    region.bind(root)


def install_all(model: nn.Module, refused: set[nn.Module], options: Options) -> None:
    """Find the regions of ``model`` and install them."""
    for plan in make_plans(model, refused, options):
        if plan.is_rewritten:
            with contextlib.suppress(TypeError):  # a class with a memory layout of its own keeps its forward
                install(plan.module, Region(options, plan.refused, plan.codes))


def _call(self: Any, names: list[tuple[str, Any]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the code of a region makes of a call, in a tuple; ``None`` where the original forward is to run."""
    region = self._fusedres_region
    given = None if region is None or has_global_hooks() else arguments(names, args, kwargs)
    bound = None if given is None else region.find(self, given[0])
    if given is None or bound is None:
        return None
    if region.pending and not torch.compiler.is_compiling():
        for path in region.pending:  # watched since: they may hold regions of their own
            refused = {self.get_submodule(name) for name in region.refused}
            install_all(self.get_submodule(path), refused, region.options)
        region.pending = []
    return (bound.run(self, bound.modules, *given[1]),)


def _forward(original: type[nn.Module]) -> Any:
    """A forward with the parameters of the original one, for those who trace it."""
    given = list(inspect.signature(original.forward).parameters.values())[1:]
    names = parameters(original.forward)
    defaults = {f"_fusedres_{p.name}": p.default for p in given if p.default is not p.empty}
    declared, passed, options = ["self"], [], []
    for parameter in given:
        name = parameter.name
        default = "" if parameter.default is parameter.empty else f"=_fusedres_{name}"
        if parameter.kind is parameter.VAR_POSITIONAL:
            declared.append(f"*{name}")
            passed.append(f"*{name}")
        elif parameter.kind is parameter.VAR_KEYWORD:
            declared.append(f"**{name}")
            options.append(f"**{name}")
        elif parameter.kind is parameter.KEYWORD_ONLY:
            if not any(part.startswith("*") for part in declared):
                declared.append("*")
            declared.append(name + default)
            # What is not given is as it was when the forward was traced.
            options.append(f"**({{}} if {name} is {default[1:]} else {{{name!r}: {name}}})" if default else "")
        else:
            declared.append(name + default)
            passed.append(name)
    arguments = "".join(f"{name}, " for name in passed)
    options_given = ", ".join(filter(None, options))
    source = (
        f"def forward({', '.join(declared)}):\n"
        f"    found = _fusedres_call(self, _fusedres_names, ({arguments}), dict({options_given}))\n"
        f"    if found is not None:\n"
        f"        return found[0]\n"
        f"    return _fusedres_original.forward(self, {arguments}{options_given})\n"
    )
    scope = {"_fusedres_call": _call, "_fusedres_names": names, "_fusedres_original": original, **defaults}
    exec(compile(source, f"<fusedres {original.__qualname__}>", "exec"), scope)
    return scope["forward"]


@functools.cache
def _fused_class(original: type[nn.Module]) -> type[nn.Module]:
    """One class for all regions whose roots were of one class."""
    forward = _forward(original)
    forward.__module__, forward.__qualname__ = original.__module__, f"{original.__qualname__}.forward"
    forward.__doc__ = original.forward.__doc__
    forward.__signature__ = inspect.signature(original.forward)  # pyright: ignore[reportFunctionMemberAccess]
    attributes = {**disguise(original, _fused_class, original), "forward": forward}
    return types.new_class(original.__name__, (FusedRegion, original), {}, lambda body: body.update(attributes))
