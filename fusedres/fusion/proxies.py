"""What stands for a value while a forward is traced: a torch.fx proxy that answers nothing that may be untrue."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx
from torch.fx.proxy import Attribute

from fusedres.fusion.aliasing import IN_PLACE_OPERATORS, is_tensor

# A value formatted while tracing stands in the text as START name padding CONVERSION : spec END.
START, _END = "\x00", "\x01"
_TOKEN = re.compile(f"{START}(\\w+)-*(![sr])?:([^{START}{_END}]*){_END}")
# May be None, or are no tensor's.
_ATTRIBUTES = frozenset(dir(Tensor)) - {
    "grad", "grad_fn", "_grad", "_grad_fn", "_base", "names", "_backward_hooks"
}  # fmt: skip


class UntraceableError(Exception):
    """Why a forward is left alone."""


def is_torchs(name: object) -> bool:
    """Whether ``name`` is that of a Python module of PyTorch's."""
    return str(name) == "torch" or str(name).startswith("torch.")


def is_users(frame: Any) -> bool:
    """Whether ``frame`` runs neither PyTorch's code nor ours."""
    return not str(frame.f_globals.get("__name__", "")).startswith(("torch.", "fusedres."))


class Value(fx.Proxy):
    """A traced value: operators in place are nodes, and prints can show it."""

    tracer: Any

    def __getattr__(self, name: str) -> _ValueAttribute:
        if name not in _ATTRIBUTES and is_users(sys._getframe(1)):
            raise UntraceableError(f"forward asks a value for the attribute {name!r}")
        return _ValueAttribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer", "root", "attr", "_node"):
            raise UntraceableError(f"forward sets the attribute {name!r} of a value")
        object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        if is_users(sys._getframe(1)):
            raise UntraceableError("forward looks for a value in a set or a dict")
        return id(self)

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        # isinstance() comes here after the real type; torch's own functions get that.
        frame = sys._getframe(1)
        parameter = frame.f_globals.get("__name__") == "torch.nn.parameter"
        if parameter and frame.f_back is not None and is_users(frame.f_back):
            raise UntraceableError("forward asks whether a value is a parameter")
        if not is_users(frame):
            return type(self)
        if not is_tensor(self.tracer.root, self.node):
            raise UntraceableError("forward depends on the type of a value")
        return Tensor

    def __str__(self) -> str:
        return _Text(self.tracer, self.node, "!s")

    def __repr__(self) -> str:
        return _Text(self.tracer, self.node, "!r")

    def __format__(self, spec: str) -> str:
        return _token(self.tracer, self.node, "", spec)


class _ValueAttribute(Value, Attribute):
    """``value.name``: a node once it is used, a method call when it is called."""


def _in_place(function: Callable[..., Any]) -> Callable[[Value, Any], Any]:
    def method(self: Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name, _function in IN_PLACE_OPERATORS.items():
    # torch.fx has no in-place operators: Python would fall back to `x = x + y`, which does not change x.
    setattr(Value, f"__i{_name}__", _in_place(_function))


class _Text(str):
    """``str(value)`` or ``repr(value)``, which may be formatted once more: ``f"{value!s:>20}"``."""

    __slots__ = ("_show",)

    def __new__(cls, *shown: Any) -> _Text:
        text = super().__new__(cls, _token(*shown, ""))
        text._show = functools.partial(_token, *shown)
        return text

    def __format__(self, spec: str) -> str:
        return self._show(spec)


def _token(tracer: Any, node: fx.Node, conversion: str, spec: str) -> str:
    """What stands for the formatted value of ``node`` in a text."""
    tracer.shows = True
    return f"{START}{node.name}{tracer.padding}{conversion}:{spec}{_END}"


def texts(tracer: Any, value: Any) -> Any:
    """``value`` with each string that shows traced values rebuilt, as a node ``"...".format(values)``."""
    if isinstance(value, (tuple, list)):
        return type(value)(texts(tracer, item) for item in value)
    if not issubclass(type(value), str) or START not in value:
        return value
    nodes = {node.name: node for node in tracer.graph.nodes}
    template, end, shown = "", 0, []
    for match in _TOKEN.finditer(value):
        name, conversion, spec = match.groups()
        template += _escape(value[end : match.start()]) + f"{{{conversion or ''}{':' if spec else ''}{spec}}}"
        shown.append(Value(nodes[name], tracer))
        end = match.end()
    return tracer.create_proxy("call_method", "format", (template + _escape(value[end:]), *shown), {})


def _escape(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")

