"""What conversion promises for blocks of LayerNorm and Linear, and what happens to them after fuse."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import fusedres
from tests import zoo
from tests.fusion.linear_parts import BUILDS, LINEAR_LN, LN_LINEAR, block_of, plain, randomised, residual, rows
from tests.zoo import TOLERANCE, assert_same_steps, counts


@pytest.mark.parametrize("build", BUILDS)
def test_twice_is_once_and_unfuse_restores(build):
    model = build()
    classes, attributes = [type(m) for m in model.modules()], [set(vars(m)) for m in model.modules()]
    state, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    once = [type(module) for module in fusedres.fuse(model).modules()]
    assert once != classes
    assert [type(module) for module in fusedres.fuse(model).modules()] == once
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(build().state_dict())
    build().load_state_dict(model.state_dict())
    model.load_state_dict(state, assign=True)
    assert counts(model) == BUILDS[build]
    fusedres.unfuse(model)
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == attributes


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_fused_and_independent(build, how):
    model = fusedres.fuse(build())
    duplicate = how(model)
    assert [type(module) for module in duplicate.modules()] == [type(module) for module in model.modules()]
    assert not {id(p) for p in model.parameters()} & {id(p) for p in duplicate.parameters()}
    assert_same_steps(duplicate, model, rows())


def test_torch_save(tmp_path):
    model = fusedres.fuse(residual())
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert counts(loaded) == {LINEAR_LN: 2}
    assert_same_steps(loaded, model, rows())


def test_a_fused_sequential_is_a_sequential():
    model = fusedres.fuse(plain())
    assert isinstance(model, nn.Sequential)
    assert len(model) == 6
    assert [type(module) for module in model] == [nn.LayerNorm, nn.Linear, nn.ReLU] * 2
    x = rows()
    torch.testing.assert_close(model[:2](x), nn.Sequential(model[0], model[1])(x))
    reference = copy.deepcopy(model)
    for candidate in (model, fusedres.unfuse(reference)):
        torch.manual_seed(1)
        candidate.append(nn.Tanh())
        candidate[1] = nn.Linear(8, 8, dtype=torch.float64)
    assert_same_steps(model, reference, rows())


def test_an_optimizer_made_before_still_trains():
    histories = []
    for convert in (True, False):
        torch.manual_seed(0)
        model = residual()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        if convert:
            fusedres.fuse(model)
        x, losses = rows(4, 8), []
        for _ in range(4):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), torch.tensor([1, 3, 0, 2]))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        histories.append(torch.stack(losses))
    torch.testing.assert_close(*histories, **TOLERANCE)


def test_frozen_and_shared_layers():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.ln, self.tied = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
            self.tied.weight = self.fc.weight
            self.ln.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            x = x + F.relu(self.ln(self.fc(x)))
            x = x + F.relu(self.ln(self.fc(x)))
            return F.relu(self.tied(self.ln(x)))

    model = randomised(Shared())
    reference = copy.deepcopy(model)
    assert counts(fusedres.fuse(model)) == {LINEAR_LN: 2, LN_LINEAR: 1}
    assert model.get_parameter("tied.weight") is model.get_parameter("fc.weight")
    assert_same_steps(model, reference, rows())


def test_gradient_checkpointing_and_transforms():
    model, x = residual(), rows()
    reference = copy.deepcopy(model)
    fusedres.fuse(model)
    for candidate in (model, reference):
        blocks = candidate.get_submodule("blocks")
        blocks.forward = functools.partial(checkpoint, blocks.forward, use_reentrant=False)
    assert_same_steps(model, reference, x)
    values = {name: p.detach() * 1.1 for name, p in model.named_parameters()}
    for candidate in (model, reference):
        del candidate.get_submodule("blocks").forward
    ours, its = (
        torch.func.grad(lambda v, m=m: torch.func.functional_call(m, v, (x,)).square().sum())(values)
        for m in (model, reference)
    )
    for name, value in its.items():
        torch.testing.assert_close(ours[name], value, **TOLERANCE)


class LoRALinear(nn.Linear):
    """A Linear with an adapter, as fine-tuning libraries put in its place."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * 2, self.bias)


