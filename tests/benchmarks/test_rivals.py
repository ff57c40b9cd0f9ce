"""The optional baselines against the layers that they stand in for, with their packages played by fakes.

The fakes have the names and arguments of the real ones: of attorch at commit 67c2772 and of cudnn-frontend 1.23.0.
"""

from __future__ import annotations

import copy
import enum
import itertools
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import layers, rivals
from fusedres import models

NORMS = (layers.BatchNorm, layers.BatchNormRelu, layers.BatchNormAddRelu)
SHAPE = (3, 8, 2, 5)


class _AttorchBatchNorm2d(nn.BatchNorm2d):
    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True,
        track_running_stats: bool = True, act_func: str | None = None, device: Any = "cuda", dtype: Any = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.act_func = act_func

    def forward(self, input: Tensor, pre_act_add: Tensor | None = None) -> Tensor:
        y = F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        y = y if pre_act_add is None else y + pre_act_add
        return F.relu(y) if self.act_func == "relu" else y


class _AttorchLayerNorm(nn.LayerNorm):
    def __init__(
        self, normalized_shape: int, eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True,
        autocast_to_fp32: bool = True, device: Any = "cuda", dtype: Any = torch.float32,
    ) -> None:  # fmt: skip
        assert isinstance(normalized_shape, int)
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)


class _LinearAutoGrad:
    @staticmethod
    def apply(input: Tensor, weight: Tensor, bias: Tensor | None = None, act_func: str | None = None) -> Tensor:
        assert act_func == "relu"
        return F.relu(F.linear(input, weight.T, bias))


class _DataType(enum.Enum):
    NOT_SET = None
    HALF = torch.float16
    BFLOAT16 = torch.bfloat16
    FLOAT = torch.float32
    BOOLEAN = torch.uint8  # eight to a byte


class _NotSupportedError(Exception):
    pass


class _Tensor:
    numbers = itertools.count(1)

    def __init__(self, dim: Sequence[int] = (), stride: Sequence[int] = (), data_type: Any = _DataType.NOT_SET) -> None:
        self.dim, self.stride, self.data_type, self.is_output = dim, stride, data_type, False
        self.uid = next(self.numbers)

    def set_output(self, value: bool) -> _Tensor:
        self.is_output = value
        return self

    def set_data_type(self, data_type: _DataType) -> _Tensor:
        self.data_type = data_type
        return self

    def get_uid(self) -> int:
        return self.uid

    def read(self, buffer: Tensor) -> Tensor:
        assert buffer.dtype == self.data_type.value
        if self.data_type is not _DataType.BOOLEAN:
            return buffer.as_strided(self.dim, self.stride).float()
        bits = np.unpackbits(buffer.numpy(), bitorder="little")
        return torch.from_numpy(bits).as_strided(self.dim, self.stride).float()

    def write(self, buffer: Tensor, value: Tensor, io: _DataType) -> None:
        assert buffer.dtype == (io if self.data_type is _DataType.NOT_SET else self.data_type).value
        memory = value.permute(0, 2, 3, 1).flatten()
        if self.data_type is _DataType.BOOLEAN:
            memory = torch.from_numpy(np.packbits(memory.numpy(), bitorder="little"))
        assert buffer.numel() == memory.numel()
        buffer.data.as_strided(memory.shape, (1,)).copy_(memory)  # unseen by autograd, as through a pointer


