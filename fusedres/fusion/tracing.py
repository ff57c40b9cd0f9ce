"""The flat graph of a module: torch.fx with PyTorch's own modules as leaves and the forwards of users' inlined."""

from __future__ import annotations

import builtins
import contextlib
import dis
import functools
import inspect
import logging
import operator
import os
import re
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.fx.proxy import Attribute
from torch.utils._python_dispatch import TorchDispatchMode

from fusedres.fusion.aliasing import IN_PLACE_OPERATORS, is_tensor
from fusedres.fusion.state import ClassState, Output, RandomState, State, one_at_a_time

# A value formatted while tracing stands in the text as START name padding CONVERSION : spec END.
_START, _END = "\x00", "\x01"
_TOKEN = re.compile(f"{_START}(\\w+)-*(![sr])?:([^{_START}{_END}]*){_END}")
_TORCH = os.path.dirname(torch.__file__) + os.sep
_TENSOR = frozenset(dir(Tensor))
_MAYBE_NONE = {"grad", "grad_fn", "_grad", "_grad_fn", "_base", "names", "_backward_hooks"}
_HANDLERS = {"PUSH_EXC_INFO", "SETUP_FINALLY", "SETUP_WITH", "BEFORE_WITH", "LOAD_SPECIAL"}
# What a forward may learn of the process, or do to it; a graph shows neither.
_QUERIES = (
    (torch, "is_grad_enabled"), (torch, "is_inference_mode_enabled"), (torch, "is_autocast_enabled"),
    (torch, "is_autocast_cpu_enabled"), (torch, "get_autocast_dtype"), (torch, "get_autocast_gpu_dtype"),
    (torch, "is_deterministic_algorithms_warn_only_enabled"), (torch, "are_deterministic_algorithms_enabled"),
    (torch, "manual_seed"), (torch, "seed"), (torch, "initial_seed"), (torch, "get_rng_state"),
    (torch, "set_rng_state"), (torch.jit, "is_tracing"), (torch.compiler, "is_compiling"),
    (torch.compiler, "is_exporting"), (torch.compiler, "is_dynamo_compiling"), (torch.distributed, "is_initialized"),
    (torch.distributed, "is_available"), (torch.distributed, "get_rank"), (torch.distributed, "get_world_size"),
    (torch.distributed, "all_reduce"), (torch.onnx, "is_in_onnx_export"), (torch.cuda, "synchronize"),
)  # fmt: skip
_print = builtins.print


class UntraceableError(Exception):
    """Why a forward is left alone."""


@dataclass
class Trace:
    """A flat graph and what it went through.

    Attributes:
        graph: its call_module nodes are the leaves; ``node.meta["owner"]`` is the path of the module that made a node.
        inlined: the modules whose forwards are in it, by path.
        training: whether they were, for those that were asked; and others whose ``training`` was read.
        reasons: why a module that is no leaf of PyTorch's is one here, or nothing may be assumed of one that is.
    """

    graph: fx.Graph
    inlined: dict[str, nn.Module] = field(default_factory=dict)
    training: dict[str, bool] = field(default_factory=dict)
    reasons: dict[nn.Module, str] = field(default_factory=dict)


def trace(
    root: nn.Module,
    leaf_reason: Callable[[nn.Module], str | None],
    constants: dict[str, Any],
    training: bool | None = None,
) -> Trace:
    """The graph of ``type(root).forward``; afterwards all modules and their classes are as before.

    Args:
        root: its parameters are inputs of the graph, but for those in ``constants``.
        leaf_reason: why a module is called and not looked into; ``""`` for PyTorch's own, ``None`` for all others.
        constants: values of parameters.
        training: the mode of all modules; ``None`` is their own.

    Raises:
        UntraceableError: the forward of ``root`` itself depends on values, has effects that a graph does not show, or
            is not Python. Modules below it that do are leaves.
    """
    reasons: dict[nn.Module, str] = {}
    for _ in range(32):
        tracer = _Tracer(root, leaf_reason, reasons, constants, training)
        with one_at_a_time:
            failed = tracer.run()
        if not failed:
            tracer.check()
            if tracer.shown:  # a text whose layout depends on the length of what stands for a value cannot be rebuilt
                other = _Tracer(root, leaf_reason, reasons, constants, training, padding="-" * 37)
                with one_at_a_time:
                    other.run()
                if str(other.graph) != str(tracer.graph):
                    raise UntraceableError("forward formats values in a way that cannot be followed")
            return Trace(tracer.graph, tracer.inlined, tracer.training, reasons | tracer.watched)
        if root in failed:
            raise UntraceableError(failed[root])
        reasons |= failed
    raise UntraceableError("forward cannot be followed")


