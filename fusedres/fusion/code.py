"""The Python source of a flat graph, and the guard that tells whether a network is still the one it was made of."""

from __future__ import annotations

import functools
import importlib
import itertools
import linecache
import math
import operator
import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fusedres.fusion.refusals import is_watched, kind_of
from fusedres.fusion.rewriting import Call
from fusedres.fusion.tracing import Trace

_HOOKS = operator.itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_serial = itertools.count()


@dataclass(frozen=True)
class _Inlined:
    """A module whose forward is in a graph: its children, and which of its parameters and buffers are not there."""

    path: str
    kind: type[nn.Module]
    children: tuple[str, ...]
    absent: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """A rewritten forward in a form that pickles: what it calls goes by paths and by name.

    Attributes:
        key: the arguments that it takes, see :func:`fusedres.fusion.region.arguments`.
        source: defines ``run(self, M, ...)``, where ``M`` are the modules that it uses.
        names: what the names in it stand for; Python modules by name.
        modules: the paths of ``M``, and all others that it called before it was rewritten, with their classes.
        used: how many of ``modules`` are ``M``.
        inlined: the modules that it went through, its own first.
        training: the modes on which it depends.
        calls: a row for each call of a normalisation.
        leaves: modules that it calls and that are not guarded: those of users, and watched ones; with the reasons.
        forwards: of the classes, when it was traced; not known any more once it was pickled.
    """

    key: tuple[Any, ...]
    source: str
    names: tuple[tuple[str, Any], ...]
    modules: tuple[tuple[str, type[nn.Module]], ...]
    used: int
    inlined: tuple[_Inlined, ...]
    training: tuple[tuple[str, bool], ...]
    calls: tuple[Call, ...]
    leaves: tuple[tuple[str, str], ...]
    forwards: tuple[Callable[..., Any], ...] = field(default=(), compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "forwards": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def kinds(self) -> tuple[type[nn.Module], ...]:
        """The classes of all modules, but for the leaves of users."""
        opaque = {path for path, _ in self.leaves}
        called = [kind for path, kind in self.modules if path not in opaque]
        return tuple(dict.fromkeys([*(part.kind for part in self.inlined), *called]))

    def bind(self, root: nn.Module) -> Bound | None:
        """This code for ``root``; ``None`` where it is not, or not any more, what this was made of."""
        if self.forwards and tuple(kind.forward for kind in self.kinds()) != self.forwards:
            return None
        try:
            modules = tuple(_get(root, path) for path, _ in self.modules)
            inlined = tuple(_get(root, part.path) for part in self.inlined)
            modes = tuple(_get(root, path) for path, _ in self.training)
        except KeyError:
            return None
        for module, (_, kind) in zip(modules, self.modules, strict=True):
            if kind_of(module) is not kind:
                return None
        opaque = {path for path, _ in self.leaves}
        watched = [m for m, (path, _) in zip(modules, self.modules, strict=True) if path not in opaque]
        if any(is_watched(module) for module in (*watched, *inlined[1:])):
            return None
        for module, part in zip(inlined, self.inlined, strict=True):
            if kind_of(module) is not part.kind or tuple(module._modules) != part.children:
                return None
            if _absent(module) != part.absent:
                return None
        return Bound(self, root, modules, inlined, modes, (*watched, *inlined[1:]))


class Bound:
    """A :class:`Code` for the modules of one network. It keeps no reference to the root, which keeps it."""

    def __init__(
        self,
        code: Code,
        root: nn.Module,
        modules: tuple[nn.Module, ...],
        inlined: tuple[nn.Module, ...],
        modes: tuple[nn.Module, ...],
        watched: tuple[nn.Module, ...],
    ) -> None:
        self.code, self.key = code, code.key
        self.run = compiled(code.source, code.names)
        self.modules = modules[: code.used]
        self.watched = tuple(dict.fromkeys(watched))
        self.classes = tuple(map(type, self.watched))
        self.dicts = [module.__dict__ for module in self.watched]
        self.parents = [module._modules for module in inlined[1:]]
        self.children = [child for module in inlined for child in module._modules.values()]
        self.modes = modes
        self.mode_dicts = [module.__dict__ for module in modes if module is not root]
        self.own_mode = next((mode for path, mode in code.training if not path), None)
        self.bits = [mode for path, mode in code.training if path]
        self.kinds = code.kinds()
        self.forwards = [kind.forward for kind in self.kinds]
        self.tensors = [
            (tensors, [name for name, tensor in tensors.items() if tensor is None], len(tensors))
            for module in inlined[1:]
            for tensors in (module._parameters, module._buffers)
            if tensors
        ]

    def fits(self, root: nn.Module) -> bool:
        """Whether ``root`` is as it was when this was made; once a call."""
        dicts = self.dicts
        return (
            (self.own_mode is None or root.training == self.own_mode)
            and [attributes["training"] for attributes in self.mode_dicts] == self.bits
            and not any(itertools.chain.from_iterable(map(_HOOKS, dicts)))
            and tuple(map(type, self.watched)) == self.classes
            and not any(map(operator.contains, dicts, itertools.repeat("forward")))
            and not any(map(operator.contains, dicts, itertools.repeat("_compiled_call_impl")))
            and [*root._modules.values(), *itertools.chain.from_iterable(map(dict.values, self.parents))]
            == self.children
            and [kind.forward for kind in self.kinds] == self.forwards
            and all(
                len(tensors) == size and [name for name, tensor in tensors.items() if tensor is None] == absent
                for tensors, absent, size in self.tensors
            )
        )

    def fits_compiled(self, root: nn.Module) -> bool:
        """The same in a form that torch.compile follows, which guards on all that is read here."""
        if self.own_mode is not None and root.training != self.own_mode:
            return False
        for module, bit in zip([m for m in self.modes if m is not root], self.bits, strict=True):
            if module.training != bit:
                return False
        for module, kind in zip(self.watched, self.classes, strict=True):
            if type(module) is not kind or "forward" in module.__dict__:
                return False
            if (
                module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
            ):
                return False
        children = list(root._modules.values())
        for parent in self.parents:
            children += list(parent.values())
        if len(children) != len(self.children):
            return False
        for child, before in zip(children, self.children, strict=True):
            if child is not before:
                return False
        return True


def generate(root: nn.Module, trace: Trace, calls: list[Call], key: tuple[Any, ...], called: list[str]) -> Code:
    """The code of the rewritten graph of ``trace``; ``called`` are the modules that the graph called before."""
    emitter = _Emitter(root)
    source = emitter.emit(trace.graph)
    paths = [*emitter.modules, *(path for path in dict.fromkeys(called) if path not in emitter.modules)]
    modules = tuple((path, kind_of(root.get_submodule(path))) for path in paths)
    inlined = tuple(
        _Inlined(path, kind_of(module), tuple(module._modules), _absent(module))
        for path, module in sorted(trace.inlined.items(), key=lambda item: item[0])
    )
    names = {module: name for name, module in root.named_modules()}
    leaves = tuple((names[module], reason) for module, reason in trace.reasons.items() if names[module] in paths)
    code = Code(
        key, source, tuple(emitter.names.items()), modules, len(emitter.modules), inlined,
        tuple(sorted(trace.training.items())), tuple(calls), leaves,
    )  # fmt: skip
    return replace(code, forwards=tuple(kind.forward for kind in code.kinds()))


class _Emitter:
    """Writes a graph as the body of a function. A value is let go of where it is read last."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.modules: dict[str, int] = {}
        self.names: dict[str, Any] = {}
        self.known: dict[int, str] = {}
        self.values: dict[fx.Node, str] = {}

    def emit(self, graph: fx.Graph) -> str:
        last: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.users:
                last.setdefault(max(node.users), []).append(node)
        inputs, lines = [], []
        for node in graph.nodes:
            if node.op == "output":
                lines.append(f"return {self._text(node.args[0])}")
                continue
            name = self.values[node] = f"v{len(self.values)}"
            if node.op == "placeholder":
                inputs.append(name)
            elif node.op == "get_attr":
                self.values[node] = self._attribute(str(node.target))
            else:
                lines.append(f"{name} = {self._call(node)}" if node.users else self._call(node))
            dead = [self.values[value] for value in last.get(node, []) if value.op != "get_attr"]
            if dead:
                lines.append(" = ".join([*dead, "None"]))
        return f"def run({', '.join(['self', 'M', *inputs])}):\n" + "".join(f"    {line}\n" for line in lines)

    def _call(self, node: fx.Node) -> str:
        arguments = [self._text(arg) for arg in node.args]
        arguments += [f"{name}={self._text(arg)}" for name, arg in node.kwargs.items()]
        if node.op == "call_module":
            return f"{self._module(str(node.target))}({', '.join(arguments)})"
        if node.op == "call_method":
            return f"{arguments[0]}.{node.target}({', '.join(arguments[1:])})"
        if node.target is operator.getitem and len(arguments) == 2:
            return f"{arguments[0]}[{arguments[1]}]"
        return f"{self._name(node.target)}({', '.join(arguments)})"

    def _attribute(self, path: str) -> str:
        if path in self.modules or self._is_module(path):
            return self._module(path)
        owner, _, name = path.rpartition(".")
        return f"{self._module(owner) if owner else 'self'}.{name}"

    def _is_module(self, path: str) -> bool:
        value: Any = self.root
        for name in path.split("."):
            value = getattr(value, name)
        return isinstance(value, nn.Module)

    def _module(self, path: str) -> str:
        return f"M[{self.modules.setdefault(path, len(self.modules))}]"

    def _text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.values[value]
        if type(value) is tuple:
            return f"({''.join(f'{self._text(item)}, ' for item in value)})"
        if isinstance(value, list):  # torch.fx has one of its own
            return f"[{', '.join(map(self._text, value))}]"
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return "{" + ", ".join(f"{key!r}: {self._text(item)}" for key, item in value.items()) + "}"
        if isinstance(value, slice):
            parts = ", ".join(self._text(part) for part in (value.start, value.stop, value.step))
            return f"{self._name(slice)}({parts})"
        if isinstance(value, tuple):  # torch.Size, named tuples
            items = [self._text(item) for item in value]
            named = hasattr(value, "_fields")
            return f"{self._name(type(value))}({', '.join(items) if named else '(' + ', '.join(items) + ',)'})"
        if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
            return repr(value)
        return self._name(value)

    def _name(self, value: Any) -> str:
        """A name of ours for ``value``."""
        if id(value) not in self.known:
            self.known[id(value)] = f"c{len(self.known)}"
            self.names[self.known[id(value)]] = _Module(value.__name__) if isinstance(value, types.ModuleType) else value
        return self.known[id(value)]


@dataclass(frozen=True)
class _Module:
    """A Python module, by name."""

    name: str


_compiled: dict[Any, Callable[..., Any]] = {}


def compiled(source: str, names: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """The function of ``source``: one for all networks with the same, so that torch.compile compiles it once."""
    key = (source, tuple(id(value) for _, value in names))
    if key not in _compiled:
        filename = f"<fusedres {next(_serial)}>"
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        known = {n: importlib.import_module(v.name) if isinstance(v, _Module) else v for n, v in names}
        known["_keep"] = names  # so that no id is used twice
        exec(compile(source, filename, "exec"), known)
        _compiled[key] = known["run"]
    return _compiled[key]


def _get(root: nn.Module, path: str) -> nn.Module:
    for name in path.split(".") if path else ():
        module = root._modules[name]
        if module is None:
            raise KeyError(name)
        root = module
    return root


def _absent(module: nn.Module) -> tuple[str, ...]:
    tensors = [*module._parameters.items(), *module._buffers.items()]
    return tuple(name for name, tensor in tensors if tensor is None)
