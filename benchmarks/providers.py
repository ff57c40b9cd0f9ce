"""The competitors: the same weights, run by eager PyTorch, by ``torch.compile`` and by fusedres."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fusedres
from benchmarks.errors import BenchmarkError

EAGER, BASELINE = "eager", "eager channels-last"


@dataclass(frozen=True)
class Provider:
    """How a plain model becomes the callable that is measured."""

    name: str
    channels_last: bool
    prepare: Callable[[nn.Module], Callable[..., Any]]


@dataclass
class Instance:
    """One provider's own copy of a model: ``call`` runs it, ``module`` holds its parameters."""

    provider: Provider
    module: nn.Module
    call: Callable[..., Any]
    optimizer: torch.optim.Optimizer
    memory_format: torch.memory_format


def _same(model: nn.Module) -> nn.Module:
    return model


def _compile(model: nn.Module) -> Callable[..., Any]:
    return torch.compile(model, dynamic=False)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(EAGER, False, _same),
        Provider(BASELINE, True, _same),
        Provider("torch.compile", True, _compile),
        Provider("fusedres", True, fusedres.fuse),
    )
}


def select(names: list[str] | None) -> list[Provider]:
    """The providers named; all of them for ``None``.

    Raises:
        BenchmarkError: an unknown name.
    """
    for name in names or []:
        if name not in PROVIDERS:
            raise BenchmarkError(f"unknown provider {name!r}; choose from {', '.join(PROVIDERS)}")
    return [p for p in PROVIDERS.values() if names is None or p.name in names]


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
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    return Instance(provider, module, call, optimizer, memory_format)