def has_own_call(module: nn.Module) -> bool:
    """Whether calling ``module`` may be more than its forward and hooks."""
    return type(module).__call__ is not nn.Module.__call__ and not isinstance(module, fx.GraphModule)


def is_torchs(name: object) -> bool:
    """Whether ``name`` is that of a Python module of PyTorch's."""
    return str(name) == "torch" or str(name).startswith("torch.")


@functools.cache
def _traits(code: types.CodeType) -> tuple[str, bool]:
    """Why a frame that runs ``code`` cannot be followed, and whether it asks if a variable is None."""
    before: list[Any] = [None, None]
    asks = False
    for step in dis.get_instructions(code):
        if step.opname in _HANDLERS and not (step.opname == "LOAD_SPECIAL" and "enter" not in str(step.argrepr)):
            return "forward has a context or an exception handler", asks
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval in ("type", "id"):
            return f"forward asks for the {step.argval}() of something", asks
        none = step.opname in ("POP_JUMP_IF_NONE", "POP_JUMP_IF_NOT_NONE") or "JUMP_FORWARD_IF_N" in step.opname
        none = none or step.opname.endswith(("IF_NONE", "IF_NOT_NONE"))
        variable = before[1]
        if step.opname == "IS_OP":
            if before[1].opname not in ("LOAD_CONST", "RETURN_CONST") or before[1].argval is not None:
                return "forward asks whether two things are the same", asks
            none, variable = True, before[0]
        asks = asks or (none and variable is not None and variable.opname.startswith("LOAD_FAST"))
        before = [before[1], step]
    return "", asks


