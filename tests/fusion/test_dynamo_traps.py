"""Forwards in which a fusion on the captured graph would go wrong if it looked less closely."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.fusion.captured import Recorder
from tests.zoo import TOLERANCE, images, randomise

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Model(nn.Module):
    """A convolution, two BatchNorms, a Linear and a LayerNorm, used as ``body`` likes."""

    def __init__(self, body: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        self.body = body
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn, self.other = nn.BatchNorm2d(3, **options), nn.BatchNorm2d(3)
        self.ln, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)
        self.relu = nn.ReLU(inplace=True)
        self.register_buffer("extra", torch.ones(3))

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def in_place_relu_read_before(m, x):
    y = m.bn(x)
    return y * 2 + F.relu_(y)


def in_place_relu_through_a_view(m, x):
    y = m.bn(x)
    y.view(-1)[:5].zero_()
    return F.relu(y)


def relu_then_change(m, x):
    y = m.bn(x)
    z = F.relu(y)
    y.add_(1)
    return z + y


def output_used_twice(m, x):
    y = m.bn(x)
    return F.relu(y) + y.sigmoid()


def into_the_residual(m, x):
    r = m.conv(x)
    s = r.sigmoid()
    r += m.bn(x)
    return F.relu(r) + s


def into_a_read_residual(m, x):
    r = m.conv(x)
    kept = r.view(r.shape)
    r += m.bn(x)
    return r.relu() + kept


def into_the_input(m, x):
    x = x.clone()
    y = m.bn(x)
    x.mul_(2)
    return F.relu(y + x)


def input_changed_before_the_addition(m, x):
    h = m.conv(x)
    y = m.bn(h)
    h.mul_(3)
    return F.relu(y + h)


def same_norm_twice(m, x):
    y = m.bn(m.conv(x))
    z = m.bn(x)
    return F.relu(y + z)


def statistics_read_between(m, x):
    y = m.bn(x)
    scale = m.bn.running_mean.sum()
    return F.relu(y + m.conv(x) * scale)


def statistics_changed_between(m, x):
    y = m.bn(x)
    m.bn.running_mean.mul_(0.5)
    return F.relu(y + m.conv(x))


def weights_changed_between(m, x):
    y = m.bn(x)
    with torch.no_grad():
        m.bn.weight.mul_(0.5)
    return F.relu(y + m.conv(x))


def counter_read(m, x):
    y = m.bn(x)
    return F.relu(y + m.conv(x)) * m.bn.num_batches_tracked


def scaled_addition(m, x):
    return F.relu(torch.add(m.bn(x), m.conv(x), alpha=2))


def broadcast_residual(m, x):
    return F.relu(m.bn(x) + m.conv(x).mean((2, 3), keepdim=True))


def broadcast_into_the_norm(m, x):
    return F.relu(m.bn(x).mean((2, 3), keepdim=True) + m.other(x))


def number_as_residual(m, x):
    return F.relu(m.bn(x) + 1)


def single_precision_residual(m, x):
    return F.relu(m.bn(x) + m.conv(x).float())


def twice_the_same(m, x):
    y = m.bn(x)
    return F.relu(y + y)


def dropout_between(m, x):
    return F.relu(F.dropout(m.bn(x), 0.0) + x)


def without_gradient(m, x):
    with torch.no_grad():
        y = m.bn(x)
    return F.relu(y + m.conv(x))


def relu_without_gradient(m, x):
    y = m.bn(m.conv(x))
    with torch.no_grad():
        z = F.relu(y)
    return z + x


def in_two_autocasts(m, x):
    y = m.bn(m.conv(x))
    with torch.autocast("cpu", torch.bfloat16):
        z = F.relu(m.fc(y))
    return m.ln(z.to(x.dtype)) + y


def checkpointed(m, x):
    def block(x):
        return F.relu(m.bn(m.conv(x)) + x)

    return F.relu(m.other(checkpoint(block, x, use_reentrant=False)))


def sum_is_returned(m, x):
    s = m.conv(x) + x
    return s, F.relu(m.bn(s))


def sum_is_changed(m, x):
    s = m.conv(x) + x
    y = F.relu(m.bn(s))
    s.mul_(2)
    return y + s


def sum_in_place(m, x):
    s = m.conv(x)
    s += x
    return F.relu(m.bn(s)) + m.conv(s)


def sum_of_two_dtypes(m, x):
    s = m.conv(x) + x.float()
    return F.relu(m.bn(s)) + s


def sum_detached(m, x):
    s = m.conv(x) + x
    return F.relu(m.bn(s)) + s.detach()


def sum_normalised_twice(m, x):
    s = m.conv(x) + x
    return F.relu(m.bn(s)) + F.relu(m.other(s)) + s


def linear_weight_changed(m, x):
    y = m.fc(x)
    with torch.no_grad():
        m.fc.weight.mul_(0.5)
    return F.relu(m.ln(y))


def linear_of_a_computed_weight(m, x):
    return F.relu(m.ln(F.linear(x, m.fc.weight * 2, m.fc.bias)))


def linear_twice(m, x):
    return m.fc(F.relu(m.ln(m.fc(x)))) + x


def linear_output_changed(m, x):
    y = m.fc(x)
    y[..., 0] = 0
    return F.relu(m.ln(y))


def addition_into_a_residual(m, x):
    r = m.conv(x)
    kept = r * 1
    r += F.relu(m.ln(m.fc(x)))
    return r + kept


def norm_without_statistics(m, x):
    return F.relu(F.batch_norm(x, None, None, training=True))


def functional_norm_of_keywords(m, x):
    y = F.batch_norm(input=x, running_mean=m.extra, running_var=m.bn.running_var, training=True, momentum=0.3)
    return F.relu(y + m.conv(x)) * m.extra.sum()


def shared_statistics(m, x):
    y = F.batch_norm(x, m.bn.running_mean, m.bn.running_var, training=True)
    return F.relu(y + m.bn(m.conv(x)))


def graph_input_changed(m, x):
    x = m.conv(x)
    torch._dynamo.graph_break()
    y = m.bn(x)
    x.mul_(2)
    return F.relu(y + x)


FOUND = {  # the patterns, in training and in evaluation, and the bodies in which they are found
    "bn": (
        "dropout_between", "graph_input_changed", "in_place_relu_read_before", "in_place_relu_through_a_view",
        "in_two_autocasts", "input_changed_before_the_addition", "into_a_read_residual", "into_the_input",
        "into_the_residual", "number_as_residual", "output_used_twice", "relu_then_change", "relu_without_gradient",
        "scaled_addition", "twice_the_same", "without_gradient",
    ),
    "": (
        "functional_norm_of_keywords", "shared_statistics", "statistics_changed_between", "statistics_read_between",
        "weights_changed_between",
    ),
    "ln": ("linear_of_a_computed_weight", "linear_output_changed", "linear_weight_changed"),
    "linear_ln_act": ("addition_into_a_residual", "linear_twice"),
    "bn_add_act": ("broadcast_residual", "counter_read", "single_precision_residual"),
    "bn bn_add_act": ("same_norm_twice",),
    "bn_add_act bn_avgpool": ("broadcast_into_the_norm",),
    "bn_act": ("norm_without_statistics", "sum_is_changed", "sum_is_returned"),
    "add_bn_act": ("sum_detached", "sum_in_place", "sum_of_two_dtypes"),
    "add_bn_act bn_act": ("sum_normalised_twice",),
}  # fmt: skip
BODIES = {
    name: body
    for name, body in list(globals().items())
    if getattr(body, "__code__", None) and body.__code__.co_varnames[:2] == ("m", "x")
}
# Eager PyTorch refuses their backward: something that it saved is changed.
FORWARD_ONLY = {
    "into_the_input", "input_changed_before_the_addition", "statistics_changed_between", "weights_changed_between",
    "counter_read", "sum_is_changed", "linear_weight_changed", "graph_input_changed",
}  # fmt: skip
# Whose tracing by AOTAutograd, and what becomes of mutations and contexts there, is looked at too.
TRACED = [
    "into_the_residual", "same_norm_twice", "counter_read", "single_precision_residual", "without_gradient",
    "in_two_autocasts", "checkpointed", "sum_is_returned", "sum_of_two_dtypes", "addition_into_a_residual",
]  # fmt: skip


def run(model: nn.Module, compiled: Callable[..., Any], x: Tensor, backward: bool) -> dict[str, Any]:
    """Everything that can be seen of one call: outputs, gradients, parameters and buffers afterwards."""
    model.zero_grad()
    torch.manual_seed(1)
    x = x.clone().requires_grad_(backward)
    with torch.set_grad_enabled(backward):
        outputs = compiled(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if backward:
        torch.autograd.backward(outputs, [torch.randn_like(out) for out in outputs])
    values = {f"output {i}": out.detach() for i, out in enumerate(outputs)} | {"input": x.grad}
    values |= {f"grad {name}": p.grad for name, p in model.named_parameters()}
    return values | {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def check(body: str, model: nn.Module, expect: Callable[..., Any], stop: str) -> list[dict[str, int]]:
    """Compare ``expect``, which runs ``model``, with a compiled copy; what was found in the copy's graphs."""
    twin = copy.deepcopy(model)
    recorder = Recorder(stop)
    compiled = torch.compile(twin, backend=recorder)
    x = images(2, 3, 2, 8)
    for training in (True, False):
        expected = run(model.train(training), expect, x, body not in FORWARD_ONLY)
        actual = run(twin.train(training), compiled, x, body not in FORWARD_ONLY)
        for name, value in expected.items():
            if value is None or actual[name] is None:
                assert value is actual[name], name
            else:
                assert actual[name].dtype == value.dtype, name
                torch.testing.assert_close(actual[name], value, **TOLERANCE, msg=lambda text, name=name: name + text)
    return recorder.graphs


@pytest.mark.parametrize(("body", "patterns"), [(body, names) for names, bodies in FOUND.items() for body in bodies])
def test_same_as_eager(body, patterns):
    model = randomise(Model(BODIES[body]))
    found, expected = check(body, model, model, "eager"), dict.fromkeys(patterns.split(), 1)
    assert expected in found and all(graph in ({}, expected) for graph in found)  # {}: before a graph break


def test_every_body_is_looked_at():
    assert {body for bodies in FOUND.values() for body in bodies} == BODIES.keys() - {"checkpointed"}


@pytest.mark.parametrize("body", TRACED)
def test_same_through_aot_autograd(body):
    """Against AOTAutograd alone, which updates statistics once where a checkpoint's recomputation does so again."""
    model = randomise(Model(BODIES[body]))
    check(body, model, torch.compile(model, backend="aot_eager"), "aot_eager")
