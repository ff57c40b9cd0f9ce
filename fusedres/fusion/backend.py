"""The patterns of :func:`fusedres.fuse` in the graph that torch.compile captured from a whole model.

Modules are gone there: a BatchNorm is ``num_batches_tracked.add_(1)`` and ``F.batch_norm`` on inputs of the graph. Such
calls are lifted to calls of stand-in modules, so that what folds the patterns of a traced block folds them here, and
lowered to functions of tensors afterwards. These look at shapes and dtypes when the graph is traced on.
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
from fusedres.fusion.rewriting import Call
from fusedres.fusion.runtime import batch_norm, is_plain
from fusedres.nn import BatchNormAct2d

_STAND_INS = {F.batch_norm: BatchNormAct2d, F.linear: nn.Linear, F.layer_norm: nn.LayerNorm}
_PARAMETERS: dict[Any, dict[str, Any]] = {
    F.batch_norm: {
        "input": None, "running_mean": None, "running_var": None, "weight": None, "bias": None, "training": False,
        "momentum": 0.1, "eps": 1e-5,
    },
    F.linear: {"input": None, "weight": None, "bias": None},
    F.layer_norm: {"input": None, "normalized_shape": None, "weight": None, "bias": None, "eps": 1e-5},
}  # fmt: skip
_log = logging.getLogger(__name__)
State = tuple[Any, ...]  # what a function takes after its input


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
    lifted = _Lifted(graph_module)
    calls = match(graph_module, graph, lambda module: None, Options())
    lifted.lower()
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
    boundaries: list[fx.Node] = []
    inside: dict[fx.Node, fx.Node] = {}  # values from earlier contexts, and their names in this one
    here: set[fx.Node] = set()
    start = None
    for node in list(graph.nodes):
        if node.op in ("placeholder", "output"):
            continue
        if node.meta.get("example_value") is None:  # autocast, gradient mode and the like
            start, inside, here = node, {}, set()
        elif start is not None:
            for value in node.all_input_nodes:
                if value in here or value.op in ("placeholder", "get_attr"):
                    continue
                if value not in inside:
                    with graph.inserting_after(start):
                        inside[value] = graph.call_function(boundary, (value,))
                    boundaries.append(inside[value])
                node.replace_input_with(value, inside[value])
        here.add(node)
    return boundaries


class _Lifted:
    """Calls of normalisations and linear maps in a graph, as calls of modules that hold nothing."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.root, self.graph = graph_module, graph_module.graph
        self.values = Values(graph_module, self.graph)
        inputs = [node for node in self.graph.nodes if node.op == "placeholder" and _storage(node) is not None]
        self.sharers = collections.Counter(map(_storage, inputs))
        self.changed = self._changed_storages()
        self.lifted: dict[str, tuple[Any, State]] = {}  # stand-ins: the function, and its state
        norms = self._norm_states()
        for node in list(self.graph.nodes):
            if node in norms:
                self._lift(node, norms[node])
            elif node.target in (F.linear, F.layer_norm) and self._is_layer(node):
                self._lift(node, tuple(_bind(node)[1:]))

    def lower(self) -> None:
        """Call functions again: those of :mod:`fusedres.fusion.runtime` with a state in the place of a module."""
        for node in list(self.graph.nodes):
            if node.target not in self.lifted:
                continue
            function, state = self.lifted[node.target]
            if node.op == "get_attr":
                for user in list(node.users):
                    user.args = tuple(state if arg is node else arg for arg in user.args)
            else:
                arguments = (node.args[0], state) if function is F.batch_norm else (*node.args, *state)
                with self.graph.inserting_before(node):
                    call = self.graph.call_function(
                        batch_norm if function is F.batch_norm else function, arguments, dict(node.kwargs)
                    )
                node.replace_all_uses_with(call)
            self.graph.erase_node(node)
        for name in self.lifted:
            delattr(self.root, name)

    def _lift(self, node: fx.Node, state: State) -> None:
        # Calls that share statistics share a module: the order of its calls is kept.
        name = next((name for name, known in self.lifted.items() if known == (node.target, state)), None)
        if name is None:
            name = f"fusedres_{len(self.lifted)}"
            self.lifted[name] = node.target, state
            self.root.add_module(name, _stand_in(_STAND_INS[node.target]))
        if node.target is F.batch_norm and state[-1] is not None:
            self.graph.erase_node(node.prev)
        with self.graph.inserting_before(node):
            call = self.graph.call_module(name, (_bind(node)[0],))
        call.meta = node.meta
        node.replace_all_uses_with(call)
        self.graph.erase_node(node)

    def _norm_states(self) -> dict[fx.Node, State]:
        """The BatchNorms that can be lifted, each with its state."""
        nodes = [node for node in self.graph.nodes if node.target is F.batch_norm and self._is_norm(*_bind(node))]
        states = {node: (*_bind(node)[1:], self._counter(node)) for node in nodes}
        return {
            node: state
            for node, state in states.items()
            if all(states.get(user) == state for buffer in state[:2] if buffer is not None for user in buffer.users)
        }

    def _is_norm(
        self, input: Any, mean: Any, var: Any, weight: Any, bias: Any, training: Any, momentum: Any, eps: Any
    ) -> bool:
        """Whether a call of F.batch_norm has tensors that the fused functions take, and nobody else changes them."""
        x = input.meta.get("example_value") if isinstance(input, fx.Node) else None
        if not isinstance(x, Tensor) or not is_plain(x) or not x.is_floating_point() or x.dim() < 2:
            return False
        if not isinstance(training, bool) or not isinstance(momentum, float) or not isinstance(eps, float):
            return False
        if (mean is None) != (var is None) or (mean is None and not training):
            return False
        vectors = [vector for vector in (mean, var, weight, bias) if vector is not None]
        return all(
            self._is_kept(vector)
            and (tensor := vector.meta["example_value"]).dim() == 1
            and tensor.dtype in (torch.float32, x.dtype)
            and tensor.device == x.device
            for vector in vectors
        ) and all(self.sharers[_storage(buffer)] == 1 for buffer in (mean, var) if buffer is not None)

    def _counter(self, norm: fx.Node) -> fx.Node | None:
        """The counter that is incremented right before ``norm`` and that nobody reads."""
        if not _is_count(norm.prev) or not _bind(norm)[5]:
            return None
        counter = norm.prev.all_input_nodes[0]
        one = counter.meta["example_value"]
        alone = self.sharers[_storage(counter)] == 1 and all(_is_count(user) for user in counter.users)
        same_device = one.device == _bind(norm)[0].meta["example_value"].device
        return counter if alone and same_device and one.dim() == 0 and not one.is_floating_point() else None

    def _is_layer(self, node: fx.Node) -> bool:
        """Whether a call of F.linear or F.layer_norm has an input and parameters that nobody changes."""
        input, *_ = arguments = _bind(node)
        weight, bias = arguments[1:3] if node.target is F.linear else arguments[2:4]
        if node.target is F.layer_norm:
            shape = arguments[1]
            if not isinstance(shape, (tuple, list)) or len(shape) != 1 or not isinstance(shape[0], int):
                return False
        return isinstance(input, fx.Node) and all(
            self._is_kept(vector) for vector in (weight, bias) if vector is not None
        )

    def _is_kept(self, value: Any) -> bool:
        """Whether it is an input of the graph, a plain tensor, that nothing but its BatchNorm changes."""
        if not isinstance(value, fx.Node) or value.op != "placeholder" or _storage(value) is None:
            return False
        return _storage(value) not in self.changed

    def _changed_storages(self) -> set[int | None]:
        """Of the inputs that may be changed in place, not counting what BatchNorms change."""
        changed: set[int | None] = set()
        for node in self.graph.nodes:
            if node.target is F.batch_norm or _is_count(node) or not self.values.mutates(node):
                continue
            pending, seen = list(node.all_input_nodes), set[fx.Node]()
            while pending:
                value = pending.pop()
                if value in seen:
                    continue
                seen.add(value)
                if value.op == "placeholder":
                    changed.add(_storage(value))
                elif not self.values.is_fresh(value):
                    pending += value.all_input_nodes
        return changed


def _bind(node: fx.Node) -> list[Any]:
    """The arguments of a call of one of the functions that are lifted."""
    parameters = _PARAMETERS[node.target]
    return list((parameters | dict(zip(parameters, node.args, strict=False)) | node.kwargs).values())


def _is_count(node: fx.Node) -> bool:
    """Whether ``node`` increments a counter in front of a BatchNorm."""
    if node.op != "call_method" or node.target != "add_" or node.users or node.kwargs or node.args[1:] != (1,):
        return False
    return node.all_input_nodes[0].op == "placeholder" and node.next.target is F.batch_norm


def _storage(value: fx.Node) -> int | None:
    """What tells the memory of an input from that of others; ``None`` where it is no plain tensor."""
    tensor = value.meta.get("example_value")
    if not isinstance(tensor, Tensor) or not is_plain(tensor) or tensor.layout != torch.strided:
        return None
    return tensor.untyped_storage()._cdata


def _stand_in(kind: type[nn.Module]) -> nn.Module:
    """A module of ``kind`` without tensors."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    if isinstance(module, BatchNormAct2d):
        module.act = None
    return module
