"""The Python source of a flat graph, and the guard that tells whether a network is still the one it was made of."""

from __future__ import annotations

import functools
import importlib
import itertools
import linecache
import operator
import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from fusedres.fusion.derived import kind_of
from fusedres.fusion.rewriting import Call
from fusedres.fusion.tracing import FlatTracer

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_serial = itertools.count()


@dataclass(frozen=True)
class Part:
    """A module: its children, parameters and buffers, each with whether it is None."""

    path: str
    kind: type[nn.Module]
    names: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Code:
    """A rewritten forward in a form that pickles: what it calls goes by paths and by name.

    Attributes:
        key: the arguments that it takes, see :func:`fusedres.fusion.install.arguments`.
        source: defines a function of the modules that it uses, of the region's root, and of the tensors of a call.
        names: what the names in it stand for; Python modules by name.
        modules: the paths of the modules that it uses.
        inlined: the modules that the graph went through, and those around what it called; the root first.
        layers: PyTorch's modules, and ours, that the graph called before it was rewritten.
        training: the modes on which it depends.
        calls: a row for each call of a normalisation.
        leaves: modules that it calls and of which nothing is assumed, users' and watched ones, with the reasons.
        forwards: of the classes, when it was traced; not known any more once it was pickled.
    """

    key: tuple[Any, ...]
    source: str
    names: tuple[tuple[str, Any], ...]
    modules: tuple[str, ...]
    inlined: tuple[Part, ...]
    layers: tuple[Part, ...]
    training: tuple[tuple[str, bool], ...]
    calls: tuple[Call, ...]
    leaves: tuple[tuple[str, str], ...]
    forwards: tuple[Callable[..., Any], ...] = field(default=(), compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "forwards": ()}

    def kinds(self) -> list[type[nn.Module]]:
        """The classes whose forwards are in it, or are known."""
        return list(dict.fromkeys(part.kind for part in (*self.inlined, *self.layers)))

    def bind(self, root: nn.Module) -> Bound | None:
        """This code for ``root``; ``None`` where it is not, or not any more, what this was made of."""
        parts = (*self.inlined, *self.layers)
        found = dict(root.named_modules(remove_duplicate=False))
        if not found.keys() >= {*(part.path for part in parts), *self.modules}:
            return None
        if self.forwards and self.forwards != tuple(kind.forward for kind in self.kinds()):
            return None
        changed = any(_part(part.path, found[part.path]) != part for part in parts)
        return None if changed else Bound(self, found)


class Bound:
    """A :class:`Code` for the modules of one network. It keeps no reference to the root, which keeps it."""

    def __init__(self, code: Code, found: dict[str, nn.Module]) -> None:
        self.code, self.key = code, code.key
        self.run = compiled(code.source, code.names)
        self.modules = types.SimpleNamespace(**{_name(i): found[path] for i, path in enumerate(code.modules)})
        inlined = [found[part.path] for part in code.inlined]
        watched = dict.fromkeys([*inlined[1:], *(found[part.path] for part in code.layers)])
        self.watched = [(module, type(module), vars(module)) for module in watched]
        self.hooks = [vars(module)[name] for module in watched for name in _HOOKS]
        self.parents = [(m._modules, [*m._modules.values()]) for m in inlined if m._modules]
        tensors = [names for module in inlined for names in (module._parameters, module._buffers) if names]
        self.tensors = [(names, [tensor is None for tensor in names.values()]) for names in tensors]
        self.mode = dict(code.training).get("")
        self.modes = [(found[path], mode) for path, mode in code.training if path]
        self.kinds = code.kinds()
        self.forwards = [kind.forward for kind in self.kinds]

    def fits(self, root: nn.Module) -> bool:
        """Whether ``root`` is as it was when this was made; once a call, in loops, which torch.compile follows."""
        if self.mode is not None and root.training is not self.mode:
            return False
        for module, mode in self.modes:
            if module.training is not mode:
                return False
        if any(self.hooks):
            return False
        for module, kind, names in self.watched:
            if type(module) is not kind or "forward" in names or "_compiled_call_impl" in names:
                return False
        for parent, children in self.parents:
            if len(parent) != len(children):
                return False
            for child, before in zip(parent.values(), children):  # noqa: B905
                if child is not before:
                    return False
        for names, absent in self.tensors:
            if [tensor is None for tensor in names.values()] != absent:
                return False
        return [kind.forward for kind in self.kinds] == self.forwards


def generate(root: nn.Module, trace: FlatTracer, calls: list[Call], key: tuple[Any, ...], called: list[str]) -> Code:
    """The code of the rewritten graph of ``trace``; ``called`` are the modules that the graph called before."""
    modules, source, names = _source(root, trace.graph)
    found = dict(root.named_modules(remove_duplicate=False))
    opaque = {path: trace.reasons[found[path]] for path in called if found[path] in trace.reasons}
    layers = [path for path in dict.fromkeys(called) if path not in opaque]
    around = {path[:end] for path in called for end in range(len(path)) if path[end] == "."}
    inlined = sorted({"", *trace.inlined, *around})
    code = Code(
        key, source, names, modules, tuple(_part(path, found[path]) for path in inlined),
        tuple(_part(path, found[path]) for path in layers), tuple(sorted(trace.training.items())),
        tuple(calls), tuple(opaque.items()),
    )  # fmt: skip
    return replace(code, forwards=tuple(kind.forward for kind in code.kinds()))


def _source(root: nn.Module, graph: fx.Graph) -> tuple[tuple[str, ...], str, tuple[tuple[str, Any], ...]]:
    """The paths of the modules that the source of ``graph`` uses, by number; the source; the names in it."""
    paths: dict[str, int] = {}

    def short(path: str) -> str:
        return _name(paths.setdefault(path, len(paths)))

    with graph.inserting_before(next(iter(graph.nodes))):
        own = graph.placeholder("root")
    for node in list(graph.nodes):
        node.type = None
        node.target = node.name if node.op == "placeholder" else node.target  # which is unlike any other
        node.meta.pop("is_wrapped", None)
        if node.op == "call_module":
            node.target = short(str(node.target))
        elif node.op == "get_attr":
            path = str(node.target)
            owner, _, name = path.rpartition(".")
            if isinstance(operator.attrgetter(path)(root), nn.Module):
                node.target = short(path)
            elif owner:
                node.target = f"{short(owner)}.{name}"
            else:
                with graph.inserting_before(node):
                    node.replace_all_uses_with(graph.call_function(getattr, (own, name)))
                graph.erase_node(node)
    code = graph.python_code("self")
    names = ((name, _Module(v.__name__) if isinstance(v, types.ModuleType) else v) for name, v in code.globals.items())
    return tuple(paths), code.src.strip() + "\n", tuple(names)


@dataclass(frozen=True)
class _Module:
    """A Python module, by name."""

    name: str


@functools.cache
def compiled(source: str, names: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """The function of ``source``: one for all networks with the same, so that torch.compile compiles it once."""
    filename = f"<fusedres {next(_serial)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    known: dict[str, Any] = {
        name: importlib.import_module(v.name) if isinstance(v, _Module) else v for name, v in names
    }
    exec(compile(source, filename, "exec"), known)
    return known["forward"]


def _name(number: int) -> str:
    return f"m{number}"


def _part(path: str, module: nn.Module) -> Part:
    named = {**module._modules, **module._parameters, **module._buffers}
    return Part(path, kind_of(module), tuple((name, value is None) for name, value in named.items()))
