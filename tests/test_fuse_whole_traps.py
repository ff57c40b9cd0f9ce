"""What fusions beyond a layer must not change, and what explain says of them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import fusedres
from tests.test_fuse_whole import SHAPE, block_of
from tests.zoo import images


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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
