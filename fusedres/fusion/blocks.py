"""The dynamic subclass that gives a block its rewritten forward."""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import linecache
import re
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from fusedres.fusion.chains import Chain
from fusedres.fusion.derived import Derived, disguise
from fusedres.fusion.joins import Forms, Joined, merge_chains
from fusedres.fusion.pairs import is_open, total
from fusedres.fusion.reads import MODULE_ATTRIBUTES, Reads, UntraceableError
from fusedres.fusion.rewriting import Call
from fusedres.fusion.runtime import is_changed
from fusedres.fusion.tracing import parameters

_MISSING = object()
_REGISTRIES = ("_parameters", "_buffers", "_modules")
# Set by PyTorch's own wrappers, and no part of what a forward computes.
_IGNORED = MODULE_ATTRIBUTES | {"_compiled_call_impl", "_is_fsdp_managed_module", "_fsdp_use_orig_params"}
_serial = itertools.count()
# What a rewritten forward calls by a name of its own; no parameter may have one.
_OUR_NAMES = re.compile(r"_(len|isinstance|Proxy|original|total|end|is_\w+|(training|evaluation)_\w+)")
_FORWARD = """
def forward(self, {parameters}):
    if {changed}:
        return _original(self, {arguments})
    return {call}
"""
_OPERANDS = """
def _fusedres_operands(self, {input}, _fusedres_residual):
    if {changed}:
        return self.forward(_total({input}, _fusedres_residual)), None
    return {call}
"""


@dataclass(frozen=True)
class Code:
    """A rewritten forward: its text and what the names in it stand for, in a form that compares and pickles.

    ``names`` holds functions by reference and Python modules by name; ``norms`` (of batches), ``acts``, ``linears``,
    ``layer_norms`` and ``identities`` are the paths of the folded modules, ``guests`` of those that are called with a
    sum, ``children`` is the number of the block's children and ``attributes`` are the names of its own plain
    attributes, and of those that its forward looked for in vain. ``chain`` is how the block passes pairs on. ``given``
    is for calls that give the first optional argument too.
    """

    source: str
    names: tuple[tuple[str, Any], ...]
    norms: tuple[str, ...]
    acts: tuple[str, ...]
    linears: tuple[str, ...]
    layer_norms: tuple[str, ...]
    identities: tuple[str, ...]
    guests: tuple[str, ...]
    children: int
    attributes: frozenset[str]
    calls: tuple[Call, ...]
    chain: Chain
    given: Code | None = None

    @property
    def folded(self) -> tuple[tuple[str, ...], ...]:
        """The paths of the folded modules, by kind, as :func:`fusedres.fusion.runtime.is_changed` takes the modules."""
        return self.norms, self.acts, self.linears, self.layer_norms, self.identities


