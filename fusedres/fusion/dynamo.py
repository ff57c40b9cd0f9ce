"""The patterns of :func:`fusedres.fuse` in the graph that torch.compile captured from a whole model.

Modules are gone there: a BatchNorm is ``num_batches_tracked.add_(1)`` and ``F.batch_norm`` on inputs of the graph. Such
calls are lifted to calls of stand-in modules, so that the one matcher finds the patterns, and lowered to functions of
tensors afterwards. These look at shapes and dtypes when the graph is traced on.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fusedres.fusion.aliasing import Values
from fusedres.fusion.matching import match
from fusedres.fusion.options import Options
from fusedres.fusion.rewriting import Call, bind
from fusedres.fusion.runtime import is_plain, norm_act
from fusedres.nn import BatchNormAct2d

# What stands for a call while patterns are looked for; it holds nothing of the model.
_STAND_INS: dict[Any, Callable[[], nn.Module]] = {
    F.batch_norm: lambda: BatchNormAct2d(1, act=None),
    F.linear: lambda: nn.Linear(1, 1),
    F.layer_norm: lambda: nn.LayerNorm(1),
}
_log = logging.getLogger(__name__)
Layer = tuple[Any, ...]  # a function, and what it takes after its input; of F.batch_norm also the counter


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


def fuse_captured(graph_module: fx.GraphModule) -> list[Call]:
    """Fold the patterns of a graph that torch.compile captured, in place; what is not recognised stays.

    Returns:
        A row for each normalisation that was looked at, as in :func:`fusedres.explain`, named by position.
    """
    graph = graph_module.graph
    boundaries = _separate(graph)
    layers = _lift(graph_module)
    calls = match(graph_module, graph, lambda module: None, Options())
    _lower(graph_module, layers)
    for node in boundaries:
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.erase_node(node)
    graph.lint()
    graph_module.recompile()
    return calls


def boundary(value: Any) -> Any:
    """``value``, behind a change of context; no pattern reaches across."""
    return value


def _separate(graph: fx.Graph) -> list[fx.Node]:
    """Put a :func:`boundary` wherever a value is read in another context than it was computed in."""
    start = None  # of the context: of autocast, gradient mode and the like
    contexts: dict[fx.Node, fx.Node | None] = {}
    boundaries: dict[tuple[fx.Node, fx.Node | None], fx.Node] = {}
    for node in [node for node in graph.nodes if node.op.startswith("call_")]:
        if node.meta.get("example_value") is None:
            start = node
        contexts[node] = start
        for value in node.all_input_nodes:
            if contexts.get(value, start) is start:
                continue
            if (value, start) not in boundaries:
                with graph.inserting_after(start):
                    boundaries[value, start] = graph.call_function(boundary, (value,))
            node.replace_input_with(value, boundaries[value, start])
    return list(boundaries.values())


def _lift(root: fx.GraphModule) -> dict[str, Layer]:
    """Call stand-in modules in place of functions; the names of the modules, and what each stands for."""
    kept = _kept(root)
    layers = {node: _layer(node, kept) for node in root.graph.nodes if node.target in _STAND_INS}
    names: dict[Layer, str] = {}
    for node, layer in layers.items():
        if layer is None:
            continue
        is_norm = node.target is F.batch_norm
        statistics = [buffer for buffer in layer[1:3] if buffer is not None] if is_norm else []
        if any(layers.get(user) != layer for buffer in statistics for user in buffer.users):
            continue
        if layer not in names:  # calls that share statistics share a module: their order is kept
            names[layer] = f"fusedres_{len(names)}"
            root.add_module(names[layer], _STAND_INS[node.target]())
        if is_norm and layer[-1] is not None:
            root.graph.erase_node(node.prev)
        with root.graph.inserting_before(node):
            call = root.graph.call_module(names[layer], (bind(node)["input"],))
        node.replace_all_uses_with(call, propagate_meta=True)
        root.graph.erase_node(node)
    return {name: layer for layer, name in names.items()}


def _kept(root: fx.GraphModule) -> set[fx.Node]:
    """The inputs that are plain tensors of their own and that nothing but a BatchNorm changes."""
    values, nodes = Values(root, root.graph), root.graph.nodes
    inputs = {node: x for node in nodes if node.op == "placeholder" and (x := _tensor(node)) is not None}
    sharers = collections.Counter(tensor.untyped_storage()._cdata for tensor in inputs.values())
    changing = [n for n in nodes if n.target is not F.batch_norm and not _is_count(n) and values.mutates(n)]
    changed = {source for node in changing for value in node.all_input_nodes for source in values.sources(value)}
    return {node for node, tensor in inputs.items() if sharers[tensor.untyped_storage()._cdata] == 1} - changed


def _layer(node: fx.Node, kept: set[fx.Node]) -> Layer | None:
    """What ``node`` calls, where the fused functions take what it is given and nobody else changes its tensors."""
    given = bind(node)
    input, *rest = given.values()
    names = ("running_mean", "running_var", "weight", "bias")
    tensors = [given[name] for name in names if given.get(name) is not None]
    if _tensor(input) is None or not kept.issuperset(tensors):
        return None
    if node.target is not F.batch_norm:
        shape = given.get("normalized_shape", (0,))
        of_rows = isinstance(shape, (tuple, list)) and [type(size) for size in shape] == [int]
        return (node.target, *rest) if of_rows else None
    mean, var, _, _, training, momentum, eps = rest
    vectors = all(tensor.meta["example_value"].dim() == 1 for tensor in tensors)
    if (
        not vectors
        or (mean is None) != (var is None)
        or [*map(type, (training, momentum, eps))] != [bool, float, float]
    ):
        return None
    return (node.target, *rest, _counter(node, kept) if training else None)


def _counter(norm: fx.Node, kept: set[fx.Node]) -> fx.Node | None:
    """The counter that is incremented right before ``norm`` and that nobody reads."""
    counter = norm.prev.all_input_nodes[0] if _is_count(norm.prev) else None
    if counter not in kept or not all(map(_is_count, counter.users)):
        return None
    count, output = (node.meta["example_value"] for node in (counter, norm))
    return counter if count.dim() == 0 and count.dtype == torch.long and count.device == output.device else None


def _is_count(node: fx.Node) -> bool:
    """Whether ``node`` increments a counter in front of a BatchNorm."""
    if node.op != "call_method" or node.target != "add_" or node.users or node.kwargs or node.args[1:] != (1,):
        return False
    return node.all_input_nodes[0].op == "placeholder" and node.next.target is F.batch_norm


def _tensor(value: Any) -> Tensor | None:
    """What ``value`` was when it was traced, if an ordinary tensor."""
    tensor = value.meta.get("example_value") if isinstance(value, fx.Node) else None
    plain = isinstance(tensor, Tensor) and is_plain(tensor) and tensor.layout == torch.strided
    return tensor if plain else None


def _lower(root: fx.GraphModule, layers: dict[str, Layer]) -> None:
    """Give functions of :mod:`fusedres.fusion.runtime` tensors in the place of a module, and call them directly."""
    for node in [node for node in root.graph.nodes if node.target in layers]:
        function, *state = layers[node.target]
        if node.op == "get_attr":
            for user in list(node.users):
                user.args = tuple(tuple(state) if arg is node else arg for arg in user.args)
        else:
            is_norm = function is F.batch_norm
            arguments = (tuple(state), *node.args, None, None) if is_norm else (*node.args, *state)
            with root.graph.inserting_before(node):
                node.replace_all_uses_with(root.graph.call_function(norm_act if is_norm else function, arguments))
        root.graph.erase_node(node)
    for name in layers:
        root.delete_submodule(name)
