"""The graph of one module's forward, its children as leaves, taken without calling a child or computing a value."""

from __future__ import annotations

import builtins
import contextlib
import dis
import functools
import gc
import inspect
import logging
import operator
import os
import re
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.fx.proxy import Attribute
from torch.utils._python_dispatch import TorchDispatchMode

from fusedres.fusion.reads import Reads, UntraceableError, check_code, watched_reads
from fusedres.fusion.state import ClassState, Output, RandomState, State, one_at_a_time

IN_PLACE_OPERATORS = {
    name: getattr(operator, f"i{name}")
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul")
}

# A value formatted while tracing stands in the text as START name padding CONVERSION : spec END.
_START, _END = "\x00", "\x01"
_TOKEN = re.compile(f"{_START}(\\w+)-*(![sr])?:([^{_START}{_END}]*){_END}")
_TORCH = os.path.dirname(torch.__file__) + os.sep
_TENSOR = frozenset(dir(Tensor))
_print = builtins.print


def trace(block: nn.Module, training: bool, given: int = 0) -> tuple[fx.Graph, Reads]:
    """The graph of ``type(block).forward`` in one mode; every call of a child is one ``call_module`` node.

    Of the arguments that may be left out, the first ``given`` are values, see :func:`parameters`. Prints become nodes,
    and nothing is printed. The attributes of ``block``, its children and their classes are afterwards as before.

    Returns:
        The graph, and what the forward read of ``block`` besides tensors and children.

    Raises:
        UntraceableError: the forward depends on values or on state that cannot be watched, has effects that a graph
            does not show, or is not Python.
    """
    check_code(block)
    modules = list(block.modules())
    before = [State(module) for module in modules]
    for module in modules:
        vars(module)["training"] = training
    for module in modules[1:]:
        vars(module)["forward"] = _refuse_forward
    classes = {kind for module in modules for kind in type(module).__mro__ if not kind.__module__.startswith("torch.")}
    during = [*map(State, modules), *(ClassState(kind) for kind in classes - {object})]
    reads = Reads()
    try:
        with one_at_a_time, watched_reads(block, reads):
            graph = _traces(block, given)
    except UntraceableError:
        raise
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise UntraceableError(f"forward cannot be traced: {type(error).__name__}: {first_line}") from error
    finally:
        changed = [name for state in during if (name := state.restore()) is not None]
        for state in before:
            state.restore()
    if changed:
        raise UntraceableError(f"forward changes the attribute {changed[0]!r}")
    _check(graph)
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        if not node.target:
            raise UntraceableError("forward calls its own module")
        if has_own_call(block.get_submodule(str(node.target))):
            raise UntraceableError("forward calls a module whose class has a __call__ of its own")
    return graph, reads


def has_own_call(module: nn.Module) -> bool:
    """Whether calling ``module`` may be more than its forward and hooks."""
    return type(module).__call__ is not nn.Module.__call__ and not isinstance(module, fx.GraphModule)


def _traces(block: nn.Module, given: int) -> fx.Graph:
    """The graph, the same with and without gradients and autocast."""
    tracer = _Tracer(given)
    with torch.enable_grad():
        graph = _trace(block, tracer)
        # A text whose layout depends on the length of what stands for a value cannot be rebuilt.
        if tracer.shown and str(graph) != str(_trace(block, _Tracer(given, padding="-" * 37))):
            raise UntraceableError("forward formats values in a way that cannot be followed")
    with torch.inference_mode(), _autocast():
        if str(graph) != str(_trace(block, _Tracer(given))):
            raise UntraceableError("forward depends on the gradient mode, on autocast or on earlier calls")
    return graph


@contextlib.contextmanager
def _autocast() -> Iterator[None]:
    """All that ``torch.is_autocast_enabled`` may be asked about; needs no device."""
    before = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    for device, enabled in before.items():
        torch.set_autocast_enabled(device, not enabled)
    try:
        yield
    finally:
        for device, enabled in before.items():
            torch.set_autocast_enabled(device, enabled)


def _refuse_forward(*args: Any, **kwargs: Any) -> Any:
    """In place of the children's: run inside their parent's, they would have their own mode baked in."""
    raise UntraceableError("forward calls the forward of a child, past its hooks")


