"""``torch.compile(model, backend="fusedres")``."""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fusedres.fusion.captured import fuse_captured

_log = logging.getLogger(__name__)


def compile_fused(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Fold the patterns of :func:`fusedres.fuse` in a captured graph and hand it on, usually to Inductor.

    For models that ``fuse`` need not change: the same patterns are found in the graph, whatever the forwards look
    like. Found by torch.compile under the name ``"fusedres"``, by the entry point ``torch_dynamo_backends``.

    Args:
        graph_module, example_inputs: given by torch.compile.
        mode: as of torch.compile, such as ``"reduce-overhead"``.
        options: those of Inductor, and ``"stop"``: the backend to hand the graph to instead, such as ``"eager"`` or
            ``"aot_eager"``, which takes neither mode nor options.

    Raises:
        RuntimeError: a mode or an option that Inductor does not know, or one of another type.
        ValueError: ``stop`` together with a mode or other options.
    """
    calls = fuse_captured(graph_module)
    _log.debug("%s", dict(collections.Counter(call.pattern for call in calls)))
    config = dict(options or {})
    stop = config.pop("stop", None)
    if stop is not None:
        if mode is not None or config:
            raise ValueError(f"stop={stop!r} takes no mode and no other options, got mode={mode!r} and {config}")
        return torch._dynamo.lookup_backend(stop)(graph_module, list(example_inputs))
    # What torch.compile itself calls: it checks modes and options, and prepares for CUDA graphs.
    inductor: Any = torch._TorchCompileInductorWrapper(mode, config, None)
    return inductor(graph_module, list(example_inputs))
