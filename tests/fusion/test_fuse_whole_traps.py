"""What fusions beyond a layer must not change, and what explain says of them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres import models
from tests import zoo
from tests.fusion.blocks import block_of
from tests.fusion.ran import assert_true, said
from tests.fusion.test_fuse_whole import SHAPE, check
from tests.zoo import conv, images, randomise


def two_readers(self, x):
    h = F.relu(self.b(x))
    [grad] = torch.autograd.grad((self.conv(h) + self.conv2(h)).square().sum(), h)
    return 2 * grad


def sum_of_summands(self, x):
    h = x + self.conv2(x)
    [grad] = torch.autograd.grad((self.conv(F.relu(self.bn(h))) + h).square().sum(), h)
    return 2 * grad


def with_a_backward(self, x):
    h = F.relu(self.b(x))
    torch.autograd.backward(h.square().sum(), inputs=[self.conv.weight], retain_graph=True)
    return self.pool(h)


@pytest.mark.parametrize("forward", [two_readers, sum_of_summands, with_a_backward])
@pytest.mark.usefixtures("triton_backend")
def test_a_forward_that_differentiates_gets_the_whole_gradient(forward: Callable[..., object]):
    block = block_of(forward).float()
    reference = copy.deepcopy(block)
    x = images(*SHAPE).float().requires_grad_()
    torch.testing.assert_close(fusedres.fuse(block)(x), reference(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(block.conv.weight.grad, reference.conv.weight.grad, rtol=1e-3, atol=1e-3)


UNREAD: dict[str, Callable[..., object]] = {
    "shape": lambda self, x: self.conv2(x).view(F.relu(self.b(x)).shape),
    "nothing": lambda self, x: (self.conv2(x), F.relu(self.b(x)) + 1)[0],
    "print": lambda self, x: (self.conv2(x), print(self.b(x)))[0],
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_value_that_nothing_is_computed_from(name):
    check(block_of(UNREAD[name]))


def test_explain_says_which_pooling_has_no_kernel(monkeypatch):
    block = block_of(lambda self, x: F.max_pool2d(F.relu(self.b(x)), [3], 2, 1, ceil_mode=True)).float()
    for backend, path in (("auto", "reference"), ("triton", "raises")):
        monkeypatch.setenv("FUSEDRES_BACKEND", backend)
        [row] = fusedres.explain(block, SHAPE).rows
        assert (row["path"], row["reason"], row["bytes_saved"]) == (path, "no kernel pools in ceil mode", 0)
    with pytest.raises(RuntimeError, match="ceil mode"):
        fusedres.fuse(block)(images(*SHAPE).float())


@pytest.mark.parametrize("options", [{"padding": 1, "padding_mode": "reflect"}, {"padding": "same"}])
def test_a_convolution_that_pads_a_copy_of_its_input_is_not_said_to_read_it_again(options):
    block = block_of(lambda self, x: self.conv2(F.relu(self.b(x))))
    block.conv2 = nn.Conv2d(4, 4, 2, **options)
    [row] = fusedres.explain(fusedres.fuse(block, save="recompute")).rows
    assert (row["pattern"], "computed again" in row["reason"]) == ("bn_act", False)


@pytest.mark.parametrize("first", [fusedres.fuse, fusedres.convert_sync_batchnorm])
def test_layers_that_ranks_share_are_not_said_to_be_part_of_more(first, monkeypatch):
    monkeypatch.setenv("FUSEDRES_BACKEND", "reference")
    second = fusedres.fuse if first is fusedres.convert_sync_batchnorm else fusedres.convert_sync_batchnorm
    model = second(first(zoo.resnet(small_input=False)))
    assert_true(model, images(2, 3, 32, 32))
    assert all(row["reason"] == "FUSEDRES_BACKEND=reference" for row in fusedres.explain(model).rows)


class Checkpointed(zoo.TwoStages):
    """Cannot be traced."""

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2):
            x = checkpoint(stage, x, use_reentrant=False)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def test_both_norms_of_a_join_are_in_one_row_also_below_what_is_left_alone(monkeypatch):
    monkeypatch.setenv("FUSEDRES_BACKEND", "reference")
    model = randomise(Checkpointed(models.BasicBlock, (1, 1), width=4))
    before = said(model)
    assert sum(before.values()) == 5
    assert said(fusedres.fuse(model)) == before
    assert_true(model, images(2, 3, 32, 32))


class Looped(nn.Module):
    """One block, called three times; the last call alone is averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.average = conv(3, 4), models.BasicBlock(4, 4), nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        x = self.stem(x)
        for _ in range(3):
            x = self.block(x)
        return self.average(x)


def test_each_call_of_a_block_has_its_rows():
    model = fusedres.fuse(randomise(Looped()))
    assert [(row["module"], row["pattern"]) for row in fusedres.explain(model).rows] == [
        *[("block.bn1", "bn_act"), ("block.bn2", "bn_add_act")] * 2,
        ("block.bn1", "bn_act"),
        ("block.bn2", "bn_add_act_avgpool"),
    ]
