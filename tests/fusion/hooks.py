"""Hooks of every kind that users put on modules, and what they saw."""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Log:
    """What hooks saw, by hook, and tensors that retain their gradients."""

    seen: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    kept: list[Tensor] = field(default_factory=list)

    def note(self, name: str, *values: Tensor | None) -> None:
        self.seen[name] += [torch.zeros(0) if value is None else value.detach().clone() for value in values]


def _forward(module: nn.Module, log: Log) -> None:
    module.register_forward_hook(lambda _, args, out: log.note("forward", *args, out))


def _forward_changing(module: nn.Module, log: Log) -> None:
    module.register_forward_hook(lambda _, args, out: torch.mul(out, 1.5))  # pyright: ignore[reportArgumentType]


def _forward_kwargs(module: nn.Module, log: Log) -> None:
    hook = lambda _, args, kwargs, out: log.note("kwargs", *args, *kwargs.values(), out)  # noqa: E731
    module.register_forward_hook(hook, with_kwargs=True)


def _pre(module: nn.Module, log: Log) -> None:
    module.register_forward_pre_hook(lambda _, args: log.note("pre", *args))


def _pre_changing(module: nn.Module, log: Log) -> None:
    module.register_forward_pre_hook(lambda _, args, kwargs: ((args[0] * 1.5,), kwargs), with_kwargs=True)


def _backward(module: nn.Module, log: Log) -> None:
    module.register_full_backward_hook(lambda _, grads, outputs: log.note("backward", *grads, *outputs))


def _backward_changing(module: nn.Module, log: Log) -> None:
    module.register_full_backward_hook(lambda _, grads, outputs: tuple(grad * 1.5 for grad in grads))


def _backward_pre(module: nn.Module, log: Log) -> None:
    module.register_full_backward_pre_hook(lambda _, outputs: log.note("backward pre", *outputs))


def _tensor(module: nn.Module, log: Log) -> None:
    def watch(_: nn.Module, args: Any, out: Tensor) -> None:
        for name, value in (("input", args[0]), ("output", out)):
            value.register_hook(functools.partial(log.note, name))

    module.register_forward_hook(watch)


def _retain(module: nn.Module, log: Log) -> None:
    def watch(_: nn.Module, args: Any, out: Tensor) -> None:
        for value in (args[0], out):
            value.retain_grad()
            log.kept.append(value)

    module.register_forward_hook(watch)


# By kind: how it is put on a module, and what would be wrong if it were not honoured.
HOOKS = {
    "forward": (_forward, "the values that a folded module would have had"),
    "forward, changing": (_forward_changing, "what the hook returns is used"),
    "forward with kwargs": (_forward_kwargs, "keywords are told as they were given"),
    "forward pre": (_pre, "the input of a folded module"),
    "forward pre, changing": (_pre_changing, "the input that the hook returns is used"),
    "full backward": (_backward, "gradients on both sides"),
    "full backward, changing": (_backward_changing, "the gradient that the hook returns goes on"),
    "full backward pre": (_backward_pre, "the whole gradient of an output that two parts read"),
    "tensor hook": (_tensor, "a hook of autograd's sees the whole gradient, not one part of a fork"),
    "retain_grad": (_retain, "so does a gradient that is kept"),
}
