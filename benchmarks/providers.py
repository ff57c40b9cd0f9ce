"""The competitors: the same weights, run by eager PyTorch, by ``torch.compile``, by fusedres, and by its rivals."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fusedres
from benchmarks import rivals
from benchmarks.errors import BenchmarkError
from benchmarks.layers import fused

EAGER, BASELINE = "eager", "eager channels-last"


@dataclass(frozen=True)
class Provider:
    """How a plain model becomes the callable that is measured.

    Args:
        compiles: whether it is ``torch.compile``'s, which takes its time.
        needs_gpu: whether it runs nowhere else.
        by_default: whether it takes part without being named; ``quick``, in quick runs too.
        needs: the module it is made of, where that is an optional one.
        layers: the kinds of layers it has; ``None`` for whole models too.
        whole: whether it is for whole models alone.
        replays: whether its memory belongs to captured graphs, so that a step allocates next to nothing.
    """

    name: str
    channels_last: bool
    prepare: Callable[[nn.Module], Callable[..., Any]]
    compiles: bool = False
    needs_gpu: bool = False
    by_default: bool = True
    quick: bool = True
    needs: str | None = None
    layers: tuple[str, ...] | None = None
    whole: bool = False
    replays: bool = False

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run on ``device``."""
        if self.needs_gpu and device.type != "cuda":
            return "it needs a GPU"
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return f"there is no module named {self.needs!r}"
        return None


@dataclass
class Instance:
    """One provider's own copy of a model: ``call`` runs it, ``module`` holds its parameters."""

    provider: Provider
    module: nn.Module
    call: Callable[..., Any]
    optimizer: torch.optim.Optimizer
    memory_format: torch.memory_format


class Graphed:
    """A module whose calls replay CUDA graphs, captured at the first call of every shape and mode."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.graphs: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *inputs: Tensor) -> Any:
        key = (self.module.training, torch.is_grad_enabled(), *((x.shape, x.dtype, x.requires_grad) for x in inputs))
        if key not in self.graphs:
            capture = self._differentiable if torch.is_grad_enabled() else self._forward
            # Weights that autocast has cached outside of the capture would be stale in its replays.
            with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), False):
                self.graphs[key] = capture(inputs)
        return self.graphs[key](*inputs)

    def _differentiable(self, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
        class Call(nn.Module):  # capturing changes the forward of what it is given
            def __init__(self, module: nn.Module) -> None:
                super().__init__()
                self.module = module

            def forward(self, *inputs: Tensor) -> Any:
                return self.module(*inputs)

        samples = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
        return torch.cuda.make_graphed_callables(Call(self.module), samples)

    def _forward(self, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
        static = [x.clone() for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.module(*static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.module(*static)

        def replay(*inputs: Tensor) -> Any:
            for place, x in zip(static, inputs, strict=True):
                place.copy_(x)
            graph.replay()
            return out

        return replay


def _same(model: nn.Module) -> nn.Module:
    return model


def _compile(model: nn.Module, mode: str | None = None) -> Callable[..., Any]:
    return torch.compile(model, dynamic=False, mode=mode)


def _fuse_and_compile(model: nn.Module) -> Callable[..., Any]:
    return _compile(fused(model))


def _fuse_and_capture(model: nn.Module) -> Callable[..., Any]:
    return Graphed(fused(model))


_NORMS = ("bn", "bn+relu", "bn+add+relu")
PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(EAGER, False, _same),
        Provider(BASELINE, True, _same),
        Provider("torch.compile", True, _compile, compiles=True),
        Provider(
            "torch.compile max-autotune", True, partial(_compile, mode="max-autotune-no-cudagraphs"),
            compiles=True, by_default=False,
        ),
        Provider("fusedres", True, fused),
        Provider("fusedres + recompute", True, partial(fusedres.fuse, save="recompute"), quick=False, whole=True),
        Provider("fusedres + compile", True, _fuse_and_compile, compiles=True, quick=False),
        Provider("fusedres + CUDA graph", True, _fuse_and_capture, needs_gpu=True, replays=True),
        Provider("attorch", False, rivals.attorch, needs_gpu=True, needs="attorch", layers=(*_NORMS, "ln-linear-relu")),
        Provider("cuDNN", True, rivals.cudnn, needs_gpu=True, needs="cudnn", layers=_NORMS),
    )
}  # fmt: skip


def select(names: Sequence[str] | None, device: torch.device, *, quick: bool = False) -> list[Provider]:
    """The providers named; for ``None``, all that take part by default and can run on ``device``.

    Raises:
        BenchmarkError: an unknown name, or one that cannot run there.
    """
    if names is None:
        default = (p for p in PROVIDERS.values() if p.by_default and (p.quick or not quick))
        return [p for p in default if p.unavailable(device) is None]
    for name in names:
        if name not in PROVIDERS:
            raise BenchmarkError(f"unknown provider {name!r}; choose from {', '.join(PROVIDERS)}")
        if reason := PROVIDERS[name].unavailable(device):
            raise BenchmarkError(f"provider {name!r} cannot run on {device.type}: {reason}")
    return [p for p in PROVIDERS.values() if p.name in names]


def instantiate(provider: Provider, model: nn.Module, device: torch.device, *, channels_last: bool = True) -> Instance:
    """A deep copy of ``model`` on ``device``, prepared by ``provider``, with its own optimizer.

    Args:
        channels_last: whether the model has a use for that format, so that a provider that prefers it gets it.
    """
    module = copy.deepcopy(model).to(device)
    memory_format = torch.contiguous_format
    if channels_last and provider.channels_last:
        memory_format = torch.channels_last
        module = module.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    call = provider.prepare(module)
    holder: Any = call.module if isinstance(call, Graphed) else getattr(call, "_orig_mod", call)
    optimizer = torch.optim.SGD(holder.parameters(), lr=0.01, momentum=0.9)
    return Instance(provider, holder, call, optimizer, memory_format)
