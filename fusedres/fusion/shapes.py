"""The sizes that the normalisations of a model see, from one forward over fake tensors: nothing is computed."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.overrides import TorchFunctionMode

from fusedres.fusion.refusals import OWN_BLOCKS, original_classes
from fusedres.fusion.runtime import is_plain
from fusedres.fusion.state import Output, RandomState, State, one_at_a_time

Input: TypeAlias = "Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]"


@dataclass
class Seen:
    """One call of a normalisation: shape, elements and dtype of its input, elements across the Linear beside.

    ``in_front`` is the size of the input of a Linear whose output is normalised, ``behind`` that of the output of one
    that reads the normalised tensor.
    """

    shape: torch.Size
    elements: int
    dtype: torch.dtype
    in_front: int | None = None
    behind: int | None = None


# The calls of each normalisation, or of the module that calls it where it is a function, in their order.
Sizes: TypeAlias = "dict[nn.Module, list[Seen]]"


def measure(model: nn.Module, input: Input) -> tuple[Sizes, str]:
    """Follow ``model(input)`` in the model's own mode; parameters, buffers, hooks and random states stay as they are.

    Hooks are not run, and attributes that the forward sets are put back, as are the items of its own containers.

    Returns:
        The sizes, and why the forward was not followed to its end, if so.

    Raises:
        TypeError: ``input`` is neither a shape, a tensor, nor a tuple or dict of them.
        Exception: what the forward raises for such an input.
    """
    while isinstance(model, (DataParallel, DistributedDataParallel)):
        model = model.module
    recorder, stopped = _Recorder(), ""
    with one_at_a_time, contextlib.ExitStack() as stack:
        stack.callback(RandomState().restore)
        stack.enter_context(original_classes(model))
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        stack.enter_context(_replaced(model, mode, recorder))
        stack.enter_context(contextlib.redirect_stdout(Output()))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # of what is compiled already
        stack.enter_context(torch.set_grad_enabled(model.training))
        stack.enter_context(mode)
        args, kwargs = _arguments(model, input)
        try:
            with recorder:
                model(*args, **kwargs)
        except RuntimeError as error:
            if type(error).__module__ != FakeTensorMode.__module__:  # not of what fake tensors cannot tell
                raise
            stopped = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return recorder.sizes, stopped


def _arguments(model: nn.Module, input: Input) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tensors of the given sizes, made in the mode that is on; a shape is of the model's dtype and device."""
    tensors = (tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point())
    like = next(tensors, torch.empty(0))

    def is_shape(value: Any) -> bool:
        return isinstance(value, (tuple, list)) and bool(value) and all(type(size) is int for size in value)

    def fake(value: Any) -> Any:
        if isinstance(value, Tensor):
            device = like.device if value.is_meta else value.device
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return torch.empty(tuple(value), dtype=like.dtype, device=like.device) if is_shape(value) else value

    if isinstance(input, Mapping):
        return (), {name: fake(value) for name, value in input.items()}
    given = [input] if isinstance(input, Tensor) or is_shape(input) else input
    if not isinstance(given, (tuple, list)):
        raise TypeError(f"input must be a shape, a tensor, or a tuple or dict of them, got {type(input).__name__}")
    return tuple(map(fake, given)), {}


@contextlib.contextmanager
def _replaced(model: nn.Module, mode: FakeTensorMode, recorder: _Recorder) -> Iterator[None]:
    """Fake parameters and buffers, and calls that go to the recorder, past hooks and compiled code."""
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    states = [State(module) for module in modules]
    try:
        for module in modules:
            attributes = vars(module)
            for kind in ("_parameters", "_buffers"):
                attributes[kind] = {name: _fake(mode, tensor) for name, tensor in attributes[kind].items()}
            attributes["_compiled_call_impl"] = functools.partial(recorder.call, module)
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
    """Notes calls of BatchNorms as modules, those of LayerNorm and Linear as functions, which modules call too."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Sizes = defaultdict(list)
        self.caller: nn.Module | None = None

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of ``module``."""
        outer, self.caller = self.caller, module
        if isinstance(module, _BatchNorm):
            self._add(module, next(iter((*args, *kwargs.values()))))
        output = module.forward(*args, **kwargs)
        if type(module) in OWN_BLOCKS:  # its functions may be operators of ours
            input = next(iter((*args, *kwargs.values())))
            seen = self._add(module.norm, input if module.norm_first else output)  # pyright: ignore
            seen.in_front, seen.behind = input.numel(), output.numel()
        self.caller = outer
        return output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in (F.layer_norm, F.linear) and self.caller is not None:
            input = args[0] if args else kwargs["input"]
            if func is F.layer_norm:
                output.seen = self._add(self.caller, input)
                output.seen.in_front = getattr(input, "multiplied", None)
            else:
                output.multiplied = input.numel()
                if hasattr(input, "seen"):
                    input.seen.behind = output.numel()
        return output

    def _add(self, module: nn.Module, input: Tensor) -> Seen:
        seen = Seen(input.shape, input.numel(), input.dtype)
        self.sizes[module].append(seen)
        return seen
