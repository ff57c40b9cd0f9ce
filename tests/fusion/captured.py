"""How tests look at what the torch.compile backend did."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fusedres.fusion.dynamo import fuse_captured


class Recorder:
    """A backend that fuses like ``"fusedres"``, notes what it found in each graph and stops at ``stop``."""

    def __init__(self, stop: str = "eager") -> None:
        self.stop = stop
        self.graphs: list[dict[str, int]] = []

    def __call__(self, graph_module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        calls = fuse_captured(graph_module)
        self.graphs.append(dict(collections.Counter(call.pattern for call in calls)))
        return torch._dynamo.lookup_backend(self.stop)(graph_module, example_inputs)
