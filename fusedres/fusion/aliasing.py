"""What may be assumed of the nodes of a traced graph: who reads them, what they may share, what changes them."""

from __future__ import annotations

import builtins
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fusedres.fusion.foreign import computes_one_norm, is_timms
from fusedres.fusion.runtime import linear_shape, norm_and_linear
from fusedres.fusion.watching import is_hooked, is_standard
from fusedres.nn import OWN_NORMS

IN_PLACE_OPERATORS = {
    name: getattr(operator, f"i{name}")
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul")
}
IN_PLACE_ADDITIONS = {operator.iadd, "add_", "__iadd__"}
_ADDITIONS = {*IN_PLACE_ADDITIONS, operator.add, torch.add, "add", "__add__"}
_OUTSIDE = object()  # the storage of inputs, parameters and buffers, which may overlap
_OWN_FUNCTIONS = {norm_and_linear, linear_shape}
# PyTorch's functions and methods, and Python's operators, that make a new tensor; and those that give one tensor.
_FRESH = {
    "add", "sub", "mul", "div", "truediv", "relu", "sigmoid", "gelu", "softmax", "mean", "clone", "cat", "linear",
    "layer_norm", "batch_norm", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "avg_pool2d", "adaptive_avg_pool2d",
}  # fmt: skip
_ONE_TENSOR = {
    *_FRESH, "view", "reshape", "flatten", "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "expand_as",
    "float", "to", "type_as", "add_", "mul_", "relu_", "relu6", "silu", "hardswish", "hardsigmoid", "dropout",
    "max_pool2d", "interpolate", "pad",
}  # fmt: skip
_FRESH_MODULES = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d, *OWN_NORMS, nn.LayerNorm,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Sigmoid, nn.GELU,
)  # fmt: skip
_ONE_TENSOR_MODULES = tuple(
    f"torch.nn.modules.{name}"
    for name in ("conv", "batchnorm", "linear", "activation", "dropout", "pooling", "normalization", "padding",
                 "upsampling", "flatten", "pixelshuffle", "instancenorm")
)  # fmt: skip
_RANDOM = ("rand", "dropout", "bernoulli", "multinomial", "normal", "poisson", "exponential")
_HARMLESS_ATTRIBUTES = ("dtype", "layout", "is_cuda", "requires_grad")
_METADATA_METHODS = {"size", "dim", "numel", "ndimension"}
_METADATA = {"shape", "ndim", "device"}
print_function = builtins.print


