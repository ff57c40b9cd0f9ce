"""Pre-activation blocks: the join of two of them, the identity path, and a thousand layers."""

from __future__ import annotations

import copy
import io
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres
from fusedres import models
from fusedres.nn import BatchNormAct2d, PreActBasicBlock, PreActBottleneck
from tests import zoo
from tests.zoo import TOLERANCE, torchvision_models

BLOCKS = [PreActBasicBlock, PreActBottleneck]
KINDS = [*BLOCKS, models.PreActBasicBlock, models.PreActBottleneck]
SHAPE = (2, 8, 6, 6)


def name_of(value: object) -> str | None:
    return f"{value.__module__.split('.')[1]}.{value.__name__}" if isinstance(value, type) else None


def images() -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64)


def build(kind, downsample: bool = False) -> nn.Module:
    """A block for 8 channels, with other moments in its norms than 0 and 1."""
    planes = 8 // kind.expansion
    if not downsample:
        return zoo.randomise(kind(8, planes))
    return zoo.randomise(kind(8, 4, 2, nn.Conv2d(8, 4 * kind.expansion, 1, 2, bias=False)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("act", ["relu", None])
def test_add_of_the_module(act, momentum, training):
    module = BatchNormAct2d(8, act=act, momentum=momentum).double().train(training)
    plain = nn.BatchNorm2d(8, momentum=momentum).double().train(training)
    for _ in range(2):
        x, r, ds, dy = (images() for _ in range(4))
        ours, theirs = [(x.clone().requires_grad_(), r.clone().requires_grad_()) for _ in range(2)]
        s, y = module.add(*ours)
        total = theirs[0] + theirs[1]
        expected = F.relu(plain(total)) if act else plain(total)
        torch.testing.assert_close(s, total, **TOLERANCE)
        torch.testing.assert_close(y, expected, **TOLERANCE)
        torch.autograd.backward([s, y], [ds, dy])
        torch.autograd.backward([total, expected], [ds, dy])
        for mine, other in zip((*ours, *module.parameters()), (*theirs, *plain.parameters()), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, **TOLERANCE)
        for (name, mine), other in zip(module.named_buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(mine, other, msg=name)


def test_add_without_running_statistics():
    module = BatchNormAct2d(8, track_running_stats=False, affine=False).double().eval()
    x, r = images(), images()
    torch.testing.assert_close(module.add(x, r)[1], F.relu(F.batch_norm(x + r, None, None, training=True)))


def test_act_of_one_add():
    module = BatchNormAct2d(8).double()
    x, r = images(), images()
    assert torch.equal(module.add(x, r, act=None)[1].relu(), module.add(x, r)[1])
    assert module.add(x, r, act=None)[1].min() < 0


def test_add_refuses():
    module = BatchNormAct2d(8).double()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="act must be"):
        module.add(images(), images(), act="gelu")
    with pytest.raises(ValueError, match="residual must have shape"):
        module.add(images(), images()[:1])
    with pytest.raises(ValueError, match="expected 4D input"):
        module.add(images()[0], images()[0])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("downsample", [True, False])
@pytest.mark.parametrize("kind", BLOCKS, ids=name_of)
def test_operands_sum_to_the_output(kind, downsample, training):
    block = build(kind, downsample).train(training)
    twin = copy.deepcopy(block)
    x = images()
    branch, identity = block.operands(x)
    assert (identity is x) is not downsample
    assert torch.equal(branch + identity, twin(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("downsample", [True, False])
@pytest.mark.parametrize("kind", BLOCKS, ids=name_of)
def test_operands_of_a_pair(kind, downsample, training):
    """The pair stands for its sum: output, gradients and buffers, with one call for the addition and ``bn1``."""
    block = build(kind, downsample).train(training)
    twin = copy.deepcopy(block)
    a, b = images().requires_grad_(), images().requires_grad_()
    total = (a + b).detach().requires_grad_()
    with mock.patch.object(block.bn1, "add", wraps=block.bn1.add) as add:
        branch, identity = block.operands(a, b)
    add.assert_called_once_with(a, b)
    if not downsample:
        assert torch.equal(identity, total)
    out, expected = branch + identity, twin(total)
    torch.testing.assert_close(out, expected, **TOLERANCE)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(a.grad, total.grad, **TOLERANCE)
    torch.testing.assert_close(b.grad, total.grad, **TOLERANCE)
    for (name, mine), other in zip(block.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, **TOLERANCE, msg=name)
    for (name, mine), other in zip(block.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, other, **TOLERANCE, msg=name)


class Chain(nn.Module):
    """Blocks and a last norm; sums are made where the next norm reads them."""

    def __init__(self, kind) -> None:
        super().__init__()
        self.blocks = nn.Sequential(build(kind), build(kind), build(kind, downsample=True))
        self.norm = BatchNormAct2d(4 * kind.expansion)

    def forward(self, x: Tensor) -> Tensor:
        input, residual = x, None
        for block in self.blocks:
            input, residual = block.operands(input, residual)
        return self.norm.add(input, residual)[1]


@pytest.mark.parametrize("kind", BLOCKS, ids=name_of)
def test_chain(kind):
    chain = zoo.randomise(Chain(kind))
    apart = copy.deepcopy(chain)
    apart.forward = lambda x: apart.norm(apart.blocks(x))  # type: ignore[method-assign]
    zoo.assert_same_steps(chain, apart, images())
    with mock.patch("fusedres.nn.batch_norm.add_normalise", wraps=fusedres.functional.add_normalise) as add:
        chain(images())
    assert add.call_count == len(chain.blocks)


@pytest.mark.parametrize("kind", BLOCKS, ids=name_of)
def test_copies_and_traces(kind):
    block = build(kind, downsample=True).eval()
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    x = images()
    for twin in (copy.deepcopy(block), torch.load(buffer, weights_only=False), torch.fx.symbolic_trace(block)):
        assert torch.equal(twin(x), block(x))


@pytest.mark.parametrize("kind", BLOCKS, ids=name_of)
def test_signature_is_torchvisions(kind):
    resnet = torchvision_models().ResNet(kind, [1, 1, 1, 1], num_classes=5, norm_layer=nn.BatchNorm2d).double()
    assert resnet(zoo.images(2, 3, 32, 32)).shape == (2, 5)
    assert {type(norm) for block in resnet.layer2 for norm in (block.bn1, block.bn2)} == {BatchNormAct2d}


def test_groups_width_and_dilation():
    block = PreActBottleneck(16, 16, groups=4, base_width=8, dilation=2, downsample=nn.Conv2d(16, 64, 1))
    assert (block.conv2.in_channels, block.conv2.groups, block.conv2.dilation) == (8, 4, (2, 2))
    assert block(torch.randn(2, 16, 7, 7)).shape == (2, 64, 7, 7)
    with pytest.raises(ValueError, match="PreActBasicBlock needs groups=1 and base_width=64, got 1 and 128"):
        PreActBasicBlock(4, 4, base_width=128)
    with pytest.raises(NotImplementedError, match="PreActBasicBlock needs dilation=1, got 2"):
        PreActBasicBlock(4, 4, dilation=2)
    with pytest.raises(TypeError, match="GroupNorm"):
        PreActBottleneck(4, 4, norm_layer=lambda planes: nn.GroupNorm(1, planes))


def network(kind, shortcut: str = "projection") -> models.PreActResNet:
    return models.PreActResNet(kind, [2, 3], 5, shortcut=shortcut, width=4, small_input=True).double()


def assert_nothing_writes_to_the_path(model: nn.Module, x: Tensor) -> None:
    """No block's input or output changes, by its version counter and by its values, until after the backward."""
    path = []

    def record(tensor: Tensor) -> None:
        path.append((tensor, tensor._version, tensor.detach().clone()))

    blocks = [block for block in model.modules() if hasattr(block, "downsample")]
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args: record(args[0]))
        block.register_forward_hook(lambda module, args, out: record(out))
    out = model(x)
    out.backward(torch.randn_like(out))
    assert len(path) == 2 * len(blocks) > 0
    for i, (tensor, version, value) in enumerate(path):
        assert tensor._version == version, f"tensor {i} of the identity path was written to"
        assert torch.equal(tensor, value), f"tensor {i} of the identity path has changed"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shortcut", ["projection", "pad"])
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_identity_path_is_not_written_to(kind, shortcut, training):
    assert_nothing_writes_to_the_path(network(kind, shortcut).train(training), zoo.images())


class Impure(models.PreActBasicBlock):
    """Activates its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.relu_())


class Sly(models.PreActBasicBlock):
    """The same behind the version counter's back."""

    def forward(self, x: Tensor) -> Tensor:
        x.data.relu_()
        return super().forward(x)


@pytest.mark.parametrize(("kind", "complaint"), [(Impure, "was written to"), (Sly, "has changed")])
def test_a_write_to_the_identity_path_is_seen(kind, complaint):
    with pytest.raises(AssertionError, match=rf"tensor \d of the identity path {complaint}"):
        assert_nothing_writes_to_the_path(network(kind), zoo.images())


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_without_branches_the_path_is_the_identity(kind):
    """Nothing comes after an addition: neither the signal nor its gradient is touched, bit for bit."""
    blocks = nn.Sequential(*(build(kind) for _ in range(3)))
    for block in blocks:
        nn.init.zeros_(block.get_parameter("conv2.weight" if kind.expansion == 1 else "conv3.weight"))
    x, grad = images().requires_grad_(), images()
    out = blocks(x)
    out.backward(grad)
    assert torch.equal(out, x) and torch.equal(x.grad, grad)


@pytest.mark.parametrize("block", [models.PreActBottleneck, PreActBottleneck], ids=name_of)
def test_thousand_layers_train(block, monkeypatch):
    monkeypatch.setenv("FUSEDRES_BACKEND", "reference")  # a thousand interpreted kernels would take a minute
    model = models.preact_resnet_cifar(1001, block=block, width=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, target = torch.randn(4, 3, 8, 8), torch.arange(4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    F.cross_entropy(model(x), target).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    optimizer.step()
    assert F.cross_entropy(model(x), target).isfinite()
    for name in ("conv1.weight", "layer1.0.conv1.weight", "layer3.110.conv3.weight"):
        assert not torch.equal(model.get_parameter(name), before[name]), name
