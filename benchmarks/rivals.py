"""Other fused implementations of the layers, through the public packages of their authors where those are installed.

Written against attorch's commit 67c2772 of August 2026 (it has no releases) and cudnn-frontend 1.23.0.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from benchmarks.layers import BatchNorm, BatchNormAddRelu, BatchNormRelu


class Unsupported(Exception):  # noqa: N818
    """The baseline has no layer like that; the message is the reason, in one line."""


def attorch(model: nn.Module) -> nn.Module:
    """``model`` made of attorch's Triton layers, with the same tensors under the same names.

    ``bn(x)`` and ``relu(bn(x) + residual)`` are its ``BatchNorm2d``, ``Sequential(LayerNorm, Linear, ReLU)`` its
    ``LayerNorm`` and its product with a ReLU. It has no fused ReLU behind a LayerNorm. Its BatchNorm does not count
    batches. Behind its ReLU, gradients of channels-last inputs were wrong in Triton's interpreter: it reads two tensors
    by the same offsets, one in NHWC and one in NCHW.

    Raises:
        ImportError: attorch cannot be imported.
        Unsupported: another layer, or float64; at a call, an input of a ReLU that is not contiguous.
    """
    package = _package("attorch", "attorch", "a clone of github.com/BobMcDear/attorch on the Python path")
    if isinstance(model, nn.Sequential) and [type(m) for m in model] == [nn.LayerNorm, nn.Linear, nn.ReLU]:
        return _attorch_linear(package, model)
    bn = _bn(model, "attorch")
    relu = "relu" if isinstance(model, BatchNormRelu) else None
    fused = package.BatchNorm2d(
        bn.num_features, bn.eps, bn.momentum, act_func=relu, device=bn.weight.device, dtype=bn.weight.dtype
    )
    return _AttorchBatchNorm(_share(fused, bn)).train(model.training)


def cudnn(model: nn.Module) -> nn.Module:
    """``model`` by cuDNN's graphs, with the same tensors under the same names; its tensors are on one GPU.

    Training is the pair of graphs that NVIDIA has samples of: BatchNorm, add, ReLU and one bit an element for its sign;
    and the product with those bits, which is the residual's gradient, with BatchNorm's backward. Evaluation, of which
    there is no sample by itself, is a graph of pointwise operations. All are in NHWC; a tensor in another format is
    copied. They are built at the first call of every shape and dtype.

    Raises:
        ImportError: cudnn-frontend cannot be imported.
        Unsupported: another layer, or parameters that are not float32; at a call, gradients in
            evaluation mode and what no kernel of cuDNN covers (its guide asks for multiples of 8 channels in 16 bits
            and of 4 in float32).
    """
    package = _package("cudnn", "cuDNN", "pip install nvidia-cudnn-frontend")
    bn = _bn(model, "cuDNN")
    if bn.weight.dtype != torch.float32:
        raise Unsupported(f"cuDNN has BatchNorm's parameters in float32, not {bn.weight.dtype}")
    relu, add = isinstance(model, BatchNormRelu), isinstance(model, BatchNormAddRelu)
    return _CudnnBatchNorm(package, bn, relu, add).train(model.training)


def _package(name: str, title: str, install: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"the baseline {title} needs {install}: {error}", name=name) from error


def _bn(model: nn.Module, title: str) -> nn.BatchNorm2d:
    """The BatchNorm of one of the layers; not of a subclass, which does something else around it."""
    if type(model) not in (BatchNorm, BatchNormRelu, BatchNormAddRelu):
        raise Unsupported(f"{title} has no fused form of {type(model).__name__}")
    assert isinstance(model, BatchNorm)
    if model.bn.weight.dtype == torch.float64:
        raise Unsupported(f"{title} does not compute in float64")
    return model.bn


def _share(module: nn.Module, source: nn.Module) -> nn.Module:
    """``module`` with the very parameters and buffers of ``source``."""
    for name, tensor in (*source.named_parameters(), *source.named_buffers()):
        setattr(module, name, tensor)
    return module


class _AttorchBatchNorm(nn.Module):
    def __init__(self, bn: nn.Module) -> None:
        super().__init__()
        self.bn = bn

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.bn.act_func is not None and not inputs[0].is_contiguous():
            raise Unsupported("attorch has wrong gradients of an activation that is not contiguous in NCHW")
        return self.bn(*inputs)


def _attorch_linear(package: ModuleType, model: nn.Sequential) -> nn.Module:
    norm, linear, _ = model
    assert isinstance(norm, nn.LayerNorm)
    assert isinstance(linear, nn.Linear)
    if linear.weight.dtype == torch.float64:
        raise Unsupported("attorch does not compute in float64")
    fused = package.LayerNorm(norm.normalized_shape[0], norm.eps, device=norm.weight.device, dtype=norm.weight.dtype)
    product = _AttorchLinearRelu(linear, package.linear_layer.LinearAutoGrad.apply)
    return nn.Sequential(_share(fused, norm), product).train(model.training)


class _AttorchLinearRelu(nn.Module):
    """attorch's own module holds the transposed weight, which would be another state; this one passes a view."""

    def __init__(self, linear: nn.Linear, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self.bias, self.function = linear.weight, linear.bias, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight.T, self.bias, "relu")