def _trace(block: nn.Module, tracer: _Tracer) -> fx.Graph:
    output = Output()
    rng = RandomState()
    with contextlib.ExitStack() as stack:
        stack.callback(rng.restore)
        stack.enter_context(contextlib.redirect_stdout(output))
        warned = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        stack.enter_context(_intercepted(tracer))
        stack.enter_context(_NoComputation())
        tracer.context = _context()
        graph = tracer.trace(block)
        if tracer.context != _context():
            raise UntraceableError("forward changes the gradient mode")
        if rng.restore():
            raise UntraceableError("forward draws random numbers")
    if output.getvalue():
        raise UntraceableError("forward writes to the standard output")
    if any(not warning.filename.startswith(_TORCH) for warning in warned):
        raise UntraceableError("forward warns")
    if tracer.is_kept():
        raise UntraceableError("forward keeps a value outside of the block")
    return graph


def _check(graph: fx.Graph) -> None:
    """Raise where running the graph's source would not be running the forward."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    operators = set(IN_PLACE_OPERATORS.values())
    for node in graph.nodes:
        if node.op == "output":
            node.type = None
        texts: list[Any] = []
        map_aggregate((node.args, node.kwargs), texts.append)
        if any(isinstance(text, str) and _START in text for text in texts):
            raise UntraceableError("forward formats values for something other than print")
        # `n += 1` rebinds a number and changes a tensor: the same only if the old name is not read again.
        if node.target in operators and any(order[user] > order[node] for user in node.all_input_nodes[0].users):
            raise UntraceableError("forward applies an in-place operator to a value with a second name")


def _is_torch_frame(frame: types.FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith(("torch.", "fusedres."))


class _Value(fx.Proxy):
    """A traced value that in-place operators change and that prints can show."""

    def __getattr__(self, name: str) -> _ValueAttribute:
        frame = sys._getframe(1)
        # `value.name` is read when the graph runs; hasattr() and getattr() would be answered now.
        plain = dis.opname[frame.f_code.co_code[frame.f_lasti]] in ("LOAD_ATTR", "LOAD_METHOD")
        if not plain and name not in _TENSOR and not _is_torch_frame(frame):
            raise UntraceableError(f"forward depends on whether a value has the attribute {name!r}")
        attribute = _ValueAttribute(self, name)
        self.tracer.values.append(weakref.ref(attribute))
        return attribute

    tracer: _Tracer

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        # isinstance() comes here after the real type; only torch may ask, for a user's branch would be baked in.
        if not _is_torch_frame(sys._getframe(1)):
            raise UntraceableError("forward depends on the type of a value")
        return type(self)

    def __str__(self) -> str:
        return _Text(self.tracer, self.node, "!s")

    def __repr__(self) -> str:
        return _Text(self.tracer, self.node, "!r")

    def __format__(self, spec: str) -> str:
        return self.tracer.show(self.node, "", spec)


class _Text(str):
    """``str(value)`` or ``repr(value)``, which may be formatted once more: ``f"{value!s:>20}"``."""

    __slots__ = ("_show",)

    def __new__(cls, tracer: _Tracer, node: fx.Node, conversion: str) -> _Text:
        text = super().__new__(cls, tracer.show(node, conversion, ""))
        text._show = functools.partial(tracer.show, node, conversion)
        return text

    def __format__(self, spec: str) -> str:
        return self._show(spec)


class _ValueAttribute(_Value, Attribute):
    """``value.name``: a node once it is used, a method call when it is called."""


def _in_place(function: Callable[..., Any]) -> Callable[[_Value, Any], Any]:
    def method(self: _Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name, _function in IN_PLACE_OPERATORS.items():
    # torch.fx has no in-place operators: Python would fall back to `x = x + y`, which does not change x.
    setattr(_Value, f"__i{_name}__", _in_place(_function))


class _Tracer(fx.Tracer):
    """Children are leaves, buffers are values, and contexts that a graph does not record raise."""

    proxy_buffer_attributes = True
    context: tuple[Any, ...]

    def __init__(self, given: int = 0, padding: str = "") -> None:
        super().__init__()
        self.given = given
        self.padding = padding
        self.shown = False
        self.thread = threading.get_ident()
        self.values: list[weakref.ref[_Value]] = []

    def is_kept(self) -> bool:
        """Whether somebody holds a traced value after the trace; cycles that hold one are young, or nearly always."""
        for generation in (1, 2):
            if all(value() is None for value in self.values):
                return False
            gc.collect(generation)
        return any(value() is not None for value in self.values)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        # Patched by torch.fx for all threads, like __getattr__: what others run meanwhile is not traced.
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        value = _Value(node, self)
        self.values.append(weakref.ref(value))
        return value

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        values = [self.create_proxy("placeholder", name, (), {}) for name in parameters(root_fn, self.given)[0]]
        return root_fn, [self.root, *values]

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if _context() != self.context:
            raise UntraceableError("forward computes under no_grad, a checkpoint or another context")
        return super().create_node(kind, *args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        # A proxy's type is asked for first: isinstance(a, Tensor) is of no use on one.
        if issubclass(type(a), Tensor) and not issubclass(type(a), nn.Parameter):
            owned = a in self.tensor_attrs or any(a is buffer for buffer in self.root.buffers())
            if not owned:
                raise UntraceableError("forward uses a tensor that is not its own")
        return super().create_arg(a)

    def show(self, node: fx.Node, conversion: str, spec: str) -> str:
        """What stands for the formatted value of ``node`` in a text."""
        self.shown = True
        return f"{_START}{node.name}{self.padding}{conversion}:{spec}{_END}"

    def record_print(self, *args: Any, **kwargs: Any) -> None:
        """A ``print`` node in place of the print."""
        self.create_proxy("call_function", _print, self._texts(args), kwargs)

    def _texts(self, value: Any) -> Any:
        """``value`` with each string that shows traced values rebuilt as ``"...".format(values)``."""
        if isinstance(value, (tuple, list)):
            return type(value)(self._texts(item) for item in value)
        if not issubclass(type(value), str) or _START not in value:
            return value
        nodes = {node.name: node for node in self.graph.nodes}
        template, end, shown = "", 0, []
        for match in _TOKEN.finditer(value):
            name, conversion, spec = match.groups()
            template += _escape(value[end : match.start()]) + f"{{{conversion or ''}{':' if spec else ''}{spec}}}"
            shown.append(_Value(nodes[name], self))
            end = match.end()
        return self.create_proxy("call_method", "format", (template + _escape(value[end:]), *shown), {})


def parameters(forward: Callable[..., Any], given: int = 0) -> tuple[list[str], bool]:
    """The required positional parameters after ``self``, and whether there are others, which take their defaults.

    The first ``given`` of those that may be ``None``, as ``shortcut=None``, count as required.

    Raises:
        UntraceableError: a keyword-only parameter is required.
    """
    required: list[str] = []
    others = False
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            raise UntraceableError(f"forward requires the keyword {parameter.name!r}")
        optional = given > 0 and not others and parameter.default is None
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD) and (
            parameter.default is parameter.empty or optional
        ):
            required.append(parameter.name)
            given -= optional
        else:
            others = True
    return required, others


def _escape(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _context() -> tuple[Any, ...]:
    """Thread state that changes what an operation does and that a graph does not record."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._autograd._top_saved_tensors_default_hooks(True),  # pyright: ignore[reportAttributeAccessIssue]
    )


