"""What may be assumed of the nodes of a traced graph: who reads them, what they may share, what changes them."""

from __future__ import annotations

import builtins
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fusedres.fusion.foreign import is_foreign, is_timms
from fusedres.fusion.runtime import (
    is_hooked,
    linear_norm,
    linear_norm_add,
    linear_shape,
    norm_add,
    norm_add_norm,
    norm_conv,
    norm_linear,
    norm_max_pool,
)
from fusedres.nn import OWN_NORMS

IN_PLACE_OPERATORS = {
    name: getattr(operator, f"i{name}")
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul")
}
_OUTSIDE = object()  # the storage of inputs, parameters and buffers, which may overlap
_OWN_FUNCTIONS = {
    norm_add, norm_add_norm, norm_max_pool, norm_conv, norm_linear, linear_norm, linear_norm_add, linear_shape,
}  # fmt: skip
ADD_FUNCTIONS = {operator.add, operator.iadd, torch.add}
ADD_METHODS = {"add", "add_", "__add__", "__iadd__"}
_FRESH_FUNCTIONS = {
    *_OWN_FUNCTIONS, operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.mul, torch.relu,
    F.linear, F.layer_norm, F.batch_norm, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, torch.cat, torch.sigmoid,
    F.avg_pool2d, F.adaptive_avg_pool2d, F.gelu, F.softmax, torch.mean,
}  # fmt: skip
_FRESH_METHODS = {"clone", "add", "sub", "mul", "div", "relu", "mean", "sigmoid"}
_FRESH_MODULES = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d, *OWN_NORMS, nn.LayerNorm,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Sigmoid, nn.GELU,
)  # fmt: skip
_RANDOM = ("rand", "dropout", "bernoulli", "multinomial", "normal", "poisson", "exponential")
# What gives one tensor, whatever it is given.
_TENSOR_MODULES = tuple(
    f"torch.nn.modules.{name}"
    for name in ("conv", "batchnorm", "linear", "activation", "dropout", "pooling", "normalization", "padding",
                 "upsampling", "flatten", "pixelshuffle", "instancenorm")
)  # fmt: skip
_TENSOR_FUNCTIONS = {torch.flatten, F.relu, F.relu6, F.silu, F.hardswish, F.hardsigmoid, F.dropout, F.max_pool2d,
                     F.interpolate, F.pad, torch.add, torch.reshape, torch.squeeze}  # fmt: skip
_TENSOR_METHODS = {"view", "reshape", "flatten", "permute", "transpose", "contiguous", "squeeze", "unsqueeze",
                   "expand_as", "softmax", "add_", "mul_", "relu_", "float", "to", "type_as"}  # fmt: skip
_HARMLESS_ATTRIBUTES = ("dtype", "layout", "is_cuda", "requires_grad")
_METADATA_METHODS = {"size", "dim", "numel", "ndimension"}
_METADATA = {"shape", "ndim", "device"}
print_function = builtins.print


def is_standard(module: object, *classes: type) -> bool:
    """Of exactly one of ``classes``, running that class's forward, with nobody watching."""
    return (
        isinstance(module, nn.Module)
        and type(module) in classes
        and "forward" not in vars(module)
        and module._compiled_call_impl is None
        and not is_hooked(module)
    )


