"""Dynamic subclasses of users' classes: instances copy and pickle as their former class and what was made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fusedres.nn.scripting import Unscriptable


class Derived(Unscriptable):
    """Mixed into a user's class; ``_fusedres_recipe`` is the function that makes the subclass, and its arguments."""

    _fusedres_original: type[nn.Module]
    _fusedres_recipe: tuple[Any, ...]

    def __init_subclass__(cls) -> None:
        """Not a class of the user's: their hooks for subclasses are not run."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        constructor, arguments, *rest = super().__reduce_ex__(protocol)
        original = self._fusedres_original
        constructor, *arguments = (original if part is type(self) else part for part in (constructor, *arguments))
        return (_rebuild, (self._fusedres_recipe, constructor, tuple(arguments)), *rest)


def original_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that ``module`` had before it was fused; ``None`` where it is not, or was wrapped since."""
    return vars(type(module)).get("_fusedres_original")


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The class of ``module`` before it was fused, or its class."""
    return original_class(module) or type(module)


def disguise(original: type[nn.Module], *recipe: Any) -> dict[str, Any]:
    """The attributes with which a subclass stands for ``original``."""
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return names | {"_fusedres_original": original, "_fusedres_recipe": recipe}


def _rebuild(recipe: tuple[Any, ...], constructor: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    derive, *given = recipe
    module = constructor(*arguments)
    module.__class__ = derive(*given)
    return module