def _is_torch_frame(frame: types.FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return name == "torch" or name.startswith(("torch.", "fusedres."))


class _Value(fx.Proxy):
    """A traced value: operators in place are nodes, prints can show it, and it answers nothing that may be untrue."""

    tracer: _Tracer

    def __getattr__(self, name: str) -> _ValueAttribute:
        if (name not in _TENSOR or name in _MAYBE_NONE) and not _is_torch_frame(sys._getframe(1)):
            raise UntraceableError(f"forward asks a value for the attribute {name!r}")
        return _ValueAttribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer", "root", "attr", "_node"):
            raise UntraceableError(f"forward sets the attribute {name!r} of a value")
        object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        if not _is_torch_frame(sys._getframe(1)):
            raise UntraceableError("forward looks for a value in a set or a dict")
        return id(self)

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        # isinstance() comes here after the real type.
        frame = sys._getframe(1)
        home = str(frame.f_globals.get("__name__", ""))
        if home == "torch.nn.parameter" and frame.f_back is not None:  # isinstance(value, nn.Parameter)
            home = str(frame.f_back.f_globals.get("__name__", ""))
            if not is_torchs(home):
                raise UntraceableError("forward asks whether a value is a parameter")
        # Code in C++ takes what torch's own functions believe to be tensors for tensors.
        if home.startswith(("torch.", "fusedres.")):
            return type(self)
        if is_tensor(self.tracer.root, self.node):
            return Tensor
        raise UntraceableError("forward depends on the type of a value")

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
    """One trace; :meth:`run` says which modules' forwards it could not follow."""

    proxy_buffer_attributes = True

    def __init__(
        self,
        root: nn.Module,
        leaf_reason: Callable[[nn.Module], str | None],
        reasons: dict[nn.Module, str],
        constants: dict[str, Any],
        mode: bool | None,
        padding: str = "",
    ) -> None:
        super().__init__()
        self.module, self.leaf_reason, self.reasons, self.constants = root, leaf_reason, reasons, constants
        self.mode = mode
        self.paths = {module: path for path, module in root.named_modules()}
        self.thread = threading.get_ident()
        self.failed: dict[nn.Module, str] = {}
        self.inlined: dict[str, nn.Module] = {"": root}
        self.training: dict[str, bool] = {}
        self.running: list[nn.Module] = [root]
        self.watched: dict[nn.Module, str] = {}
        self.padding, self.shown = padding, False
        self.buffers = {id(buffer) for buffer in root.buffers()}
        self.context = _context()

    def run(self) -> dict[nn.Module, str]:
        """Trace, and put everything back."""
        modules = list(self.paths)
        modes = {module: vars(module)["training"] for module in modules if "training" in vars(module)}
        before = [State(module) for module in modules]
        for module in modes:
            del vars(module)["training"]  # asked for, it is missing, and _reads() answers
        during = [State(module) for module in modules]
        kinds = {kind for m in modules for kind in type(m).__mro__ if not is_torchs(kind.__module__)}
        classes = [ClassState(kind) for kind in kinds - {object}]
        try:
            with self._reads(modes):
                self._trace()
        except UntraceableError as error:
            self.failed[self.module] = str(error)
        except Exception as error:
            self.failed[self.module] = _first_line(error)
        finally:
            changed = [(state.owner, name) for state in during if (name := state.restore()) is not None]
            altered = [name for state in classes if (name := state.restore()) is not None]
            for state in before:
                state.restore()
        for module, name in changed:
            assert isinstance(module, nn.Module)
            self.failed.setdefault(self._culprit(module), f"forward changes the attribute {name!r}")
        if altered:
            self.failed.setdefault(self.module, f"forward changes the attribute {altered[0]!r} of a class")
        return self.failed

    def check(self) -> None:
        """Raise where running the graph would not be running the forward."""
        order = {node: index for index, node in enumerate(self.graph.nodes)}
        operators = set(IN_PLACE_OPERATORS.values())
        for node in self.graph.nodes:
            texts: list[Any] = []
            map_aggregate((node.args, node.kwargs), texts.append)
            if any(isinstance(text, str) and _START in text for text in texts):
                raise UntraceableError("forward formats values for something other than print")
            # `n += 1` rebinds a number and changes a tensor: the same only if the old name is not read again.
            if node.target in operators and any(order[user] > order[node] for user in node.all_input_nodes[0].users):
                if not is_tensor(self.module, node.all_input_nodes[0]):
                    raise UntraceableError("forward applies an in-place operator to a value with a second name")

    def _culprit(self, module: nn.Module) -> nn.Module:
        """The innermost module around ``module`` whose forward was followed."""
        path = self.paths[module]
        while path not in self.inlined:
            path = path.rpartition(".")[0]
        return self.inlined[path]

    def _trace(self) -> None:
        output, rng = Output(), RandomState()
        with contextlib.ExitStack() as stack:
            stack.callback(rng.restore)
            stack.enter_context(contextlib.redirect_stdout(output))
            warned = stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_intercepted(self))
            stack.enter_context(_NoComputation())
            self.context = _context()
            self.trace(self.module)
            if self.context != _context():
                raise UntraceableError("forward changes the gradient mode")
            if rng.restore():
                raise UntraceableError("forward draws random numbers")
        if output.getvalue():
            raise UntraceableError("forward writes to the standard output")
        if any(not warning.filename.startswith(_TORCH) for warning in warned):
            raise UntraceableError("forward warns")

    @contextlib.contextmanager
    def _reads(self, modes: dict[nn.Module, bool]) -> Iterator[None]:
        """Answer for ``training``, and note who was asked."""
        former = nn.Module.__getattr__

        def get(module: nn.Module, name: str) -> Any:
            if name != "training" or module not in modes:
                return former(module, name)
            mode = modes[module] if self.mode is None else self.mode
            self.training[self.paths[module]] = mode
            return mode

        patched = fx._symbolic_trace  # which calls the one that it found when it was imported
        nn.Module.__getattr__ = patched._orig_module_getattr = get  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            nn.Module.__getattr__ = patched._orig_module_getattr = former  # pyright: ignore[reportAttributeAccessIssue]

    def path_of_module(self, mod: nn.Module) -> str:
        if mod not in self.paths:
            raise UntraceableError("forward calls a module that is not its own")
        return self.paths[mod]

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        # Patched by torch.fx for all threads, like __getattr__: what others run meanwhile is not traced.
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if m in self.running:
            raise UntraceableError("forward calls its own module")
        if has_own_call(m):
            raise UntraceableError("forward calls a module whose class has a __call__ of its own")
        asks = self._check_frames()
        reason = self.reasons.get(m)
        if reason is None:
            reason = self.leaf_reason(m)
        if reason is None:
            self.running.append(m)
            try:
                unknown = any(self._is_unknown(arg) for arg in (*args, *kwargs.values()))
                if unknown and _traits(type(m).forward.__code__)[1]:
                    raise UntraceableError("forward asks whether a value is None that may be")
                output = forward(*args, **kwargs)
                self.inlined[path] = m
                return output
            except Exception as error:  # it is a leaf in the next trace, and here for now
                self.failed[m] = _first_line(error)
            finally:
                self.running.pop()
        elif reason:
            self.watched[m] = reason
        if reason and asks:
            raise UntraceableError("forward asks whether a value is None, and calls a module that may return it")
        return self.create_proxy("call_module", path, args, kwargs)

    def _is_unknown(self, value: Any) -> bool:
        """Whether ``value`` may be something else than a tensor: what comes out of a module that is not looked into."""
        if not issubclass(type(value), fx.Proxy):
            return False
        node = value.node
        while node.op == "call_function" and node.target in (operator.getitem, getattr):
            node = node.args[0]
        return node.op == "call_module" and not is_tensor(self.module, node)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        given = []
        for parameter in list(inspect.signature(root_fn).parameters.values())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                break
            if parameter.kind is parameter.KEYWORD_ONLY:
                if parameter.default is parameter.empty:
                    raise UntraceableError(f"forward requires the keyword {parameter.name!r}")
            elif parameter.name in self.constants:
                given.append(self.constants[parameter.name])
            else:
                given.append(self.create_proxy("placeholder", parameter.name, (), {}))
        return root_fn, [self.root, *given]

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if _context() != self.context:
            raise UntraceableError("forward computes under no_grad, a checkpoint or another context")
        self._check_frames()
        node = super().create_node(kind, *args, **kwargs)
        node.meta["owner"] = self.paths[self.running[-1]]
        return node

    def _check_frames(self) -> bool:
        """Raise where the innermost forward has something that a trace leaves out; whether it asks if a value is None."""
        frame, asks = sys._getframe(2), False
        while frame is not None and frame.f_code not in _BOUNDARIES:
            if not _is_torch_frame(frame):
                reason, asked = _traits(frame.f_code)
                if reason:
                    raise UntraceableError(reason)
                asks = asks or asked
            frame = frame.f_back
        return asks

    def create_arg(self, a: Any) -> Any:
        # A proxy's type is asked for first: isinstance(a, Tensor) is of no use on one.
        if issubclass(type(a), Tensor) and not issubclass(type(a), nn.Parameter) and id(a) not in self.buffers:
            if a not in self.tensor_attrs:
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


