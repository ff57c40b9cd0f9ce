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
            if not _same(value, saved):
                changed = name
                value.clear()
                value.extend(saved) if isinstance(value, (list, deque)) else value.update(saved)
        now = {name: value for name, value in self.names.items() if not name.startswith("__")}
        if isinstance(self.names, dict) and not _same(now, self.before):
            changed = next((name for name in now if now[name] is not self.before.get(name, self)), "by deletion")
            for name in now.keys() - self.before.keys():
                del self.names[name]
            self.names.update(self.before)
        return changed


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        one, other = [*one.keys(), *one.values()], [*other.keys(), *other.values()]
    return len(one) == len(other) and all(map(operator.is_, one, other))


class RandomState:
    """The random states of Python, of PyTorch on the CPU and, where it is imported, of NumPy."""

    def __init__(self) -> None:
        numpy: Any = getattr(sys.modules.get("numpy"), "random", random)
        self.before = random.getstate(), torch.get_rng_state().tolist(), getattr(numpy, "get_state", random.getstate)()
        self.set_numpy = getattr(numpy, "set_state", random.setstate)

    def restore(self) -> bool:
        """Put all back; whether one had changed."""
        changed = pickle.dumps(RandomState().before) != pickle.dumps(self.before)
        if changed:
            self.set_numpy(self.before[2])
            random.setstate(self.before[0])
            torch.set_rng_state(torch.tensor(self.before[1], dtype=torch.uint8))
        return changed


class Output(io.StringIO):
    """In place of the standard output: what this thread writes; that of others goes on to where it went."""

    def __init__(self) -> None:
        super().__init__()
        self.thread, self.before = threading.get_ident(), sys.stdout

    def write(self, text: str) -> int:
        return super().write(text) if threading.get_ident() == self.thread else self.before.write(text)
