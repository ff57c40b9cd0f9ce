"""The flat graph of a module: torch.fx with PyTorch's own modules as leaves and the forwards of users' inlined."""

from __future__ import annotations

import builtins
import contextlib
import logging
import os
import sys
import threading
import types
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode

from fusedres.fusion.aliasing import IN_PLACE_OPERATORS, Values, is_tensor
from fusedres.fusion.derived import kind_of
from fusedres.fusion.proxies import MARK, UntraceableError, Value, is_torchs, is_users, rebuilt, traits
from fusedres.fusion.state import Output, RandomState, State, one_at_a_time

_TORCH = os.path.dirname(torch.__file__) + os.sep


def trace(
    root: nn.Module,
    leaf_reason: Callable[[nn.Module], str | None],
    arguments: dict[str, Any],
    training: bool | None = None,
) -> FlatTracer:
    """The graph of ``type(root).forward`` and what it went through; afterwards all modules are as before.

    Args:
        root: its parameters are read in the graph, so at each call.
        leaf_reason: why a module is called and not looked into; ``""`` for PyTorch's own, ``None`` for all others.
        arguments: by name; the class ``Tensor`` stands for an input of the graph.
        training: the mode of all modules; ``None`` is their own.

    Raises:
        UntraceableError: the forward of ``root`` itself depends on values, has effects that a graph does not show, or
            is not Python. Modules below it that do are leaves.
    """
    reasons: dict[nn.Module, str] = {}
    while True:
        tracer = FlatTracer(root, leaf_reason, reasons, arguments, training)
        failed = tracer.run()
        if root in failed:
            raise UntraceableError(failed[root])
        if not failed:
            break
        reasons |= failed
    tracer.check()
    if tracer.texts:  # one whose layout depends on the length of what stands for a value cannot be rebuilt
        other = FlatTracer(root, leaf_reason, reasons, arguments, training, padding="-" * 37)
        if other.run() or str(other.graph) != str(tracer.graph):
            raise UntraceableError("forward formats values in a way that cannot be followed")
    return tracer


def has_own_call(module: nn.Module) -> bool:
    """Whether calling ``module`` may be more than its forward and hooks."""
    return type(module).__call__ is not nn.Module.__call__ and not isinstance(module, fx.GraphModule)


