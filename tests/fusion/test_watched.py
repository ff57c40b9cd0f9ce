"""Each case of watched.py against an eager twin: outputs, loss, gradients, buffers, and what hooks saw."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import fusedres
from fusedres import models
from tests import zoo, zoo_public
from tests.fusion.hooks import Log
from tests.fusion.ran import FUNCTIONS
from tests.fusion.trained import FORMATS, Decided, recorded_layers
from tests.fusion.watched import CASES, Case, example
from tests.oracle import assert_network_as_good_as_eager

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning"),
]
# Stem, projections, identities and head; and sums that pass from block to block. Both have the same names.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: zoo.resnet(models.Bottleneck, (2, 2), width=8, small_input=False),
    "preact": lambda: zoo.randomise(models.PreActResNet(models.PreActBasicBlock, (2, 2), 5, width=8, small_input=True)),
}


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build(network: str, case: Case) -> nn.Module:
    """In float32, on the values that float64 has."""
    torch.manual_seed(0)
    model = NETWORKS[network]().float()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = case.in_place
    return model


def made(model: nn.Module, case: Case, log: Log, when: str = "") -> nn.Module:
    """``model`` with the change of ``case``; fused before or after it where ``when`` says so."""
    if when == "after":
        fusedres.fuse(model)
    torch.manual_seed(2)
    changed = None if case.each else case.change(model, log)
    model = model if changed is None else changed
    return fusedres.fuse(model) if when == "before" else model


def run(model: nn.Module, case: Case, log: Log, x: Tensor) -> dict[str, Tensor]:
    """All that can be seen of a step in each mode."""
    values: dict[str, Tensor] = {}
    for mode in case.modes:
        if mode is not None:
            model.train(mode)
        if case.each:
            case.change(model, log)
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        outputs = dict(zoo_public._tensors("output", model(leaf)))
        for out in outputs.values():
            if out.requires_grad:
                out.retain_grad()
        torch.manual_seed(1)  # in float32, so that every dtype has the same cotangents
        loss = torch.stack([(out * torch.randn(out.shape).to(out.dtype)).sum() for out in outputs.values()]).sum()
        loss.backward()
        named = {**outputs, "loss": loss, "grad input": leaf.grad}
        named |= {f"grad {name}": parameter.grad for name, parameter in model.named_parameters()}
        named |= {f"grad {name}": out.grad for name, out in outputs.items()}
        named |= {f"retained {i}": value.grad for i, value in enumerate(log.kept)}
        named |= {f"{name} {i}": value for name, seen in log.seen.items() for i, value in enumerate(seen)}
        named |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
        values |= {f"{mode} {name}": whole(value) for name, value in named.items() if value is not None}
        log.kept.clear()
        log.seen.clear()
    return values


def whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


@contextmanager
def fused_calls() -> Iterator[list[str]]:
    """The names of the calls, on the reference path, of more than a BatchNorm."""
    calls: list[str] = []
    inside: list[str] = []

    def recorded(function: Callable[..., object], pattern: Callable[[dict[str, object]], str]) -> Callable[..., object]:
        def record(*args: object, **kwargs: object) -> object:
            if not inside and pattern(kwargs) != "bn":
                calls.append(pattern(kwargs))
            inside.append("")
            try:
                return function(*args, **kwargs)
            finally:
                inside.pop()

        return record

    patches = [
        mock.patch.object(owner, name, recorded(getattr(owner, name), pattern))
        for (owner, name), (_, pattern, _) in FUNCTIONS.items()
    ]
    for patch in patches:
        patch.start()
    try:
        yield calls
    finally:
        for patch in patches:
            patch.stop()


@functools.cache
def fused_alone(network: str, modes: tuple[bool | None, ...]) -> int:
    """How many calls are fused where nobody does anything."""
    torch.manual_seed(0)
    model = fusedres.fuse(NETWORKS[network]())
    with fused_calls() as calls, torch.no_grad():
        for mode in modes:
            model.train(bool(mode))(example(model))
    return len(calls)


ALL = [(name, when) for name, case in CASES.items() for when in case.when]
networks = pytest.mark.parametrize("network", NETWORKS)


@networks
@pytest.mark.parametrize(("name", "when"), ALL, ids=[f"{name}, {when}" for name, when in ALL])
@pytest.mark.usefixtures("reference_backend")
def test_as_eager(network, name, when, request):
    case = CASES[name]
    if case.group:
        request.getfixturevalue("group")
    model, logs = build(network, case).double(), (Log(), Log())
    x = example(model)
    expected = run(made(copy.deepcopy(model), case, logs[0]), case, logs[0], x)
    fused = made(model, case, logs[1], when)
    with fused_calls() as calls:
        actual = run(fused, case, logs[1], x)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, **zoo.TOLERANCE, msg=lambda text, key=key: f"{key}: {text}")
    assert len(calls) >= case.kept * fused_alone(network, case.modes)


def decided(model: nn.Module, case: Case) -> Tensor:
    """An input whose every ReLU is on the same side in each dtype."""
    for seed in range(50):
        torch.manual_seed(seed)
        x, log, twin = example(model), Log(), copy.deepcopy(model).double()
        if not case.group:  # which changes no value, and takes no dispatch mode
            twin = made(twin, case, log)
        try:
            with Decided():
                run(twin, case, log, x.double())
        except AssertionError:
            continue
        return x
    raise AssertionError("no such input")


ON_KERNELS = [(network, name) for name, case in CASES.items() for network in case.kernels]


@pytest.mark.parametrize(("network", "name"), ON_KERNELS)
def test_on_the_kernels(network, name, request, monkeypatch):
    """In training, where the case does not ask for other modes; fused first."""
    case = CASES[name]
    if case.modes == (True, False):
        case = replace(case, modes=(True,))
    if case.group:
        request.getfixturevalue("group")
    monkeypatch.setenv("FUSEDRES_BACKEND", "reference")
    model = build(network, case)
    x = decided(model, case)

    def outcome(dtype: torch.dtype, form: torch.memory_format, when: str) -> dict[str, Tensor]:
        log, twin = Log(), copy.deepcopy(model).to(dtype)
        values = run(made(twin, case, log, when), case, log, x.to(dtype).contiguous(memory_format=form))
        return {key: value for key, value in values.items() if "loss" not in key}  # a sum of either sign

    exact = outcome(torch.float64, torch.contiguous_format, "")
    eagers = [outcome(torch.float32, form, "") for form in FORMATS]
    with fused_calls() as calls:
        outcome(torch.float32, torch.contiguous_format, "after")
    monkeypatch.setenv("FUSEDRES_BACKEND", "triton")
    with recorded_layers() as seen:
        actual = outcome(torch.float32, torch.contiguous_format, "after")
    assert_network_as_good_as_eager(actual, eagers, exact)
    assert sum(n for pattern, n in seen.items() if pattern not in ("bn", "backward")) == len(calls)