class _PyGraph:
    """Computes in float32 what a graph says, from NHWC memory to NHWC memory."""

    built = 0

    def __init__(
        self, name: str = "", io_data_type: Any = None, intermediate_data_type: Any = None,
        compute_data_type: Any = None, handle: Any = None,
    ) -> None:  # fmt: skip
        assert intermediate_data_type is compute_data_type is _DataType.FLOAT
        assert handle == "handle"
        self.io, self.inputs, self.steps = io_data_type, [], []

    def tensor(
        self, dim: Any, stride: Any, data_type: Any = _DataType.NOT_SET, is_virtual: bool = False,
        is_pass_by_value: bool = False, ragged_offset: Any = None, reordering_type: Any = None, name: str = "",
        uid: int = -1,
    ) -> _Tensor:  # fmt: skip
        assert is_pass_by_value == (np.prod(dim) == 1)
        self.inputs.append(_Tensor(dim, stride, data_type))
        return self.inputs[-1]

    def _step(self, compute: Callable[..., Sequence[Tensor]], *inputs: _Tensor, outputs: int = 1) -> Any:
        made = [_Tensor() for _ in range(outputs)]
        self.steps.append((compute, inputs, made))
        return made if outputs > 1 else made[0]

    def batchnorm(
        self, input: Any, scale: Any, bias: Any, in_running_mean: Any, in_running_var: Any, epsilon: Any, momentum: Any,
        peer_stats: Any = (), compute_data_type: Any = None, name: str = "",
    ) -> list[_Tensor]:  # fmt: skip
        def compute(x: Tensor, g: Tensor, b: Tensor, rm: Tensor, rv: Tensor, eps: Tensor, m: Tensor) -> list[Tensor]:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
            inverse = torch.rsqrt(var + eps)
            unbiased = torch.var(x, (0, 2, 3), keepdim=True)
            return [(x - mean) * inverse * g + b, mean, inverse, rm + m * (mean - rm), rv + m * (unbiased - rv)]

        inputs = input, scale, bias, in_running_mean, in_running_var, epsilon, momentum
        return self._step(compute, *inputs, outputs=5)

    def batchnorm_backward(
        self, grad: Any, input: Any, scale: Any, mean: Any, inv_variance: Any, peer_stats: Any = (),
        compute_data_type: Any = None, name: str = "",
    ) -> list[_Tensor]:  # fmt: skip
        def compute(dy: Tensor, x: Tensor, g: Tensor, mean: Tensor, inverse: Tensor) -> list[Tensor]:
            normal, over = (x - mean) * inverse, (0, 2, 3)
            db, dg = dy.sum(over, keepdim=True), (dy * normal).sum(over, keepdim=True)
            count = x.numel() / x.shape[1]
            return [g * inverse * (dy - db / count - normal * dg / count), dg, db]

        return self._step(compute, grad, input, scale, mean, inv_variance, outputs=3)

    def relu(
        self, input: Any, negative_slope: Any = None, lower_clip: Any = None, upper_clip: Any = None,
        compute_data_type: Any = None, name: str = "",
    ) -> _Tensor:  # fmt: skip
        return self._step(lambda x: [F.relu(x)], input)

    def cmp_gt(self, input: Any, comparison: Any, compute_data_type: Any = None, name: str = "") -> _Tensor:
        return self._step(lambda x, y: [x > y], input, comparison)

    def scale(self, input: Any, scale: Any, compute_data_type: Any = None, name: str = "") -> _Tensor:
        return self._step(lambda x, y: [x * y], input, scale)

    def mul(self, a: Any, b: Any, compute_data_type: Any = None, name: str = "") -> _Tensor:
        return self._step(lambda x, y: [x * y], a, b)

    def add(self, a: Any, b: Any, compute_data_type: Any = None, name: str = "") -> _Tensor:
        return self._step(lambda x, y: [x + y], a, b)

    def sub(self, a: Any, b: Any, compute_data_type: Any = None, name: str = "") -> _Tensor:
        return self._step(lambda x, y: [x - y], a, b)

    def build(self, modes: list[str]) -> None:
        assert modes == ["A", "FALLBACK"]
        if self.inputs[0].dim[1] % 4:
            raise _NotSupportedError("No valid engine configs for Norm_Fwd_\n{}")
        type(self).built += 1

    def get_workspace_size(self) -> int:
        return 16

    def execute(self, tensor_to_device_buffer: dict[int, Tensor], workspace: Tensor, handle: Any = None) -> None:
        assert handle == "handle"
        assert workspace.numel() == 16
        buffers = dict(tensor_to_device_buffer)
        values = {t: t.read(buffers.pop(t.uid)) for t in self.inputs}
        for compute, inputs, made in self.steps:
            values.update(zip(made, compute(*(values[t] for t in inputs)), strict=True))
        for tensor in values:
            if tensor.is_output:
                tensor.write(buffers.pop(tensor.uid), values[tensor], self.io)
        assert not buffers, "of tensors that are not in the graph"


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    attorch, cudnn = ModuleType("attorch"), ModuleType("cudnn")
    streams: list[int] = []
    vars(attorch).update(
        BatchNorm2d=_AttorchBatchNorm2d,
        LayerNorm=_AttorchLayerNorm,
        linear_layer=SimpleNamespace(LinearAutoGrad=_LinearAutoGrad),
    )
    vars(cudnn).update(
        pygraph=_PyGraph,
        data_type=_DataType,
        heur_mode=SimpleNamespace(A="A", FALLBACK="FALLBACK"),
        cudnnGraphNotSupportedError=_NotSupportedError,
        create_handle=lambda: "handle",
        set_stream=lambda handle, stream: streams.append(stream),
    )
    monkeypatch.setitem(sys.modules, "attorch", attorch)
    monkeypatch.setitem(sys.modules, "cudnn", cudnn)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(_PyGraph, "built", 0)
    return SimpleNamespace(streams=streams)


def _norm(kind: type[layers.BatchNorm]) -> layers.BatchNorm:
    model = kind(SHAPE[1])
    with torch.no_grad():
        for tensor in (model.bn.weight, model.bn.bias, model.bn.running_mean, model.bn.running_var):
            tensor.uniform_(0.5, 1.5)
    return model