class _Graph:
    """A cuDNN graph over NHWC memory, whose tensors go by name.

    Methods and keywords are those of ``python/pygraph`` in cudnn-frontend.
    """

    def __init__(self, package: ModuleType, handle: Any, x: Tensor) -> None:
        types = package.data_type
        known = {torch.float16: types.HALF, torch.bfloat16: types.BFLOAT16, torch.float32: types.FLOAT}
        if x.dtype not in known:
            raise Unsupported(f"cuDNN has no BatchNorm in {x.dtype}")
        self.package, self.handle = package, handle
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        self.types, self.io = types, known[x.dtype]
        self.ops = package.pygraph(
            io_data_type=self.io, intermediate_data_type=types.FLOAT, compute_data_type=types.FLOAT, handle=handle
        )
        self.tensors: dict[str, Any] = {}
        self.constants: dict[str, Tensor] = {}

    def _input(self, name: str, dim: Sequence[int], data_type: Any, by_value: bool = False) -> Any:
        _, c, h, w = dim
        self.tensors[name] = self.ops.tensor(
            name=name, dim=list(dim), stride=[h * w * c, 1, w * c, c], data_type=data_type, is_pass_by_value=by_value
        )
        return self.tensors[name]

    def activation(self, name: str) -> Any:
        return self._input(name, self.shape, self.io)

    def vector(self, name: str) -> Any:
        return self._input(name, (1, self.shape[1], 1, 1), self.types.FLOAT)

    def bits(self, name: str) -> Any:
        return self._input(name, self.shape, self.types.BOOLEAN)

    def scalar(self, name: str, value: float) -> Any:
        """From the host."""
        self.constants[name] = torch.full((1, 1, 1, 1), value)
        return self._input(name, (1, 1, 1, 1), self.types.FLOAT, by_value=True)

    def zeros(self, name: str) -> Any:
        """An activation of zeros. The comparison has one in NVIDIA's tests of BatchNorm; of LayerNorm, a scalar."""
        self.constants[name] = torch.zeros(self.shape.numel(), dtype=self.dtype, device=self.device)
        return self.activation(name)

    def outputs(self, data_type: Any, **tensors: Any) -> None:
        for tensor in tensors.values():
            tensor.set_output(True).set_data_type(data_type)
        self.tensors |= tensors

    def build(self) -> _Graph:
        modes = self.package.heur_mode
        try:
            self.ops.build([modes.A, modes.FALLBACK])
        except self.package.cudnnGraphNotSupportedError as error:
            reason = f"{error}".partition("\n")[0]
            raise Unsupported(f"cuDNN has no kernel for {tuple(self.shape)} in {self.dtype}: {reason}") from error
        self.uids = {name: tensor.get_uid() for name, tensor in self.tensors.items()}
        self.workspace = self.ops.get_workspace_size()
        return self

    def __call__(self, **buffers: Tensor | None) -> None:
        """Run on the current stream; inputs and outputs are in ``buffers``."""
        stream = torch.cuda.current_stream(self.device).cuda_stream
        self.package.set_stream(handle=self.handle, stream=stream)
        workspace = torch.empty(self.workspace, dtype=torch.uint8, device=self.device)
        memory = self.constants | {name: buffer for name, buffer in buffers.items() if buffer is not None}
        self.ops.execute({self.uids[name]: m for name, m in memory.items()}, workspace, handle=self.handle)


def _forward_graph(graph: _Graph, layer: _CudnnBatchNorm) -> None:
    """BatchNorm, add, ReLU and its bits: ``test_bn_relu_with_mask`` in ``test/python/test_batchnorm.py``, with the add
    of "SGBN Add Relu Graph" in ``samples/cpp/norm/batchnorm.cpp``."""
    assert layer.bn.momentum is not None
    y, mean, inv_variance, next_mean, next_var = graph.ops.batchnorm(
        name="bn",
        input=graph.activation("x"),
        scale=graph.vector("weight"),
        bias=graph.vector("bias"),
        in_running_mean=graph.vector("running_mean"),
        in_running_var=graph.vector("running_var"),
        epsilon=graph.scalar("eps", layer.bn.eps),
        momentum=graph.scalar("momentum", layer.bn.momentum),
    )
    y = _add_relu(graph, layer, y)
    if layer.relu:
        graph.outputs(graph.types.BOOLEAN, mask=graph.ops.cmp_gt(name="cmp", input=y, comparison=graph.zeros("zeros")))
    graph.outputs(graph.io, y=y)
    graph.outputs(
        graph.types.FLOAT, mean=mean, inv_variance=inv_variance, next_mean=next_mean, next_var=next_var
    )  # fmt: skip


def _add_relu(graph: _Graph, layer: _CudnnBatchNorm, y: Any) -> Any:
    if layer.add:
        y = graph.ops.add(name="add", a=y, b=graph.activation("residual"))
    return graph.ops.relu(name="relu", input=y) if layer.relu else y