class Values:
    """Answers about the nodes of ``graph``, which calls children of ``block``. The graph may change in between."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.graph = graph
        self.modules = dict(root.named_modules(remove_duplicate=False))

    def module(self, node: fx.Node) -> nn.Module | None:
        """The child that ``node`` calls, if it does."""
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that read more of ``node`` than its shape."""
        return [user for user in node.users if not self.reads_metadata(user)]

    def reads_metadata(self, node: fx.Node) -> bool:
        """Whether ``node`` asks for a shape or a device, which a stand-in of the same shape can answer."""
        if node.op == "call_method":
            return node.target in _METADATA_METHODS
        return node.op == "call_function" and node.target is getattr and node.args[1] in _METADATA

    def is_pure(self, node: fx.Node) -> bool:
        """Whether leaving ``node`` out changes nothing but its own value; no module is taken to be."""
        if node.op not in ("call_function", "call_method") or self.mutates(node):
            return False
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.target is print_function or any(word in name for word in (*_RANDOM, "assert")):
            return False
        if name.startswith("_") and not name.endswith("__"):  # of PyTorch's own, such as those that change modes
            return False
        if node.op == "call_function":  # those of torch.autograd see or write gradients
            return not str(getattr(node.target, "__module__", "")).startswith("torch.autograd")
        return name not in ("backward", "register_hook", "retain_grad")

    def mutates(self, node: fx.Node) -> bool:
        """Whether ``node`` may change one of its inputs in place."""
        if node.op == "call_module":
            return not _keeps_inputs(self.module(node))
        if node.op == "call_method":
            name = str(node.target)
            return name.endswith("_") or name.startswith("__i")
        if node.op != "call_function" or node.target in (print_function, getattr):
            return False
        function: Any = node.target
        if isinstance(function, torch._ops.OpOverload):
            return function._schema.is_mutable
        if isinstance(function, torch._ops.OpOverloadPacket):
            return any(getattr(function, name)._schema.is_mutable for name in function.overloads())
        if isinstance(function, torch._ops.HigherOrderOperator):  # what its graphs do is not looked at
            return True
        if function in IN_PLACE_OPERATORS.values() or "out" in node.kwargs or node.kwargs.get("inplace", False):
            return True
        known = function in _OWN_FUNCTIONS or _namespace(function) in ("_operator", "torch")
        return not known or function.__name__.endswith("_") or function is operator.setitem or _has_inplace(node)

    def is_fresh(self, node: fx.Node) -> bool:
        """Whether ``node`` is a new tensor that only its readers can reach."""
        if node.op == "call_module":
            module = self.module(node)
            if isinstance(module, nn.Sequential) and is_standard(module, nn.Sequential) and len(module):
                module = module[-1]
            return (
                is_standard(module, *_FRESH_MODULES)
                or (is_standard(module, nn.ReLU) and not getattr(module, "inplace", True))
                or _is_timms_norm(module)
            )
        in_place = "out" in node.kwargs or (node.target is F.relu and self.mutates(node))
        return node.target in _OWN_FUNCTIONS or (_name(node) in _FRESH and not in_place)

    def may_move(self, norm: fx.Node, start: fx.Node, end: fx.Node) -> bool:
        """Whether ``norm`` may run anywhere from ``start`` to ``end``: nothing else uses its statistics until then."""
        module = self.module(norm)
        if any(node < end and self._owner(node) is module for node in self.graph.find_nodes(op="get_attr")):
            return False
        for node in between(start, end):
            called = [self.module(node), self.modules.get(str(node.kwargs.get("other")))]
            if node is not norm and any(part is module for child in called if child for part in child.modules()):
                return False
        return True

    def _owner(self, attribute: fx.Node) -> nn.Module | None:
        return self.modules.get(str(attribute.target).rpartition(".")[0])

    def may_change_between(self, value: fx.Node, start: fx.Node, end: fx.Node) -> bool:
        """Whether a node strictly between ``start`` and ``end`` may change ``value`` in place."""
        storage = self._storage(value)
        return any(
            self.mutates(node) and any(storage & self._storage(read) for read in node.all_input_nodes)
            for node in between(start, end)
        )

    def without_dead_nodes(self) -> None:
        """Leave out what nobody reads."""
        for node in reversed(self.graph.nodes):
            if not node.users and self.is_pure(node):
                self.graph.erase_node(node)

    def without_needless_clones(self) -> None:
        """Let the readers of a clone read its source where neither they nor anyone before them could tell."""
        for node in list(self.graph.nodes):
            if node.op != "call_method" or node.target != "clone" or len(node.args) != 1 or node.kwargs:
                continue
            source = node.all_input_nodes[0]
            apart = all(self._leaves_alone(user) for user in node.users)
            # To the end: a reader may have saved its input for the backward.
            if apart and not self.may_change_between(source, node, self.graph.output_node()):
                node.replace_all_uses_with(source)
                self.graph.erase_node(node)

    def is_out_of_reach(self, value: fx.Node, reader: fx.Node | None = None) -> bool:
        """Whether user code never gets hold of ``value``, whose gradient is not the one of eager PyTorch.

        The gradient of a sum lacks what comes from its BatchNorm, the ``reader``, for that is added when the gradient
        goes on to the summands; that of one of two names lacks what comes from the other.
        """
        seen: set[fx.Node] = set()
        pending = [value]
        while pending:
            value = pending.pop()
            for user in set(value.users) - {reader} - seen:
                if self.reads_metadata(user):
                    continue
                if addition(user) and addition(user)[0] is not value:
                    continue  # if anything, it changes its first operand
                seen.add(user)
                if user.op == "output" or self.mutates(user) or not self._keeps_to_itself(user):
                    return False
                if not self.is_fresh(user):  # perhaps the same tensor
                    pending.append(user)
        return True

    def _keeps_to_itself(self, node: fx.Node) -> bool:
        """Whether ``node`` neither hands its input to user code nor asks for its gradient."""
        if node.op == "call_function" and node.target is getattr:
            return node.args[1] in _HARMLESS_ATTRIBUTES
        return _keeps_inputs(self.module(node)) if node.op == "call_module" else self.is_pure(node)

    def _leaves_alone(self, node: fx.Node) -> bool:
        """Whether ``node`` neither changes its inputs nor passes them on."""
        if self.reads_metadata(node):
            return True
        return self.is_fresh(node) and not self.mutates(node)

    def sources(self, node: fx.Node) -> set[fx.Node]:
        """The nodes whose memory ``node`` may share, itself among them."""
        seen: set[fx.Node] = set()
        pending = [node]
        while pending:
            node = pending.pop()
            if node not in seen:
                seen.add(node)
                pending += [] if self.is_fresh(node) else node.all_input_nodes
        return seen

    def _storage(self, node: fx.Node) -> set[object]:
        """Names of the memory that ``node`` may share; disjoint sets do not overlap."""
        outside = ("placeholder", "get_attr")
        return {_OUTSIDE if source.op in outside else source for source in self.sources(node)}


