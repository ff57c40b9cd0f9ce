"""What a forward reads and writes besides values: state that a trace bakes in, and effects that it would leave out."""

from __future__ import annotations

import ast
import builtins
import contextlib
import dis
import enum
import functools
import inspect
import logging
import sys
import threading
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_CONSTANTS = (Tensor, nn.Module, fx.Proxy, type, enum.Enum, types.ModuleType, logging.Logger)
_STATEFUL_BUILTINS = (list, dict, set, bytearray, types.MappingProxyType, types.GeneratorType)
_REGISTRIES = ("_parameters", "_buffers", "_modules")
_MISSING = object()


class UntraceableError(Exception):
    """Why a forward is left alone."""


@dataclass
class Reads:
    """What a forward asked its own module for: containers, as literals, and attributes that were not there."""

    literals: dict[str, str] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)


def is_constant(value: Any) -> bool:
    """Whether ``value`` stays what it is unless it is replaced; tensors and modules are not looked at."""
    kind = type(value)
    if issubclass(kind, _CONSTANTS):
        return True
    if issubclass(kind, (tuple, frozenset)):
        return all(is_constant(item) for item in value)
    if issubclass(kind, functools.partial):
        return all(is_constant(item) for item in (value.func, *value.args, *value.keywords.values()))
    if issubclass(kind, (types.BuiltinFunctionType, types.MethodType)):
        return is_constant(value.__self__)
    if kind.__module__ == "builtins":
        return not issubclass(kind, _STATEFUL_BUILTINS) and not hasattr(kind, "__next__")
    if kind in (types.GenericAlias, types.UnionType) or kind.__module__ in ("typing", "functools"):
        return True
    return kind.__module__.split(".")[0] == "torch"


def as_literal(value: Any) -> str | None:
    """The source of a container of plain constants, which a rewritten forward can compare with what is there later."""
    if type(value) not in (list, dict, set):
        return None
    items = [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)
    if not all(type(item) in (int, float, bool, str, type(None), tuple) and is_constant(item) for item in items):
        return None
    text = repr(value)
    with contextlib.suppress(ValueError, SyntaxError):
        if ast.literal_eval(text) == value:
            return text
    return None


@contextlib.contextmanager
def watched_reads(block: nn.Module, reads: Reads) -> Iterator[None]:
    """Refuse reads of attributes that :class:`FusedBlock` could not watch; note the others in ``reads``.

    Plain attributes of ``block`` may be read. Those of its children, and objects with a state of their own, may not.
    """
    thread = threading.get_ident()
    former = vars(nn.Module).get("__getattribute__", _MISSING)

    def read(self: nn.Module, name: str) -> Any:
        watched = threading.get_ident() == thread and not name.startswith("__") and not _is_torch(_caller())
        try:
            value = object.__getattribute__(self, name)
        except AttributeError:
            if watched and _is_absent(self, name):
                if self is not block:
                    raise UntraceableError(f"forward depends on the absence of {name!r} in a child") from None
                reads.absent.add(name)
            raise
        if watched and (name not in MODULE_ATTRIBUTES or (name == "training" and self is not block)):
            _check_read(self, name, value, block, reads)
        return value

    nn.Module.__getattribute__ = read
    try:
        yield
    finally:
        if former is _MISSING:
            del nn.Module.__getattribute__
        else:
            nn.Module.__getattribute__ = former


def _is_absent(module: nn.Module, name: str) -> bool:
    """Whether there is no such parameter, buffer or child, or none yet."""
    return all(vars(module).get(kind, {}).get(name) is None for kind in _REGISTRIES)


def _check_read(module: nn.Module, name: str, value: Any, block: nn.Module, reads: Reads) -> None:
    if name in vars(module):
        if module is not block and name != "forward":
            raise UntraceableError(f"forward reads the attribute {name!r} of a child")
    elif isinstance(inspect.getattr_static(type(module), name, None), (property, functools.cached_property)):
        return  # what it reads is looked at on its own
    if is_constant(value):
        return
    literal = as_literal(value)
    if literal is None or module is not block:
        raise UntraceableError(f"forward reads the attribute {name!r}, which has a state of its own")
    reads.literals[name] = literal