def max_pool_arguments(values: Values, node: fx.Node) -> tuple[Any, ...] | None:
    """Kernel size, stride, padding, dilation and ceil_mode, where ``node`` is a maximum pooling without indices."""
    module = values.module(node)
    if is_standard(module, nn.MaxPool2d) and len(node.args) == 1 and not node.kwargs:
        assert isinstance(module, nn.MaxPool2d)
        shape = module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode
        return None if module.return_indices else shape
    if node.op != "call_function" or node.target not in (F.max_pool2d, torch.max_pool2d):
        return None
    names = {"input": None, "kernel_size": None, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
    given = names | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    shape = tuple(given[name] for name in list(names)[1:])
    plain = len(node.all_input_nodes) == 1 and not given.get("return_indices") and len(node.args) <= len(names)
    return shape if plain else None


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
                or _is_timms(module)
            )
        if node.op == "call_method":
            return node.target in _FRESH_METHODS
        if node.op != "call_function":
            return False
        if node.target is F.relu:
            return not self.mutates(node)
        return node.target in _FRESH_FUNCTIONS and "out" not in node.kwargs

    def may_move(self, norm: fx.Node, start: fx.Node, end: fx.Node) -> bool:
        """Whether ``norm`` may run anywhere from ``start`` to ``end``: nothing else uses its statistics until then."""
        module = self.module(norm)
        for node in self.graph.find_nodes(op="get_attr"):
            if node < end and self.modules.get(str(node.target).rpartition(".")[0]) is module:
                return False
        for node in between(start, end):
            other = self.module(node)
            if other is not None and node is not norm and any(part is module for part in other.modules()):
                return False
            read = (value for value in node.all_input_nodes if value.op == "get_attr")
            if any(self.modules.get(str(value.target)) is module for value in read):
                return False
        return True

    def may_change_between(self, value: fx.Node, start: fx.Node, end: fx.Node) -> bool:
        """Whether a node strictly between ``start`` and ``end`` may change ``value`` in place."""
        storage = self._storage(value)
        return any(
            self.mutates(node) and any(storage & self._storage(read) for read in node.all_input_nodes)
            for node in between(start, end)
        )

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

    def _storage(self, node: fx.Node) -> set[object]:
        """Names of the memory that ``node`` may share; disjoint sets do not overlap."""
        seen: set[fx.Node] = set()
        storage: set[object] = set()
        pending = [node]
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            storage.add(_OUTSIDE if node.op in ("placeholder", "get_attr") else node)
            if not self.is_fresh(node):
                pending += node.all_input_nodes
        return storage


def is_tensor(root: nn.Module, node: fx.Node) -> bool:
    """Whether the value of ``node`` is one tensor for certain, where the inputs of its graph are."""
    if node.op == "placeholder":
        return True
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        home = type(module).__module__
        plain = home.startswith(_TENSOR_MODULES) or type(module) in OWN_NORMS or is_timms(module)
        indices = getattr(module, "return_indices", False) or isinstance(module, nn.MultiheadAttention)
        return plain and not indices and not is_hooked(module)
    if node.op == "call_method":
        return node.target in _FRESH_METHODS | _TENSOR_METHODS
    if node.op != "call_function":
        return False
    if _namespace(node.target) == "_operator":  # of numbers too
        return node.target in _FRESH_FUNCTIONS and any(is_tensor(root, operand) for operand in node.all_input_nodes)
    return node.target in _FRESH_FUNCTIONS or node.target in _TENSOR_FUNCTIONS


def addition(node: fx.Node) -> list[Any]:
    """The two operands where ``node`` adds them unscaled; the one that is changed in place, if any, comes first."""
    names = ADD_FUNCTIONS if node.op == "call_function" else ADD_METHODS if node.op == "call_method" else ()
    kwargs = dict(node.kwargs)
    operands = [*node.args, *(kwargs.pop(key) for key in ("input", "other") if key in kwargs)]
    plain = node.target in names and kwargs.pop("alpha", 1) == 1 and not kwargs and len(operands) == 2
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
    return _is_timms(module) or all(
        (type(part).__module__.startswith("torch.nn.modules.") or type(part) in OWN_NORMS)
        and "forward" not in vars(part)
        and not is_hooked(part)
        and not getattr(part, "inplace", False)
        for part in module.modules()
    )


def _is_timms(module: Any) -> bool:
    """Of timm's BatchNormAct2d, which writes in place into its own result alone, with nobody watching."""
    return is_foreign(module) and "forward" not in vars(module) and not is_hooked(module)


def _namespace(function: Any) -> str:
    """``torch`` for PyTorch's functions, ``_operator`` for Python's operators."""
    name = getattr(function, "__module__", None) or "torch"
    return "torch" if name.split(".")[0] == "torch" else name


def _has_inplace(node: fx.Node) -> bool:
    """A positional ``inplace=True`` looks like any other True."""
    return any(arg is True for arg in node.args)