class FlatTracer(fx.Tracer):
    """One trace.

    Attributes:
        graph: its call_module nodes are the leaves; ``node.meta["owner"]`` is the path of the module that made a node.
        inlined: the modules whose forwards are in it, by path.
        training: the modes of those that were asked, by path.
        reasons: why a module that is no leaf of PyTorch's is one here, or nothing may be assumed of one that is.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        root: nn.Module,
        leaf_reason: Callable[[nn.Module], str | None],
        reasons: dict[nn.Module, str],
        arguments: dict[str, Any],
        mode: bool | None,
        padding: str = "",
    ) -> None:
        super().__init__()
        self.module, self.leaf_reason, self.arguments, self.mode = root, leaf_reason, arguments, mode
        self.reasons, self.failed = dict(reasons), dict[nn.Module, str]()
        self.paths = {module: path for path, module in root.named_modules()}
        self.inlined, self.training = dict[str, nn.Module](), dict[str, bool]()
        self.running: list[nn.Module] = []
        self.unknown = False  # whether a module was called that may return None
        self.values: list[weakref.ref[Value]] = []
        self.parameters: dict[str, fx.Proxy] = {}
        self.padding, self.texts = padding, dict[str, fx.Node]()
        self.thread, self.context = threading.get_ident(), _context()

    def run(self) -> dict[nn.Module, str]:
        """Trace, and put everything back; the modules whose forwards could not be followed, with the reasons."""
        with one_at_a_time:
            kinds = {kind for module in self.paths for kind in type(module).__mro__ if not is_torchs(kind.__module__)}
            forwards = (vars(kind).get("forward") for kind in kinds)
            scopes = {id(names): names for forward in forwards if (names := getattr(forward, "__globals__", None))}
            owners = [*self.paths, *(kinds - {object}), *scopes.values()]
            states = [State(owner) for owner in owners]
            try:
                self._trace()
            except Exception as error:
                self.failed[self.module] = _first_line(error)
            self.parameters.clear()
            for owner, state in zip(owners, states, strict=True):
                changed = state.restore()
                if changed is not None:
                    path = self.paths[owner] if isinstance(owner, nn.Module) else ""
                    while path and path not in self.inlined:
                        path = path.rpartition(".")[0]
                    self.failed.setdefault(self.inlined.get(path, self.module), f"forward changes {changed!r}")
            return self.failed

    def check(self) -> None:
        """Raise where running the graph would not be running the forward."""
        if any(value() is not None for value in self.values):
            raise UntraceableError("forward keeps a value after its end")
        pure = Values(self.module, self.graph).is_pure
        self.graph.eliminate_dead_code(lambda node: not pure(node))
        operators = set(IN_PLACE_OPERATORS.values())
        for node in self.graph.nodes:
            strings: list[Any] = []
            map_aggregate((node.args, node.kwargs), strings.append)
            if any(isinstance(text, str) and MARK in text for text in strings):
                raise UntraceableError("forward formats values for something other than print")
            # `n += 1` rebinds a number and changes a tensor: the same only if the old name is not read again.
            changed = node.all_input_nodes[0] if node.target in operators else node
            if any(user > node for user in changed.users) and changed is not node and not is_tensor(self.root, changed):
                raise UntraceableError("forward applies an in-place operator to a value with a second name")

    def _trace(self) -> None:
        output, rng = Output(), RandomState()
        with contextlib.redirect_stdout(output), warnings.catch_warnings(record=True) as warned, torch.enable_grad():
            warnings.simplefilter("always")
            self.context = _context()
            try:
                with self._intercepted(), _NoComputation():
                    self.trace(self.module)
                changed = self.context != _context()
            finally:
                drawn = rng.restore()
        for happened, reason in (
            (changed, "changes the gradient mode"),
            (drawn, "draws random numbers"),
            (output.getvalue(), "writes to the standard output"),
            ([w for w in warned if not w.filename.startswith(_TORCH)], "warns"),
        ):
            if happened:
                raise UntraceableError(f"forward {reason}")

    @contextlib.contextmanager
    def _intercepted(self) -> Iterator[None]:
        """Answer for ``training``, record this thread's prints and refuse its logging."""
        former = builtins.print, logging.Logger.isEnabledFor

        def show(*args: Any, **kwargs: Any) -> None:
            if threading.get_ident() == self.thread:
                self.create_proxy("call_function", former[0], rebuilt(self, args), kwargs)
            else:
                former[0](*args, **kwargs)

        def refuse(logger: logging.Logger, level: int) -> bool:
            if threading.get_ident() == self.thread and not is_torchs(logger.name):
                raise UntraceableError("forward logs")
            return former[1](logger, level)

        def training(module: nn.Module) -> bool:
            mode: Any = vars(module)["training"] if "training" in vars(module) else module.__getattr__("training")
            if threading.get_ident() == self.thread and module in self.paths:
                mode = self.training[self.paths[module]] = mode if self.mode is None else self.mode
            return mode

        builtins.print, logging.Logger.isEnabledFor = show, refuse  # pyright: ignore[reportAttributeAccessIssue]
        # In front of what the instances have; set, it is theirs.
        nn.Module.training = property(training, lambda module, mode: vars(module).update(training=mode))  # pyright: ignore
        try:
            yield
        finally:
            del nn.Module.training
            builtins.print, logging.Logger.isEnabledFor = former

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
        reason = self.reasons[m] if m in self.reasons else self.leaf_reason(m)
        if reason is None:
            try:
                return self._inline(m, lambda: forward(*args, **kwargs))
            except Exception as error:  # it is a leaf in the next trace, and here for now
                self.failed[m] = _first_line(error)
        elif reason:
            self.reasons[m] = reason
        value = self.create_proxy("call_module", path, args, kwargs)
        self.unknown = self.unknown or not is_tensor(self.module, value.node)
        self._check_frames()
        return value

    def _inline(self, module: nn.Module, forward: Callable[[], Any]) -> Any:
        """Run a forward as part of the graph."""
        function: Any = kind_of(module).forward
        self.running.append(module)
        try:
            if not is_torchs(function.__module__) and hasattr(function, "__code__"):
                self._check_code(function.__code__)
            output = forward()
            self.inlined[self.paths[module]] = module
            return output
        finally:
            self.running.pop()

    def _check_frames(self) -> None:
        """Raise where the innermost forward, or what it calls, has something that a trace leaves out."""
        frame = sys._getframe(1)
        while frame is not None and frame.f_code is not FlatTracer._inline.__code__:
            if is_users(frame) and frame.f_globals.get("__name__") != "torch":  # such as torch._assert
                self._check_code(frame.f_code)
            frame = frame.f_back

    def _check_code(self, code: types.CodeType) -> None:
        reason, asks = traits(code)
        if reason or (asks and self.unknown):
            raise UntraceableError(reason or "forward asks whether a value is None that may be")

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        other = threading.get_ident() != self.thread
        return attr_val if other else super().getattr(attr, attr_val, self.parameters)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        value = Value(node, self)
        self.values.append(weakref.ref(value))
        return value

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        given = {
            name: self.create_proxy("placeholder", name, (), {}) if value is Tensor else value
            for name, value in self.arguments.items()
        }

        def forward(module: nn.Module) -> Any:
            return self._inline(module, lambda: root_fn(module, **given))

        return forward, [self.root]

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if _context() != self.context:
            raise UntraceableError("forward computes under no_grad, a checkpoint or another context")
        if self.running:
            self._check_frames()
        node = super().create_node(kind, *args, **kwargs)
        node.meta["owner"] = self.paths[self.running[-1]] if self.running else ""
        return node

    def create_arg(self, a: Any) -> Any:
        # A proxy's type is asked for first: isinstance(a, Tensor) is of no use on one.
        if type(a) is Tensor and a not in self.tensor_attrs and all(a is not own for own in self.module.buffers()):
            raise UntraceableError("forward uses a tensor that is not its own")
        if type(a) is OrderedDict:
            return self.create_proxy("call_function", OrderedDict, (dict(a),), {}).node
        return super().create_arg(a)


class _NoComputation(TorchDispatchMode):
    """A real operation during a trace has a result that the graph would hold as a constant."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise UntraceableError(f"forward computes {func} on tensors that are not its inputs")


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return text if isinstance(error, UntraceableError) else f"forward cannot be traced: {type(error).__name__}: {text}"


def _context() -> tuple[Any, ...]:
    """Thread state that changes what an operation does and that a graph does not record."""
    autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast, hooks
