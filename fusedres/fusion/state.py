"""What a forward could change while it is traced, and how to put it back."""

from __future__ import annotations

import copy
import io
import operator
import pickle
import random
import sys
import threading
from collections import OrderedDict, defaultdict, deque
from typing import Any

import torch

one_at_a_time = threading.RLock()  # to patch what all threads share
_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)


class State:
    """The names in a module, a class or a dict of globals, and one level of the containers among their values."""

    def __init__(self, owner: Any) -> None:
        self.names = owner if isinstance(owner, dict) else vars(owner)
        self.before = {name: value for name, value in self.names.items() if not name.startswith("__")}
        containers = [(name, value) for name, value in self.before.items() if type(value) in _CONTAINERS]
        self.containers = [(name, value, copy.copy(value)) for name, value in containers]

    def restore(self) -> str | None:
        """Put everything back, but for the names in a class; one of what had changed."""
        changed = None
        for name, value, saved in self.containers:
            if not _same(_items(value), _items(saved)):
                changed = name
                value.clear()
                value.extend(saved) if isinstance(value, (list, deque)) else value.update(saved)
        if isinstance(self.names, dict) and not _same(_items(self.names), _items(self.before)):
            for name in [name for name in self.names.keys() | self.before.keys() if not name.startswith("__")]:
                if self.names.get(name, self) is not self.before.get(name, self):
                    changed = name
                    self.names.pop(name, None)
            self.names.update(self.before)
        return changed


def _items(value: Any) -> list[Any]:
    return [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)


def _same(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(map(operator.is_, now, before))


class RandomState:
    """The random states of Python, of PyTorch on the CPU and, where it is imported, of NumPy."""

    def __init__(self) -> None:
        self.accesses: list[tuple[Any, Any]] = [(random.getstate, random.setstate), (_torch_state, _set_torch_state)]
        numpy: Any = getattr(sys.modules.get("numpy"), "random", None)
        if numpy is not None:
            self.accesses.append((numpy.get_state, numpy.set_state))
        self.states = [get() for get, _ in self.accesses]

    def restore(self) -> bool:
        """Put all back; whether one had changed."""
        changed = False
        for (get, put), state in zip(self.accesses, self.states, strict=True):
            if pickle.dumps(get()) != pickle.dumps(state):
                put(state)
                changed = True
        return changed


def _torch_state() -> list[int]:
    return torch.get_rng_state().tolist()


def _set_torch_state(state: list[int]) -> None:
    torch.set_rng_state(torch.tensor(state, dtype=torch.uint8))


class Output(io.StringIO):
    """In place of the standard output: what this thread writes; that of others goes on to where it went."""

    def __init__(self) -> None:
        super().__init__()
        self.thread, self.before = threading.get_ident(), sys.stdout

    def write(self, text: str) -> int:
        return super().write(text) if threading.get_ident() == self.thread else self.before.write(text)