def check_code(block: nn.Module) -> None:
    """Raise where the forward, or a function that it names, uses state of its Python module or its closure.

    Globals that are constants may be read; objects with a state may not, for they could be changed by the forward,
    or after the trace.

    Raises:
        UntraceableError: it does.
    """
    kinds = {kind for module in block.modules() for kind in type(module).__mro__ if not _is_torch(kind.__module__)}
    mro = set(type(block).__mro__)
    pending: list[Any] = [type(block).forward]
    seen: set[Any] = set()
    while pending:
        function = _python_function(pending.pop())
        if function is None or function in seen:
            continue
        seen.add(function)
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            _check_value("a default", default)
        for code in _codes(function.__code__):
            pending += _used(function, code)
            pending += [
                vars(kind)[name]
                for name in code.co_names
                for kind in kinds
                if name in vars(kind) and (name != "forward" or kind in mro)
            ]


@functools.cache
def mentions(kind: type, name: str) -> bool:
    """Whether ``name`` stands in a method of a user's class, or in a function of a user's that is named there."""
    pending = [value for base in kind.__mro__ if not _is_torch(base.__module__) for value in vars(base).values()]
    seen: set[Any] = set()
    while pending:
        function = _python_function(pending.pop())
        if function is None or function in seen:
            continue
        seen.add(function)
        for code in _codes(function.__code__):
            if name in code.co_names:
                return True
            pending += [function.__globals__[other] for other in code.co_names if other in function.__globals__]
    return False


def _python_function(value: Any) -> types.FunctionType | None:
    """The function of a user's, or of another library's, that ``value`` wraps."""
    for _ in range(8):
        if isinstance(value, (staticmethod, classmethod, types.MethodType)):
            value = value.__func__
        elif isinstance(value, (property, functools.partial)):
            value = value.fget if isinstance(value, property) else value.func
        elif hasattr(value, "__wrapped__"):
            value = value.__wrapped__
    if not isinstance(value, types.FunctionType):
        return None
    home = str(value.__globals__.get("__name__", ""))
    known = {"fusedres", *sys.stdlib_module_names} - {"__main__"}
    return None if _is_torch(home) or home.split(".")[0] in known else value


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _used(function: types.FunctionType, code: types.CodeType) -> list[Any]:
    """The globals, free variables and attributes of Python modules and classes that ``code`` loads, all constants."""
    free = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    used: list[Any] = []
    value: Any = _MISSING
    for instruction in dis.get_instructions(code):
        kind, name = instruction.opname, instruction.argval
        if kind in ("STORE_GLOBAL", "DELETE_GLOBAL") or (kind in ("STORE_DEREF", "DELETE_DEREF") and name in free):
            raise UntraceableError(f"forward sets {name!r}, which is not its own")
        if kind in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = function.__globals__.get(name, getattr(builtins, name, _MISSING))
        elif kind == "LOAD_DEREF" and name in free:
            value = _contents(free[name])
        elif kind in ("LOAD_ATTR", "LOAD_METHOD") and _has_names(value):
            value = inspect.getattr_static(value, name, _MISSING)
        else:
            value = _MISSING
        if value is not _MISSING:
            _check_value(repr(name), value)
            used.append(value)
    return used


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


def _has_names(value: Any) -> bool:
    if isinstance(value, types.ModuleType):
        return not _is_torch(value.__name__)
    return isinstance(value, type) and not _is_torch(value.__module__)


def _check_value(name: str, value: Any) -> None:
    if not is_constant(value):
        raise UntraceableError(f"forward uses {name}, which is not its own and has a state")


def _caller() -> str:
    return str(sys._getframe(2).f_globals.get("__name__", ""))


def _is_torch(name: str) -> bool:
    return name == "torch" or name.startswith(("torch.", "fusedres.fusion"))