class _NoComputation(TorchDispatchMode):
    """A real operation during a trace has a result that the graph would hold as a constant."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise UntraceableError(f"forward computes {func} on tensors that are not its inputs")


@contextlib.contextmanager
def _intercepted(tracer: _Tracer) -> Iterator[None]:
    """Record prints of this thread, and ``torch.cat`` of a list that is a value; refuse logging and autocast."""
    thread = threading.get_ident()
    concatenate = torch.cat
    enabled_for, enter_autocast = logging.Logger.isEnabledFor, torch.autocast.__enter__

    def show(*args: Any, **kwargs: Any) -> None:
        (tracer.record_print if threading.get_ident() == thread else _print)(*args, **kwargs)

    def refuse_logging(self: logging.Logger, level: int) -> bool:
        if threading.get_ident() == thread and not self.name.startswith("torch"):
            raise UntraceableError("forward logs")
        return enabled_for(self, level)

    def refuse_autocast(self: torch.autocast) -> torch.autocast:
        if threading.get_ident() == thread:
            raise UntraceableError("forward enters autocast")
        return enter_autocast(self)

    def cat(*args: Any, **kwargs: Any) -> Any:
        if args and issubclass(type(args[0]), _Value) and args[0].tracer is tracer:
            return tracer.create_proxy("call_function", concatenate, args, kwargs)
        return concatenate(*args, **kwargs)

    torch.cat = cat
    builtins.print = show
    logging.Logger.isEnabledFor = refuse_logging
    torch.autocast.__enter__ = refuse_autocast
    try:
        yield
    finally:
        torch.cat = concatenate
        builtins.print = _print
        logging.Logger.isEnabledFor = enabled_for
        torch.autocast.__enter__ = enter_autocast