class Wrapper(nn.Module):
    """Around a Linear, with its attributes."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias

    def forward(self, input: Tensor) -> Tensor:
        return self.base(input) * 3


class Quantized(Tensor):
    """A tensor subclass that multiplies in its own way, like those that quantize the weight of a plain nn.Linear."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result * 4 if func is F.linear else result


def replace(block: nn.Module, name: str, build: Callable[[Any], nn.Module]) -> None:
    setattr(block, name, build(getattr(block, name)))


def as_class(kind: type[nn.Module]) -> Callable[[Any], nn.Module]:
    def change(module: nn.Module) -> nn.Module:
        module.__class__ = kind
        return module

    return change


def patched(module: nn.Module) -> nn.Module:
    module.forward = lambda x, forward=module.forward: forward(x) + 1
    return module


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *args: args[-1] * 2)
    return module


def quantized(module: nn.Linear) -> nn.Linear:
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Quantized), requires_grad=False)
    return module


CHANGES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "LoRA": (lambda b: replace(b, "fc", as_class(LoRALinear)), "its weights are not plain tensors"),
    "wrapper": (lambda b: replace(b, "fc", Wrapper), "mul is between it and the Linear"),
    "parametrized": (lambda b: parametrizations.weight_norm(b.fc), "ParametrizedLinear is not nn.Linear"),
    "spectral_norm": (lambda b: nn.utils.spectral_norm(b.fc), "the Linear fc: it has hooks"),
    "pruned": (lambda b: prune.l1_unstructured(b.fc, "weight", 0.5), "the Linear fc: it has hooks"),
    "patched linear": (lambda b: replace(b, "fc", patched), "the Linear fc: its forward was replaced"),
    "hooked linear": (lambda b: replace(b, "fc", hooked), "the Linear fc: it has hooks"),
    "subclassed norm": (
        lambda b: replace(b, "ln", as_class(type("Own", (nn.LayerNorm,), {}))),
        "Own is not nn.LayerNorm",
    ),
    "patched norm": (lambda b: replace(b, "ln", patched), "its forward was replaced"),
    "hooked norm": (lambda b: replace(b, "ln", hooked), "it has hooks"),
    "another norm": (lambda b: replace(b, "ln", lambda _: nn.RMSNorm(8, dtype=torch.float64)), ""),
    "norm for linear": (lambda b: replace(b, "fc", lambda _: nn.LayerNorm(8, dtype=torch.float64)), ""),
    "quantized": (lambda b: replace(b, "fc", quantized), "the Linear fc: its weight is a Quantized"),
}


def linear_first(self, x):
    return self.relu(self.ln(self.fc(x))) + x


def norm_first(self, x):
    return self.relu(self.fc(self.ln(x)))


# The same is looked at in both orders: of the second, a change of each layer and one of a tensor.
@pytest.mark.parametrize(("change", "forward"), [
    *((change, linear_first) for change in CHANGES),
    *((change, norm_first) for change in ("LoRA", "hooked norm", "quantized", "norm for linear")),
])  # fmt: skip
def test_layers_of_other_kinds(change, forward):
    """Changed before fuse they are left alone and reported; changed afterwards the block does what it then says."""
    apply, reason = CHANGES[change]
    block, x = block_of(forward).eval(), rows()
    fused = fusedres.fuse(copy.deepcopy(block))
    assert counts(fused) in ({LINEAR_LN: 1}, {LN_LINEAR: 1})
    late = copy.deepcopy(fused)
    for candidate in (block, late):
        torch.manual_seed(1)
        apply(candidate)
    expected = block(x)
    torch.testing.assert_close(late(x), expected, **TOLERANCE)
    before = type(block)
    fusedres.fuse(block)
    torch.testing.assert_close(block(x), expected, **TOLERANCE)
    if change != "norm for linear":  # then there is another pair
        assert type(block) is before
        assert [row["pattern"] for row in fusedres.explain(block).rows] == ["ln"] * bool(reason)
    if reason:
        assert reason in fusedres.explain(block).rows[0]["reason"]
    fusedres.fuse(late)
    torch.testing.assert_close(late(x), expected, **TOLERANCE)


