"""The dynamic subclass that gives the root of a region its rewritten forward."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

from torch import nn

from fusedres.flat.derived import Derived, disguise
from fusedres.flat.region import Region, arguments, has_global_hooks, parameters


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


@functools.cache
def _fused_class(original: type[nn.Module]) -> type[nn.Module]:
    """One class for all regions whose roots were of one class."""
    names = parameters(original.forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        region = self._fusedres_region
        given = None if region is None or has_global_hooks() else arguments(names, args, kwargs)
        if given is not None:
            bound = region.find(self, given[0])
            if bound is not None:
                return bound.run(self, bound.modules, *given[1])
        return original.forward(self, *args, **kwargs)

    forward.__module__, forward.__qualname__ = original.__module__, f"{original.__qualname__}.forward"
    forward.__doc__ = original.forward.__doc__
    forward.__signature__ = inspect.signature(original.forward)  # pyright: ignore[reportFunctionMemberAccess]
    attributes = {**disguise(original, _fused_class, original), "forward": forward}
    return types.new_class(original.__name__, (FusedRegion, original), {}, lambda body: body.update(attributes))
