"""The modules: PyTorch's own BatchNorm2d cases, drop-in promises, and blocks beside torchvision's."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.common_modules import module_db

from fusedres.nn import BasicBlock, BatchNormAct2d, Bottleneck, as_batch_norm_act
from tests.zoo import torchvision_models

BATCH_NORM = next(info for info in module_db if info.module_cls is nn.BatchNorm2d)


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("act", ["relu", None])
@pytest.mark.parametrize("training", [True, False])
def test_pytorchs_own_cases(device, training, act):
    """The constructor and forward inputs that PyTorch tests BatchNorm2d with, through ours."""
    cases = BATCH_NORM.module_inputs_func(BATCH_NORM, device, torch.float32, False, training)
    assert len(cases) > 3
    for case in cases:
        ours = BatchNormAct2d(
            *case.constructor_input.args, **case.constructor_input.kwargs, act=act, device=device
        ).train(training)  # fmt: skip
        theirs = nn.BatchNorm2d(*case.constructor_input.args, **case.constructor_input.kwargs, device=device)
        theirs.train(training)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for _ in range(2):
            out = ours(*case.forward_input.args)
            expected = theirs(*case.forward_input.args)
            torch.testing.assert_close(out, F.relu(expected) if act else expected)
        for (name, mine), other in zip(ours.named_buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(mine, other, msg=name)


def test_is_a_batch_norm():
    ours, theirs = BatchNormAct2d(4, act="relu"), nn.BatchNorm2d(4)
    assert isinstance(ours, nn.BatchNorm2d)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert "act='relu'" in repr(ours)


def test_act_of_one_call():
    module = BatchNormAct2d(4, act="relu")
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    module.double()
    assert torch.equal(module(x, act=None).relu(), module(x))
    assert module(x, act=None).min() < 0


def test_residual_of_the_module():
    module = BatchNormAct2d(4).double()
    plain = nn.BatchNorm2d(4).double()
    x, residual = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    assert torch.equal(module(x, residual), F.relu(plain(x) + residual))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("track_running_stats", [True, False])
def test_modes_and_buffers(momentum, track_running_stats):
    ours = BatchNormAct2d(4, momentum=momentum, track_running_stats=track_running_stats, act=None).double()
    theirs = nn.BatchNorm2d(4, momentum=momentum, track_running_stats=track_running_stats).double()
    for training in (True, True, False, True, False):
        x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))
        for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(mine, other)


def test_copies():
    module = BatchNormAct2d(4, eps=1e-3)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(module), torch.load(buffer, weights_only=False)):
        assert type(twin) is BatchNormAct2d
        assert twin.act == "relu" and twin.eps == 1e-3


def test_sync_batch_norm_conversion_never_drops_the_activation():
    with pytest.raises(RuntimeError, match="drop its activation"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(BatchNormAct2d(4, act="relu")))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(BatchNormAct2d(4, act=None)))
    assert [type(m) for m in converted.children()] == [nn.SyncBatchNorm]


def test_qconfig_can_be_set():
    module = BatchNormAct2d(4)
    module.qconfig = None
    assert module.qconfig is None


def test_as_batch_norm_act_keeps_the_object():
    plain = nn.BatchNorm2d(4)
    weight = plain.weight
    taken = as_batch_norm_act(plain, "relu")
    assert taken is plain and taken.weight is weight and taken.act == "relu"

    class Own(nn.BatchNorm2d):
        pass

    with pytest.raises(TypeError, match="Own"):
        as_batch_norm_act(Own(4), None)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("training", [True, False])
def test_in_torchvisions_resnet(block, training):
    """torchvision's ResNet builds on our blocks, loads its own weights into them and gives the same result."""
    models = torchvision_models()
    theirs = getattr(models.resnet, block.__name__)
    torch.manual_seed(1)
    expected = models.ResNet(theirs, [1, 1, 1, 1], num_classes=5).double().train(training)
    ours = models.ResNet(block, [1, 1, 1, 1], num_classes=5).double().train(training)
    ours.load_state_dict(expected.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    grad = torch.randn(2, 5, dtype=torch.float64)
    outs = [model(x) for model in (ours, expected)]
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-8)
    for out in outs:
        out.backward(grad)
    for (name, mine), other in zip(ours.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-8, atol=1e-8, msg=name)
    for (name, mine), other in zip(ours.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-8, msg=name)


@pytest.mark.parametrize(("groups", "base_width"), [(32, 4), (1, 128)])
def test_resnext_and_wide_bottlenecks(groups, base_width):
    models = torchvision_models()
    expected = models.resnet.Bottleneck(64, 64, 1, nn.Conv2d(64, 256, 1), groups, base_width, norm_layer=nn.BatchNorm2d)
    ours = Bottleneck(64, 64, 1, nn.Conv2d(64, 256, 1), groups, base_width)
    ours.load_state_dict(expected.state_dict())
    x = torch.randn(2, 64, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(ours.double()(x), expected.double()(x), rtol=0, atol=1e-8)