def test_lazy_layers():
    model = nn.Sequential(nn.LazyLinear(8), nn.LayerNorm(8), nn.ReLU())
    fusedres.fuse(model)
    assert "LazyLinear is not nn.Linear" in fusedres.explain(model).rows[0]["reason"]
    model(torch.randn(2, 4))
    assert counts(fusedres.fuse(model)) == {LINEAR_LN: 1}


def test_parameters_replaced_after_fuse():
    block = block_of(linear_first)
    reference = copy.deepcopy(block)
    fusedres.fuse(block)
    for candidate in (block, reference):
        torch.manual_seed(2)
        candidate.fc.weight = nn.Parameter(torch.randn(8, 8, dtype=torch.float64))
        candidate.fc.register_parameter("bias", None)
        candidate.ln.register_parameter("bias", None)
        candidate.ln.eps = 0.1
    assert counts(block) == {LINEAR_LN: 1}
    assert_same_steps(block, reference, rows())
    assert counts(fusedres.fuse(block)) == {LINEAR_LN: 1}


def test_functional_parameters_that_go_or_change():
    block, x = randomised(zoo.FunctionalMLPBlock(8, 8)), rows()
    for change in (
        lambda b: setattr(b, "ln_bias", None),
        lambda b: setattr(b, "bias", nn.Parameter(torch.ones(8).double())),
        lambda b: setattr(b, "bias", nn.Parameter(torch.ones(1).double())),
        lambda b: setattr(b, "skip", nn.Parameter(torch.ones(8, 8).double())),
        lambda b: setattr(b, "weight", nn.Parameter(b.weight.detach().as_subclass(Quantized), requires_grad=False)),
    ):
        fused, reference = fusedres.fuse(copy.deepcopy(block)), copy.deepcopy(block)
        for candidate in (fused, reference):
            change(candidate)
        torch.testing.assert_close(fused(x), reference(x), **TOLERANCE)
        torch.testing.assert_close(fusedres.fuse(fused)(x), reference(x), **TOLERANCE)


def test_hooks_see_what_they_saw():
    model, x = residual(), rows()
    reference = copy.deepcopy(model)
    fusedres.fuse(model)
    logs: tuple[list[Tensor], list[Tensor]] = ([], [])
    for log, candidate in zip(logs, (model, reference), strict=True):
        norm = candidate.get_submodule("blocks.0.norm")
        norm.register_forward_hook(lambda *seen, log=log: log.extend((seen[1][0].detach(), seen[2].detach())))
    assert_same_steps(model, reference, x)
    assert len(logs[0]) == len(logs[1]) == 6
    for ours, its in zip(*logs, strict=True):
        torch.testing.assert_close(ours, its, **TOLERANCE)
    assert counts(model) == {LINEAR_LN: 1, "ln": 1}


def test_filter_fn():
    model = residual()
    reference = copy.deepcopy(model)
    fusedres.fuse(model, lambda module, name: name not in ("blocks.0.linear",))
    found = {row["module"]: (row["pattern"], row["path"]) for row in fusedres.explain(model).rows}
    assert found["blocks.0.norm"] == ("ln", "eager")
    assert found["blocks.1.norm"][0] == LINEAR_LN
    assert_same_steps(model, reference, rows())
    block = block_of(lambda self, x: self.relu(self.ln(self.fc(x))) + self.fc2(self.ln2(x)))
    fusedres.fuse(block, lambda module, name: name != "ln2")
    assert [(row["pattern"], row["reason"]) for row in fusedres.explain(block).rows][1] == ("ln", "filter_fn")