class FusedBlock(Derived):
    """Mixed into a block's own class. The block runs its original forward again once it is no longer what was traced.

    Modules that were folded are looked at in each forward. The block's own attributes, which a trace may have baked
    in, are watched here; those of its children and those of other objects are not (see ``reads``).
    """

    _fusedres_code: Code
    _fusedres_stale = False

    def __setattr__(self, name: str, value: Any) -> None:
        self._watch(name, value)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._watch(name, _MISSING)
        super().__delattr__(name)

    def register_parameter(self, name: str, param: Any) -> None:
        """See :meth:`torch.nn.Module.register_parameter`."""
        self._watch(name, param)
        super().register_parameter(name, param)  # pyright: ignore[reportAttributeAccessIssue]

    def register_buffer(self, name: str, tensor: Any, *args: Any, **kwargs: Any) -> None:
        """See :meth:`torch.nn.Module.register_buffer`."""
        self._watch(name, tensor)
        super().register_buffer(name, tensor, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def add_module(self, name: str, module: Any) -> None:
        """See :meth:`torch.nn.Module.add_module`."""
        self._watch(name, module)
        super().add_module(name, module)  # pyright: ignore[reportAttributeAccessIssue]

    def _watch(self, name: str, value: Any) -> None:
        """Note that ``name`` is about to be ``value``."""
        if name in _IGNORED or name.startswith("__") or self._fusedres_stale:
            return
        attributes = vars(self)
        registry = next((kind for kind in _REGISTRIES if name in attributes[kind]), None)
        if registry is not None:  # read at each call, unless it is None
            same = value is not _MISSING and (attributes[registry][name] is None) == (value is None)
        elif name not in self._fusedres_code.attributes and not hasattr(type(self), name):
            same = True
        else:
            same = _is_same(attributes.get(name, getattr(type(self), name, _MISSING)), value)
        if not same:
            attributes["_fusedres_stale"] = True


@dataclass(frozen=True)
class _Module:
    """A Python module, by name."""

    name: str


def generate(block: nn.Module, forms: tuple[Forms, Forms], reads: tuple[Reads, ...], optional: int = 0) -> Code:
    """The code of the forms for training and for evaluation, one where they are the same, behind the checks.

    ``reads`` is what was read of the block's attributes, ``optional`` the number of optional arguments that are inputs.

    Raises:
        UntraceableError: the graphs call different functions by one name, or a parameter has a name of ours.
    """
    names: dict[str, Any] = {}
    required, others = parameters(type(block).forward, optional)
    if any(_OUR_NAMES.fullmatch(name) for name in required):
        raise UntraceableError(f"its forward cannot be rewritten: a parameter of {required} has a name of ours")
    arguments = ", ".join(required)
    forwards = [form.forward for form in forms]
    pairs = [form.paired for form in forms if form.paired is not None]
    folded = [
        set[str]().union(*(getattr(form.folded, kind) for form in forms))
        for kind in ("norms", "acts", "linears", "layer_norms", "identities")
    ]
    folded[0].update(*(form.norms for form in forwards))
    guests = set[str]().union(*(form.guests for form in forwards))
    checks = ["self._fusedres_stale", *_literal_checks(reads), f"_len(self._modules) != {len(block._modules)}"]
    source, call = _both_modes(forwards, "forward", arguments, names)
    given = arguments + (", *_fusedres_args, **_fusedres_kwargs" if others else "")
    # A symbolic trace of the user's, such as torchvision's feature extraction, asks for the modules by their names.
    unusual = ["_fusedres_args or _fusedres_kwargs"] * others + [f"_isinstance({n}, _Proxy)" for n in required[:1]]
    changed = " or ".join(unusual + checks + _module_checks(folded, guests))
    source += _FORWARD.format(parameters=given, arguments=given, changed=changed, call=call)
    if len(pairs) == 2:
        folded[0].update(*(form.norms for form in pairs))
        guests.update(*(form.guests for form in pairs))
        second, call = _both_modes(pairs, "operands", f"{arguments}, _fusedres_residual", names)
        changed = " or ".join(checks + _module_checks(folded, guests))
        source += second + _OPERANDS.format(input=arguments, changed=changed, call=call)
    absent = {name for read in reads for name in read.absent}
    attributes = frozenset(vars(block).keys() - MODULE_ATTRIBUTES - {"_fusedres_stale"} | absent)
    calls = merge_calls(*(form.folded.calls for form in forms))
    return Code(
        source, _used(source, names), *(tuple(sorted(group)) for group in (*folded, guests)),
        children=len(block._modules), attributes=attributes, calls=calls, chain=merge_chains(*forms),
    )  # fmt: skip


def check_source(code: Code) -> None:
    """Raise where Python does not take the source of ``code``.

    Raises:
        UntraceableError: a name in the forward collides with one of ours.
    """
    try:
        compile(code.source, "<fusedres>", "exec")
    except SyntaxError as error:
        raise UntraceableError(f"its forward cannot be rewritten: {error.msg}") from error


def _used(source: str, names: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The ``names`` that occur in ``source``, in order."""
    words = set(re.findall(r"\w+", source))
    return tuple(
        (name, _Module(value.__name__) if isinstance(value, types.ModuleType) else value)
        for name, value in sorted(names.items(), key=lambda item: item[0])
        if name in words
    )


def _literal_checks(reads: tuple[Reads, ...]) -> list[str]:
    literals = sorted({item for read in reads for item in read.literals.items()})
    return [f"self.{name} != {literal}" for name, literal in literals]


def _module_checks(folded: list[set[str]], guests: set[str]) -> list[str]:
    changed = f"_is_changed({', '.join(map(_paths, folded))})"
    return [changed, f"_is_open({_paths(guests)})"] if guests else [changed]


def _both_modes(forms: list[Joined], name: str, arguments: str, names: dict[str, Any]) -> tuple[str, str]:
    """A function for each mode and the call of the one that is meant; ``names`` gets what is named in them."""
    training, evaluation = (form.graph.python_code("self") for form in forms)
    for code in (training, evaluation):
        if any(names.setdefault(key, value) is not value for key, value in code.globals.items()):
            raise UntraceableError("forward calls different functions by one name")
    call = f"_training_{name}(self, {arguments})"
    source = training.src.replace("def forward(", f"def _training_{name}(", 1)
    if training.src != evaluation.src:
        call += f" if self.training else _evaluation_{name}(self, {arguments})"
        source += evaluation.src.replace("def forward(", f"def _evaluation_{name}(", 1)
    return source, call


def merge_calls(training: list[Call], evaluation: list[Call]) -> tuple[Call, ...]:
    """The calls of both modes; where they differ, the reason says which mode a row is for."""
    if training == evaluation:
        return tuple(training)
    return tuple(
        replace(call, reason=": ".join(filter(None, (f"in {mode} only", call.reason)))) if call not in other else call
        for mode, calls, other in (("training", training, evaluation), ("evaluation", evaluation, training))
        for call in calls
        if mode == "training" or call not in other
    )


def merge_given(calls: tuple[Call, ...], given: tuple[Call, ...], name: str, others: list[str]) -> tuple[Call, ...]:
    """``calls``; the reasons say what they are where ``name`` is given, and that none of ``others`` may be."""
    patterns = [call.pattern for call in given if call.pattern != "print"]
    patterns = iter(patterns if len(patterns) == sum(call.pattern != "print" for call in calls) else ())
    merged: list[Call] = []
    for call in calls:
        if call.pattern != "print":
            pattern = next(patterns, "bn")
            with_it = f"{pattern} where {name} is given" if pattern != call.pattern else ""
            without = f"unless {' or '.join(others)} is given" if others and call.pattern not in ("bn", "ln") else ""
            call = replace(call, reason="; ".join(filter(None, (call.reason, with_it, without))))
        merged.append(call)
    return tuple(merged)


def install(block: nn.Module, code: Code) -> None:
    """Give ``block`` the rewritten forward.

    Raises:
        TypeError: its class has no subclass that an instance can be turned into.
    """
    block.__class__ = _fused_class(type(block), code)


def is_intact(block: FusedBlock) -> bool:
    """Whether the next call of ``block`` runs the rewritten forward."""
    assert isinstance(block, nn.Module)
    children = dict(block.named_modules(remove_duplicate=False))
    code = block._fusedres_code
    if block._fusedres_stale or any(path not in children for paths in (*code.folded, code.guests) for path in paths):
        return False
    *folded, guests = (tuple(children[path] for path in paths) for paths in (*code.folded, code.guests))
    return len(block._modules) == code.children and not is_changed(*folded) and not is_open(guests)


@functools.cache
def _fused_class(original: type[nn.Module], code: Code) -> type[nn.Module]:
    """One class for all blocks with the same code, so that torch.compile compiles it once."""
    attributes = {
        **disguise(original, _fused_class, original, code),
        "_fusedres_code": code,
        **_compile(original, code),
    }
    fused = types.new_class(original.__name__, (FusedBlock, original), {}, lambda body: body.update(attributes))
    if "_fusedres_operands" in vars(fused):
        fused._fusedres_chained = fused  # pyright: ignore[reportAttributeAccessIssue]
    return fused


def _compile(original: type[nn.Module], code: Code) -> dict[str, Callable[..., Any]]:
    """The methods that the source of ``code`` defines."""
    filename = f"<fusedres {original.__module__}.{original.__qualname__} {next(_serial)}>"
    linecache.cache[filename] = (len(code.source), None, code.source.splitlines(keepends=True), filename)
    names: dict[str, Any] = {
        name: importlib.import_module(value.name) if isinstance(value, _Module) else value for name, value in code.names
    }
    names |= {
        "_len": len,
        "_isinstance": isinstance,
        "_Proxy": fx.Proxy,
        "_original": original.forward if code.given is None else _with_given(original, code.given, names),
        "_is_changed": is_changed,
        "_is_open": is_open,
        "_total": total,
    }
    exec(compile(code.source, filename, "exec"), names)
    forward = names["forward"]
    forward.__module__, forward.__qualname__ = original.__module__, f"{original.__qualname__}.forward"
    forward.__doc__ = original.forward.__doc__
    forward.__signature__ = inspect.signature(original.forward)
    return {name: names[name] for name in ("forward", "_fusedres_operands") if name in names}


def _with_given(original: type[nn.Module], code: Code, names: dict[str, Any]) -> Callable[..., Any]:
    """The original forward; that of ``code`` where its last argument is given, that of ``names`` if it is ``None``."""
    forward = _compile(original, code)["forward"]
    count = forward.__code__.co_argcount - 1  # without self
    last = forward.__code__.co_varnames[count]

    def fall_back(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = (*args, kwargs[last]) if kwargs.keys() == {last} else args
        if len(given) == len(args) + len(kwargs) == count:
            return names["forward"](self, *given[:-1]) if given[-1] is None else forward(self, *given)
        return original.forward(self, *args, **kwargs)

    return fall_back


def _paths(targets: set[str]) -> str:
    return f"({''.join(f'{_path(target)}, ' for target in sorted(targets))})"


def _path(target: str) -> str:
    *parents, name = target.split(".")
    return "self" + "".join(f"._modules[{parent!r}]" for parent in parents) + f"._modules.get({name!r})"


def _is_same(old: Any, new: Any) -> bool:
    return old is new or (type(old) is type(new) and isinstance(old, (bool, int, float, str)) and old == new)
