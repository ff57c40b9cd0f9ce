"""The sizes that the normalisations of a model see, from one forward over fake tensors: nothing is computed."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedMutationAliasingException,
    UnsupportedOperatorException,
)
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.overrides import TorchFunctionMode

from fusedres.fusion.refusals import OWN_BLOCKS, original_classes
from fusedres.fusion.runtime import is_plain
from fusedres.fusion.state import Output, RandomState, State, one_at_a_time

Input: TypeAlias = "Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]"
_UNKNOWABLE = (
    DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException,
    UnsupportedMutationAliasingException, UnsupportedOperatorException,
)  # fmt: skip
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


@dataclass
class Seen:
    """One call of a normalisation: shape and dtype of its input, elements across the Linear beside.

    ``in_front`` is the size of the input of a Linear whose output is normalised, ``behind`` that of the output of one
    that reads the normalised tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    in_front: int | None = None
    behind: int | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def features(self) -> int:
        return self.shape[-1]


@dataclass
class Sizes:
    """The calls of each normalisation, or of the module that calls it where it is a function, in their order.

    ``stopped`` is why the forward was not followed to its end.
    """

    calls: dict[nn.Module, list[Seen]] = field(default_factory=lambda: defaultdict(list))
    stopped: str = ""


def measure(model: nn.Module, input: Input) -> Sizes:
    """Follow ``model(input)`` in the model's own mode; parameters, buffers, hooks and random states stay as they are.

    Hooks are not run, and attributes that the forward sets are put back, as are the items of its own containers.

    Raises:
        TypeError: ``input`` is neither a shape, a tensor, nor a tuple or dict of them.
        Exception: what the forward raises for such an input.
    """
    while isinstance(model, (DataParallel, DistributedDataParallel)):
        model = model.module
    mode, sizes = FakeTensorMode(allow_non_fake_inputs=True), Sizes()
    recorder = _Recorder(sizes)
    with one_at_a_time, contextlib.ExitStack() as stack:
        stack.callback(RandomState().restore)
        stack.enter_context(original_classes(model))
        stack.enter_context(_replaced(model, mode, recorder))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(contextlib.redirect_stdout(Output()))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # of what is compiled already
        stack.enter_context(torch.set_grad_enabled(model.training))
        stack.enter_context(mode)
        args, kwargs = _arguments(model, input)
        try:
            with recorder:
                model(*args, **kwargs)
        except _UNKNOWABLE as error:
            first_line = (str(error).strip().splitlines() or [""])[0]
            sizes.stopped = f"{type(error).__name__}: {first_line}"
    return sizes


def _arguments(model: nn.Module, input: Input) -> tuple[tuple[Any, ...], dict[str, Any]]:
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    like = tensors[0] if tensors else torch.empty(0)

    def fake(value: Any) -> Any:
        if isinstance(value, Tensor):
            device = like.device if value.is_meta else value.device
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return torch.empty(tuple(value), dtype=like.dtype, device=like.device) if _is_shape(value) else value

    if isinstance(input, Mapping):
        return (), {name: fake(value) for name, value in input.items()}
    if isinstance(input, Tensor) or _is_shape(input):
        return (fake(input),), {}
    if isinstance(input, (tuple, list)):
        return tuple(fake(value) for value in input), {}
    raise TypeError(f"input must be a shape, a tensor, or a tuple or dict of them, got {type(input).__name__}")


def _is_shape(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and bool(value) and all(type(size) is int for size in value)


@contextlib.contextmanager
def _replaced(model: nn.Module, mode: FakeTensorMode, recorder: _Recorder) -> Iterator[None]:
    """Fake parameters and buffers, and the recorder's hooks instead of the modules' own."""
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    states = [State(module) for module in modules]
    try:
        for module in modules:
            attributes = vars(module)
            for kind in ("_parameters", "_buffers"):
                attributes[kind] = {name: _fake(mode, tensor) for name, tensor in attributes[kind].items()}
            attributes.update((name, OrderedDict()) for name in _HOOKS)
            attributes["_forward_pre_hooks"][0] = recorder.enter
            attributes["_forward_hooks"][0] = recorder.leave
        yield
    finally:
        for state in states:
            state.restore()


def _fake(mode: FakeTensorMode, tensor: Tensor | None) -> Tensor | None:
    if tensor is None or nn.parameter.is_lazy(tensor):
        return tensor
    if is_plain(tensor):
        return mode.from_tensor(tensor)
    with mode:  # sharded, quantized or the like: as the whole tensor that it stands for
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


class _Recorder(TorchFunctionMode):
    """Notes calls of BatchNorms by hooks, those of LayerNorm and Linear as functions, which modules call too."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.running: list[nn.Module] = []
        self.normalised: dict[int, Seen] = {}
        self.products: dict[int, int] = {}
        self.alive: list[Tensor] = []  # so that no id is used twice

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before ``module`` runs."""
        if isinstance(module, _BatchNorm) and args:
            self._add(module, args[0])
        self.running.append(module)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After ``module`` has run."""
        self.running.pop()
        if type(module) in OWN_BLOCKS and args:  # its functions may be operators of ours
            first = module.norm_first
            seen = self._add(module.norm, args[0] if first else output)  # pyright: ignore[reportArgumentType]
            seen.in_front, seen.behind = (None, output.numel()) if first else (args[0].numel(), None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in (F.layer_norm, F.linear) and self.running:
            input = args[0] if args else kwargs["input"]
            self.alive += [input, output]
            if func is F.linear:
                self.products[id(output)] = input.numel()
                if id(input) in self.normalised:
                    self.normalised[id(input)].behind = output.numel()
            else:
                seen = self.normalised[id(output)] = self._add(self.running[-1], input)
                seen.in_front = self.products.get(id(input))
        return output

    def _add(self, key: nn.Module, input: Tensor) -> Seen:
        seen = Seen(tuple(input.shape), input.dtype)
        self.sizes.calls[key].append(seen)
        return seen