def is_tensor(root: nn.Module, node: fx.Node) -> bool:
    """Whether the value of ``node`` is one tensor for certain, where the inputs of its graph are."""
    if node.op == "placeholder":
        return True
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        home = type(module).__module__
        plain = home.startswith(_ONE_TENSOR_MODULES) or type(module) in OWN_NORMS or is_timms(module)
        indices = getattr(module, "return_indices", False) or isinstance(module, nn.MultiheadAttention)
        return plain and not indices and not is_hooked(module)
    if node.op == "call_function" and _namespace(node.target) == "_operator":  # of numbers too
        return _name(node) in _FRESH and any(is_tensor(root, operand) for operand in node.all_input_nodes)
    return node.target in _OWN_FUNCTIONS or _name(node) in _ONE_TENSOR


def addition(node: fx.Node) -> list[Any]:
    """The two operands where ``node`` adds them unscaled; the one that is changed in place, if any, comes first."""
    kwargs = dict(node.kwargs)
    operands = [*node.args, *(kwargs.pop(key) for key in ("input", "other") if key in kwargs)]
    called = node.op in ("call_function", "call_method") and node.target in _ADDITIONS
    plain = called and kwargs.pop("alpha", 1) == 1 and not kwargs and len(operands) == 2
    return operands if plain else []


def between(start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The nodes after ``start`` and before ``end``."""
    nodes = []
    node = start.next
    while node is not end and node.op != "root":
        nodes.append(node)
        node = node.next
    return nodes


def _keeps_inputs(module: nn.Module | None) -> bool:
    """Whether a child is known not to change its inputs: PyTorch's own do so only where they say ``inplace``."""
    if module is None:
        return False
    return _is_timms_norm(module) or all(
        (type(part).__module__.startswith("torch.nn.modules.") or type(part) in OWN_NORMS)
        and "forward" not in vars(part)
        and not is_hooked(part)
        and not getattr(part, "inplace", False)
        for part in module.modules()
    )


def _is_timms_norm(module: Any) -> bool:
    """Of timm's BatchNormAct2d, which writes in place into its own result alone, with nobody watching."""
    return computes_one_norm(module) and is_standard(module, type(module))


def _name(node: fx.Node) -> str:
    """Of what ``node`` calls, where that is a method, a function of PyTorch's or an operator of Python's."""
    if node.op == "call_method":
        return str(node.target)
    known = node.op == "call_function" and _namespace(node.target) in ("_operator", "torch")
    return getattr(node.target, "__name__", "") if known else ""


def _namespace(function: Any) -> str:
    """``torch`` for PyTorch's functions, ``_operator`` for Python's operators."""
    name = getattr(function, "__module__", None) or "torch"
    return "torch" if name.split(".")[0] == "torch" else name


def _has_inplace(node: fx.Node) -> bool:
    """A positional ``inplace=True`` looks like any other True."""
    return any(arg is True for arg in node.args)
