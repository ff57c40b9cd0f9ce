"""Regions: modules with a rewritten forward for each form of their arguments and each state of what is in them.

The root of a region gets a dynamic subclass of its class. What fits no code, up to a number of them, runs the original
forward.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import _has_any_global_hook

from fusedres.fusion.code import Bound, Code
from fusedres.fusion.derived import Derived, disguise
from fusedres.fusion.options import Options
from fusedres.fusion.proxies import UntraceableError
from fusedres.fusion.region import TENSOR, Key, Names, make_code, make_plans, parameters
from fusedres.fusion.state import one_at_a_time

_PLAIN = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
_CONSTANTS = (type(None), bool, int, float, str)
_TRACES = 8  # of one region, after those that fuse makes


@dataclass
class Region:
    """What a fused module keeps: its codes, and what is needed for more. Copies and pickles with the module."""

    options: Options
    refused: frozenset[str]
    codes: list[Code]
    bounds: list[Bound] = field(default_factory=list)
    traces: int = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "bounds": []}

    def __deepcopy__(self, memo: Any) -> Region:
        return replace(self, codes=list(self.codes), bounds=[])

    def find(self, root: nn.Module, key: Key) -> Bound | None:
        """The code that stands for a call of ``root`` as it is now."""
        for bound in self.bounds:
            if bound.key == key and bound.fits(root):
                return bound
        return None if torch.compiler.is_dynamo_compiling() else self._find_anew(root, key)

    def _find_anew(self, root: nn.Module, key: Key) -> Bound | None:
        with one_at_a_time:
            for code in self.codes:
                if code.key == key and (bound := self._bind(root, code)) is not None:
                    return bound
            if self.traces >= _TRACES:
                return None
            self.traces += 1
            try:
                code = make_code(root, key, self.refused, self.options)
            except UntraceableError:
                return None
            self.codes = [*self.codes, code]
            for path, _ in code.leaves:  # watched since: they may hold regions of their own
                refused = {root.get_submodule(name) for name in self.refused}
                install_all(root.get_submodule(path), refused, self.options)
            return self._bind(root, code)

    def bind_all(self, root: nn.Module) -> None:
        """For ``root`` as it is."""
        self.bounds = [bound for code in self.codes if (bound := code.bind(root)) is not None]

    def _bind(self, root: nn.Module, code: Code) -> Bound | None:
        bound = code.bind(root)
        if bound is None or not bound.fits(root):
            return None
        self.bounds = [*(other for other in self.bounds if other.code is not code), bound]
        return bound


class FusedRegion(Derived):
    """Mixed into the class of a region's root."""

    _fusedres_region: Region | None = None

    def __setstate__(self, state: Any) -> None:
        """Of a copy, or of what was pickled: its code is for its own modules."""
        super().__setstate__(state)  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(self, nn.Module)
        if self._fusedres_region is not None:
            self._fusedres_region.bind_all(self)


def install_all(model: nn.Module, refused: set[nn.Module], options: Options) -> None:
    """Find the regions of ``model``, and give their roots the rewritten forwards."""
    for plan in make_plans(model, refused, options):
        root = plan.module
        # A class with a memory layout of its own has no such subclass, and a fused module has its code.
        if plan.is_rewritten and not isinstance(root, FusedRegion):
            with contextlib.suppress(TypeError):
                root.__class__ = _fused_class(type(root))
                region = vars(root)["_fusedres_region"] = Region(options, plan.refused, plan.codes)
                region.bind_all(root)


def arguments(names: Names, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Key, Sequence[Any]] | None:
    """The form of a call and its tensors; ``None`` where no code stands for such a call."""
    by_position, known, _ = names
    if len(args) == 1 and not kwargs and type(args[0]) in _PLAIN and by_position:
        return ((by_position[0], TENSOR),), args  # nearly all calls
    if len(args) > len(by_position):
        return None
    key: list[Any] = []
    tensors: list[Any] = []
    for name, value in [*zip(by_position, args, strict=False), *kwargs.items()]:
        kind = type(value)
        if kind in _PLAIN:
            for other in tensors:
                if other is value:
                    return None
            key.append((name, TENSOR))
            tensors.append(value)
        elif kind in _CONSTANTS:
            key.append((name, (kind.__name__, value)))
        else:
            return None
    for name in kwargs:
        if name not in known or name in by_position[: len(args)]:
            return None
    return tuple(key), tensors


@functools.cache
def _fused_class(original: type[nn.Module]) -> type[nn.Module]:
    """One class for all regions whose roots were of one class."""

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        region = self._fusedres_region
        if region is not None and not _has_any_global_hook():
            given = arguments(names, args, kwargs)
            bound = None if given is None else region.find(self, given[0])
            if given is not None and bound is not None:
                return bound.run(bound.modules, self, *given[1])
        return original.forward(self, *args, **kwargs)

    names = parameters(original)
    attributes = {**disguise(original, _fused_class, original), "forward": forward}
    return types.new_class(original.__name__, (FusedRegion, original), {}, lambda body: body.update(attributes))