def _inputs(kind: type[layers.BatchNorm], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(SHAPE, dtype=dtype) for _ in range(2 if kind is layers.BatchNormAddRelu else 1)]


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _step(model: nn.Module, inputs: list[Tensor], cotangent: Tensor) -> dict[str, Any]:
    """What a training step leaves, and the outputs in evaluation mode behind it."""
    model.train()
    model.zero_grad()
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = model(*inputs)
    y.backward(cotangent)
    with torch.no_grad():
        found = {"y": y, "evaluated": model.eval()(*inputs)} | {f"input {i}": x.grad for i, x in enumerate(inputs)}
    found |= {f"d {name}": p.grad.clone() for name, p in model.named_parameters()}
    return found | {name: b.clone() for name, b in model.named_buffers() if "running" in name}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize(
    ("rival", "formatted"),
    [(rivals.attorch, torch.clone), (rivals.cudnn, torch.clone), (rivals.cudnn, _channels_last)],
    ids=["attorch", "cuDNN NCHW", "cuDNN NHWC"],
)
def test_same_as_the_plain_layer(
    rival: Callable[[nn.Module], nn.Module], formatted: Callable[[Tensor], Tensor], kind: type[layers.BatchNorm]
) -> None:
    """Twice, so that what is kept from an evaluation is not used behind the next step."""
    torch.manual_seed(0)
    plain = _norm(kind)
    model = rival(kind(SHAPE[1]))
    model.load_state_dict(plain.state_dict())
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    for _ in range(2):
        inputs, cotangent = [formatted(x) for x in _inputs(kind)], torch.randn(SHAPE)
        torch.testing.assert_close(_step(model, inputs, cotangent), _step(plain, inputs, cotangent))


@pytest.mark.parametrize("rival", [rivals.attorch, rivals.cudnn])
def test_same_tensors(rival: Callable[[nn.Module], nn.Module]) -> None:
    plain = _norm(layers.BatchNormAddRelu).eval()
    model = rival(plain)
    assert all(a is b for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), plain.buffers(), strict=True))
    assert not model.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cudnn_in_16_bits(dtype: torch.dtype) -> None:
    model = rivals.cudnn(_norm(layers.BatchNormAddRelu))
    found = _step(model, _inputs(layers.BatchNormAddRelu, dtype), torch.randn(SHAPE, dtype=dtype))
    assert found["y"].dtype == found["evaluated"].dtype == found["input 0"].dtype == found["input 1"].dtype == dtype
    assert found["d bn.weight"].dtype == torch.float32


def test_cudnn_keeps_its_graphs(packages: SimpleNamespace) -> None:
    model = rivals.cudnn(_norm(layers.BatchNormRelu))
    for _ in range(2):
        _step(model, _inputs(layers.BatchNormRelu), torch.randn(SHAPE))
    assert _PyGraph.built == 3, "one forward, one backward, one in evaluation mode"
    assert packages.streams == [7] * 6
    assert model.state_dict()["bn.num_batches_tracked"] == 2


def test_cudnn_refuses_at_the_call() -> None:
    def call(channels: int, dtype: torch.dtype) -> None:
        rivals.cudnn(layers.BatchNorm(channels))(torch.randn(2, channels, 3, 3, dtype=dtype))

    with pytest.raises(rivals.Unsupported, match=r"\(2, 7, 3, 3\) in torch.float32: No valid engine configs") as error:
        call(7, torch.float32)
    assert "\n" not in str(error.value)
    with pytest.raises(rivals.Unsupported, match="float64"):
        call(8, torch.float64)
    with pytest.raises(rivals.Unsupported, match="frozen statistics"):
        rivals.cudnn(layers.BatchNorm(8)).eval()(torch.randn(SHAPE))


def test_attorch_refuses_channels_last() -> None:
    with pytest.raises(rivals.Unsupported, match="not contiguous"):
        rivals.attorch(layers.BatchNormRelu(8))(_channels_last(torch.randn(SHAPE)))


def test_attorch_linear() -> None:
    plain = layers.norm_linear_relu(6, 10)
    model = rivals.attorch(copy.deepcopy(plain))
    model.load_state_dict(plain.state_dict())
    x, cotangent = torch.randn(4, 6), torch.randn(4, 10)
    torch.testing.assert_close(_step(model, [x], cotangent), _step(plain, [x], cotangent))


@pytest.mark.parametrize("rival", [rivals.attorch, rivals.cudnn])
@pytest.mark.parametrize(
    "model",
    [
        layers.AddBatchNormRelu(8),
        layers.BatchNorm(8).double(),
        layers.linear_norm_relu(8, 8),
        layers.skip_linear_norm_relu(8, 8),
        models.plain_mlp(),
    ],
)
def test_unsupported(rival: Callable[[nn.Module], nn.Module], model: nn.Module) -> None:
    with pytest.raises(rivals.Unsupported) as error:
        rival(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rival", "name", "install"),
    [(rivals.attorch, "attorch", "BobMcDear/attorch"), (rivals.cudnn, "cudnn", "nvidia-cudnn-frontend")],
)
def test_absent(rival: Any, name: str, install: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=install):
        rival(layers.BatchNorm(8))