def _backward_graph(graph: _Graph, layer: _CudnnBatchNorm) -> None:
    """The product with the bits and BatchNorm's backward: ``test_drelu_dadd_dbn``, in the same file."""
    grad = graph.activation("grad")
    if layer.relu:
        grad = graph.ops.scale(name="drelu", input=grad, scale=graph.bits("mask")).set_data_type(graph.io)
    if layer.add:
        graph.outputs(graph.io, d_residual=grad)
    d_x, d_weight, d_bias = graph.ops.batchnorm_backward(
        name="dbn",
        grad=grad,
        input=graph.activation("x"),
        scale=graph.vector("weight"),
        mean=graph.vector("mean"),
        inv_variance=graph.vector("inv_variance"),
    )
    graph.outputs(graph.io, d_x=d_x)
    graph.outputs(graph.types.FLOAT, d_weight=d_weight, d_bias=d_bias)


def _evaluation_graph(graph: _Graph, layer: _CudnnBatchNorm) -> None:
    """Pointwise operations, which cuDNN fuses in any number."""
    centred = graph.ops.sub(name="centre", a=graph.activation("x"), b=graph.vector("running_mean"))
    scaled = graph.ops.mul(name="scale", a=centred, b=graph.vector("scale"))
    y = graph.ops.add(name="shift", a=scaled, b=graph.vector("bias"))
    graph.outputs(graph.io, y=_add_relu(graph, layer, y))


@functools.cache
def _handle(package: ModuleType) -> Any:
    """Made once: each holds memory on the GPU."""
    return package.create_handle()


class _CudnnBatchNorm(nn.Module):
    def __init__(self, package: ModuleType, bn: nn.BatchNorm2d, relu: bool, add: bool) -> None:
        super().__init__()
        self.package, self.bn, self.relu, self.add = package, bn, relu, add
        self.graphs: dict[Any, _Graph] = {}
        self.folded: tuple[Any, Tensor] | None = None

    def graph(self, define: Callable[[_Graph, _CudnnBatchNorm], None], x: Tensor) -> _Graph:
        key = define, x.shape, x.dtype
        if key not in self.graphs:
            graph = _Graph(self.package, _handle(self.package), x)
            define(graph, self)
            self.graphs[key] = graph.build()
        return self.graphs[key]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
            raise Unsupported("cuDNN adds a residual of the input's own shape and dtype")
        x, residual = _nhwc(x), None if residual is None else _nhwc(residual)
        if self.training:
            assert self.bn.num_batches_tracked is not None
            self.bn.num_batches_tracked.add_(1)
            return _Training.apply(self, x, residual, self.bn.weight, self.bn.bias)
        if torch.is_grad_enabled() and (x.requires_grad or self.bn.weight.requires_grad):
            raise Unsupported("cuDNN has no backward with frozen statistics")
        y = torch.empty_like(x)
        vectors = {"running_mean": self.bn.running_mean, "scale": self._scale(), "bias": self.bn.bias}
        self.graph(_evaluation_graph, x)(x=x, residual=residual, y=y, **vectors)
        return y

    def _scale(self) -> Tensor:
        """Weight over deviation, kept while both are what they were: a network in use would have it computed once."""
        assert self.bn.running_var is not None
        versions = self.bn.weight._version, self.bn.running_var._version
        if self.folded is None or self.folded[0] != versions:
            self.folded = versions, self.bn.weight * torch.rsqrt(self.bn.running_var + self.bn.eps)
        return self.folded[1]


def _nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class _Training(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layer: _CudnnBatchNorm, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor
    ) -> Tensor:
        bn, y = layer.bn, torch.empty_like(x)
        assert bn.running_mean is not None
        assert bn.running_var is not None
        mean, inv_variance = torch.empty_like(weight), torch.empty_like(weight)
        # Eight booleans to a byte, as in samples/python/26_layernorm_forward_training_and_backward_with_relu_bitmask.
        mask = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device) if layer.relu else None
        layer.graph(_forward_graph, x)(
            x=x, residual=residual, weight=weight, bias=bias, y=y, mask=mask, mean=mean, inv_variance=inv_variance,
            running_mean=bn.running_mean, running_var=bn.running_var,
            next_mean=bn.running_mean, next_var=bn.running_var,
        )  # fmt: skip
        increment_version((bn.running_mean, bn.running_var))
        ctx.layer = layer
        ctx.save_for_backward(x, weight, mean, inv_variance, mask)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, weight, mean, inv_variance, mask = ctx.saved_tensors
        d_x, d_weight, d_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
        d_residual = torch.empty_like(x) if ctx.layer.add else None
        ctx.layer.graph(_backward_graph, x)(
            grad=_nhwc(grad), x=x, weight=weight, mean=mean, inv_variance=inv_variance, mask=mask,
            d_x=d_x, d_residual=d_residual, d_weight=d_weight, d_bias=d_bias,
        )  # fmt: skip
        return None, d_x, d_residual, d_weight, d_bias
