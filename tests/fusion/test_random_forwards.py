"""Random forwards: aliases, in-place operations, shared layers and readers of shapes, each fused against eager.

A forward is a list of statements over the values before it. What eager refuses (autograd: a value that a backward needs
was changed) is left out; all others have to give eager's outputs, gradients and buffers bit for bit up to rounding.
"""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres

_SIZE, _CHANNELS = 6, 8
# Statements: {a} and {b} are values of [N, C, H, W], {v} is the new one, {i} the number of a layer.
_STATEMENTS = (
    ("{v} = self.conv{i}({a})", 4),
    ("{v} = self.norm{i}({a})", 7),
    ("{v} = self.relu({a})", 3),
    ("{v} = self.relu_({a})", 3),
    ("{v} = F.relu({a})", 2),
    ("{v} = torch.relu_({a})", 1),
    ("{v} = {a}.relu()", 1),
    ("{v} = {a} + {b}", 4),
    ("{v} = torch.add({a}, {b})", 1),
    ("{a} += {b}; {v} = {a}", 3),
    ("{v} = {a}; {v} += {b}", 3),
    ("{a}.add_({b}); {v} = {a}", 1),
    ("{v} = {a}.clone()", 2),
    ("{v} = self.identity({a})", 1),
    ("{v} = {a}", 1),
    ("{v} = {a}.view({a}.shape)", 1),
    ("{v} = {a}.detach()", 1),
    ("{v} = self.dropout({a})", 1),
    ("{v} = {a} * {b}.shape[0]", 1),
    ("{v} = {a} * 0.5", 1),
    ("{a}.mul_(0.5); {v} = {a}", 1),
    ("{v} = torch.cat([{a}, {b}], 1)[:, :self.C]", 1),
    ("{v} = torch.add({a}, {b}, alpha=2)", 1),
    ("{v} = self.pool({a})", 1),
    ("{v} = F.max_pool2d({a}, 3, 1, 1)", 1),
    ("{v} = {a} * F.adaptive_avg_pool2d({b}, 1)", 1),
    ("{v} = {a} - {b}.mean((2, 3), keepdim=True)", 1),
    ("{v} = self.block{i}({a})", 2),
)


class _Block(nn.Module):
    """Its output is the sum of its input and a branch, and opens the next one's BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(_CHANNELS), nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.bn(x))) + x


class _Net(nn.Module):
    C = _CHANNELS

    def __init__(self) -> None:
        super().__init__()
        for index in range(3):
            self.add_module(f"conv{index}", nn.Conv2d(_CHANNELS, _CHANNELS, 1, bias=False))
            self.add_module(f"norm{index}", nn.BatchNorm2d(_CHANNELS))
            self.add_module(f"block{index}", _Block())
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)
        self.identity, self.dropout, self.pool = nn.Identity(), nn.Dropout(0.0), nn.MaxPool2d(3, 1, 1)


def source_of(seed: int) -> str:
    """A forward of 6 to 16 statements."""
    draw = random.Random(seed)
    values, lines = ["x"], ["def forward(self, x):", "    x = self.conv0(x)"]
    forms, weights = zip(*_STATEMENTS, strict=True)
    for index in range(draw.randint(6, 16)):
        form = draw.choices(forms, weights)[0]
        recent = values[-4:]
        a, b = draw.choice(recent[-2:]), draw.choice(recent)
        lines.append("    " + form.format(v=f"v{index}", a=a, b=b, i=draw.randrange(3)))
        values.append(f"v{index}")
    results = ", ".join(dict.fromkeys([values[-1], draw.choice(values)]))
    return "\n".join([*lines, f"    return {results},"])


def make(seed: int) -> nn.Module:
    scope = {"torch": torch, "F": F}
    exec(source_of(seed), scope)
    torch.manual_seed(seed)
    net = type("Net", (_Net,), {"forward": scope["forward"]})().double()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    return net


def run(net: nn.Module, seed: int) -> dict[str, Tensor] | None:
    """Outputs, gradients and buffers; ``None`` where PyTorch refuses."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, _CHANNELS, _SIZE, _SIZE, dtype=torch.double, generator=generator, requires_grad=True)
    net.zero_grad()
    try:
        outs = net(x)
        products = [out * torch.randn(out.shape, dtype=out.dtype, generator=generator) for out in outs]
        loss = torch.stack([product.sum() for product in products]).sum()
        if loss.requires_grad:
            loss.backward()
    except RuntimeError:
        return None
    found = {f"output {index}": out.detach() for index, out in enumerate(outs)}
    found |= {f"grad {name}": p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    found |= {f"buffer {name}": buffer.clone() for name, buffer in net.named_buffers()}
    return found | ({"grad x": x.grad} if x.grad is not None else {})


def assert_like_eager(seed: int) -> bool:
    """Whether eager runs at all, and then the fused network gives its values."""
    eager = make(seed)
    fused = fusedres.fuse(copy.deepcopy(eager))
    for training in (True, False):
        before = run(eager.train(training), seed)
        if before is None:
            return False
        after = run(fused.train(training), seed)
        assert after is not None, f"seed {seed}: {source_of(seed)}"
        assert before.keys() == after.keys(), f"seed {seed}: {before.keys() ^ after.keys()}\n{source_of(seed)}"
        for name, value in before.items():
            torch.testing.assert_close(
                after[name], value, rtol=1e-8, atol=1e-8, msg=f"{name}, {seed}: {source_of(seed)}"
            )
    return True


@pytest.mark.parametrize("first", [0, pytest.param(100, marks=pytest.mark.slow)])
def test_random_forwards(first):
    seeds = range(first, 100 if first == 0 else 2000)
    assert sum(assert_like_eager(seed) for seed in seeds) > 0.4 * len(seeds)
