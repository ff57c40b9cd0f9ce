"""What stands for a value while a forward is traced: a torch.fx proxy that answers nothing that may be untrue."""

from __future__ import annotations

import dis
import functools
import re
import sys
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx
from torch.fx.proxy import Attribute

from fusedres.fusion.aliasing import IN_PLACE_OPERATORS, is_tensor

MARK = "\x00"
_TOKEN = re.compile(f"({MARK}\\w+-*{MARK})")  # stands in a text for what a node formats
_MAYBE_NONE = {"grad", "grad_fn", "_grad", "_grad_fn", "_base", "names", "_backward_hooks"}
_ATTRIBUTES = frozenset(dir(Tensor)) - _MAYBE_NONE

# What a forward may learn of the process or do to it, by the names that it calls.
_PROCESS = {
    "is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_tracing", "is_compiling", "is_exporting",
    "is_in_onnx_export", "is_initialized", "get_rank", "get_world_size", "all_reduce", "synchronize",
}  # fmt: skip
_HANDLERS = {"PUSH_EXC_INFO", "SETUP_FINALLY", "SETUP_WITH"}  # Python 3.10 has the latter two
_STORES = {"STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL"}


class UntraceableError(Exception):
    """Why a forward is left alone."""


def is_torchs(name: object) -> bool:
    """Whether ``name`` is that of a Python module of PyTorch's."""
    return str(name) == "torch" or str(name).startswith("torch.")


def is_users(frame: Any) -> bool:
    """Whether ``frame`` runs neither PyTorch's code nor ours."""
    return not str(frame.f_globals.get("__name__", "")).startswith(("torch.", "fusedres."))


@functools.cache
def traits(code: types.CodeType) -> tuple[str, bool]:
    """Why a frame that runs ``code`` cannot be followed, and whether it asks if a variable is None.

    Read from the bytecode is only what no proxy is told of, or what would be done before one is.
    """
    asked = _PROCESS.intersection(code.co_names)
    reason = f"forward calls {min(asked)}" if asked else ""
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    asks = False
    for before, last, step in zip([None, None, *steps], [None, *steps], steps, strict=False):
        variable = last if step.opname.endswith(("IF_NONE", "IF_NOT_NONE")) else None
        if step.opname in _HANDLERS:
            reason = "forward has a context or an exception handler"
        elif step.opname in _STORES:
            reason = f"forward sets or deletes {step.argval!r}"
        elif step.opname == "LOAD_GLOBAL" and step.argval in ("type", "id"):
            reason = f"forward asks for the {step.argval}() of something"
        elif step.opname == "IS_OP":
            variable = before
            if last is None or last.opname != "LOAD_CONST" or last.argval is not None:
                reason = "forward asks whether two things are the same"
        asks = asks or (variable is not None and variable.opname.startswith("LOAD_FAST"))
    return reason, asks


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

    def __iter__(self) -> Any:
        # As torch.fx does, whose own keeps the value alive in a cycle of frames.
        frame = sys._getframe(1)
        for step in dis.get_instructions(frame.f_code):
            if step.offset == frame.f_lasti and step.opname == "UNPACK_SEQUENCE":
                items: Any = self
                return iter([items[index] for index in range(step.argval)])
        return self.tracer.iter(self)

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
        return _Text(self, "{!s}")

    def __repr__(self) -> str:
        return _Text(self, "{!r}")

    def __format__(self, spec: str) -> str:
        return _Text(self, f"{{:{spec}}}")


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
    """A formatted value, which may be formatted once more: ``f"{value!s:>20}"``."""

    tracer: Any
    node: fx.Node

    def __new__(cls, value: Value, template: str) -> _Text:
        tracer = value.tracer
        node = tracer.create_proxy("call_method", "format", (template, value), {}).node
        text = super().__new__(cls, f"{MARK}{node.name}{tracer.padding}{MARK}")
        text.tracer, text.node = tracer, node
        tracer.texts[str.__str__(text)] = node
        return text

    def __format__(self, spec: str) -> str:
        return _Text(self.tracer.proxy(self.node), f"{{:{spec}}}")


def rebuilt(tracer: Any, value: Any) -> Any:
    """``value`` with each string that shows traced values as a node that joins its pieces."""
    if isinstance(value, (tuple, list)):
        return type(value)(rebuilt(tracer, item) for item in value)
    if not issubclass(type(value), str) or MARK not in value:
        return value
    nodes = [tracer.texts.get(piece, piece) for piece in _TOKEN.split(value)]
    pieces = [tracer.proxy(piece) if isinstance(piece, fx.Node) else piece for piece in nodes]
    return tracer.create_proxy("call_method", "join", ("", pieces), {})