_BOUNDARIES = {_Tracer.call_module.__code__, _Tracer._trace.__code__}


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return text if isinstance(error, UntraceableError) else f"forward cannot be traced: {type(error).__name__}: {text}"


def _escape(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _context() -> tuple[Any, ...]:
    """Thread state that changes what an operation does and that a graph does not record."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch._C._autograd._top_saved_tensors_default_hooks(True),  # pyright: ignore[reportAttributeAccessIssue]
    )


class _NoComputation(TorchDispatchMode):
    """A real operation during a trace has a result that the graph would hold as a constant."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise UntraceableError(f"forward computes {func} on tensors that are not its inputs")


@contextlib.contextmanager
def _intercepted(tracer: _Tracer) -> Iterator[None]:
    """Record prints of this thread, and ``torch.cat`` of a list that is a value; refuse logging and queries."""
    thread = threading.get_ident()
    concatenate, enabled_for = torch.cat, logging.Logger.isEnabledFor
    former = [(home, name, getattr(home, name)) for home, name in _QUERIES if hasattr(home, name)]

    def show(*args: Any, **kwargs: Any) -> None:
        (tracer.record_print if threading.get_ident() == thread else _print)(*args, **kwargs)

    def refuse_logging(self: logging.Logger, level: int) -> bool:
        if threading.get_ident() == thread and not self.name.startswith("torch"):
            raise UntraceableError("forward logs")
        return enabled_for(self, level)

    def cat(*args: Any, **kwargs: Any) -> Any:
        if args and issubclass(type(args[0]), _Value) and args[0].tracer is tracer:
            return tracer.create_proxy("call_function", concatenate, args, kwargs)
        return concatenate(*args, **kwargs)

    def refused(name: str, function: Any) -> Callable[..., Any]:
        def query(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread and not _is_torch_frame(sys._getframe(1)):
                raise UntraceableError(f"forward calls {name}")
            return function(*args, **kwargs)

        return query

    torch.cat, builtins.print, logging.Logger.isEnabledFor = cat, show, refuse_logging
    for home, name, function in former:
        setattr(home, name, refused(name, function))
    try:
        yield
    finally:
        torch.cat, builtins.print, logging.Logger.isEnabledFor = concatenate, _print, enabled_for
        for home, name, function in former:
            setattr(home, name, function)
