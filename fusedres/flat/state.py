"""What a forward could change while it is traced, and how to put it back."""

from __future__ import annotations

import copy
import io
import pickle
import random
import sys
import threading
from collections import deque
from typing import Any

from torch import nn

one_at_a_time = threading.RLock()  # to patch what all threads share


class State:
    """The attributes of a module, and one level of the containers among them."""

    def __init__(self, owner: nn.Module | type) -> None:
        self.owner = owner
        self.attributes = dict(vars(owner))
        self.containers = [
            (name, value, copy.copy(value))
            for name, value in self.attributes.items()
            if isinstance(value, (dict, list, set, deque))
        ]

    def restore(self) -> str | None:
        """Put everything back; the name of something that had changed."""
        now, changed = vars(self.owner), None
        for name in now.keys() | self.attributes.keys():
            if name not in now or name not in self.attributes or now[name] is not self.attributes[name]:
                changed = name
        if changed is not None:
            self._put_back()
        for name, value, saved in self.containers:
            if not _same_items(value, saved):
                changed = name
                value.clear()
                value.extend(saved) if isinstance(value, (list, deque)) else value.update(saved)
        return changed

    def _put_back(self) -> None:
        vars(self.owner).clear()
        vars(self.owner).update(self.attributes)


def _same_items(one: Any, other: Any) -> bool:
    if isinstance(one, set):
        return one == other
    if isinstance(one, dict):
        one, other = [*one.keys(), *one.values()], [*other.keys(), *other.values()]
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


class ClassState(State):
    """The same for a class."""

    def __init__(self, owner: type) -> None:
        super().__init__(owner)

    def _put_back(self) -> None:
        for name in vars(self.owner).keys() - self.attributes.keys():
            delattr(self.owner, name)
        for name, value in self.attributes.items():
            if vars(self.owner).get(name) is not value:
                setattr(self.owner, name, value)


class RandomState:
    """The random states of Python and, where it is imported, of NumPy."""

    def __init__(self) -> None:
        self.numpy: Any = getattr(sys.modules.get("numpy"), "random", None)
        self.python_state = random.getstate()
        self.numpy_state = self.numpy.get_state() if self.numpy is not None else None

    def restore(self) -> bool:
        """Put both back; whether one had changed."""
        now = RandomState()
        changed = now.python_state != self.python_state
        random.setstate(self.python_state)
        if self.numpy_state is not None and pickle.dumps(now.numpy_state) != pickle.dumps(self.numpy_state):
            self.numpy.set_state(self.numpy_state)
            changed = True
        return changed


class Output(io.StringIO):
    """In place of the standard output: what this thread writes; that of others goes on to where it went."""

    def __init__(self) -> None:
        super().__init__()
        self.thread, self.before = threading.get_ident(), sys.stdout

    def write(self, text: str) -> int:
        return super().write(text) if threading.get_ident() == self.thread else self.before.write(text)
