"""Every Python block of the README runs as it stands; libraries that are not installed are stood in for."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fusedres
from tests import zoo

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(text: str) -> str:
    """The one block with ``text`` in it."""
    [found] = [code for code in BLOCKS if text in code]
    return found


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(code, "<README.md>", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files go to a temporary folder, and interpreted kernels take too long for whole networks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUSEDRES_BACKEND", "auto" if torch.cuda.is_available() else "reference")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **names: Any) -> None:
    """A module of this name, unless there is a real one."""
    if importlib.util.find_spec(name) is None:
        module = types.ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)


def is_fused(model: nn.Module) -> bool:
    return any(type(part) is fusedres.nn.BatchNormAct2d for part in model.modules())


def changed(model: nn.Module, seed_of: nn.Module) -> bool:
    pairs = zip(model.parameters(), seed_of.parameters(), strict=True)
    return any(not torch.equal(one, other) for one, other in pairs)


def test_every_block_is_run_here():
    known = ("20-second", "torch.compile(model)", "import torchvision", "import timm", "import lightning", "accelerate")
    assert len(BLOCKS) == len(known)
    assert block("fusedres.unfuse(model)") is BLOCKS[0]
    assert all(len([code for code in BLOCKS if text in code]) == 1 for text in known[1:])


def test_example():
    names = run(block("fusedres.unfuse(model)"))
    assert not is_fused(names["model"])
    assert names["model"].conv1.weight.grad is not None


def test_plain_loop(monkeypatch):
    # Inductor compiles such models in test_fuse_compile.py; here a C++ compiler would take minutes.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    names = run(block("torch.compile(model)"))
    model, original = names["model"], names["original"]
    assert is_fused(model)
    assert not is_fused(original)
    state = original.state_dict()
    assert int(state["bn1.num_batches_tracked"]) == 2
    assert all(torch.equal(value.cpu(), state[name]) for name, value in model.state_dict().items())
    assert torch.isfinite(names["loss"])
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.cpu().eval()(x), original.eval()(x), rtol=1e-4, atol=1e-4)


def test_torchvision(capsys):
    zoo.torchvision_models()
    names = run(block("import torchvision"))
    assert is_fused(names["model"])
    assert 0 < sum(row["bytes_saved"] for row in names["report"].rows) == names["report"].bytes_saved
    assert "total" in capsys.readouterr().out


def test_timm():
    zoo.timm_models()
    names = run(block("import timm"))
    assert is_fused(names["model"])
    assert names["scores"].shape == (2, 10)


class LightningModule(nn.Module):
    """The hooks that a module of Lightning's has to define."""


class Trainer:
    """What Lightning's does in ``fit`` with one optimizer and mixed precision."""

    def __init__(self, *, max_epochs: int, precision: str, logger: bool, enable_checkpointing: bool) -> None:
        assert precision == "bf16-mixed"
        self.max_epochs, self.steps = max_epochs, 0

    def fit(self, model: Any, train_dataloaders: Any) -> None:
        optimizer = model.configure_optimizers()
        model.train()
        for _ in range(self.max_epochs):
            for batch_idx, batch in enumerate(train_dataloaders):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model.training_step(batch, batch_idx)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                self.steps += 1
        self.model = model


def test_lightning(monkeypatch):
    stand_in(monkeypatch, "lightning", LightningModule=LightningModule, Trainer=Trainer)
    names = run(block("import lightning"))
    model = names["trainer"].model.model
    assert is_fused(model)
    assert int(model.bn1.num_batches_tracked) == 2
    assert changed(model.bn1, nn.BatchNorm2d(16))


class Accelerator:
    """What accelerate's does on one device: forwards under autocast, in place of the method of the instance."""

    def __init__(self, *, mixed_precision: str) -> None:
        assert mixed_precision == "bf16"

    def prepare(self, model: Any, *others: Any) -> tuple[Any, ...]:
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
        return model, *others

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


def test_accelerate(monkeypatch):
    stand_in(monkeypatch, "accelerate", Accelerator=Accelerator)
    names = run(block("import accelerate"))
    model = names["model"]
    assert is_fused(model)
    assert torch.isfinite(names["loss"])
    assert int(model.bn1.num_batches_tracked) == 2
    assert changed(model.bn1, nn.BatchNorm2d(16).to(model.bn1.weight.device))
