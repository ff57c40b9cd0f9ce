"""Every Python block of README and docs runs as it stands; libraries that are not installed are stood in for."""

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

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCKS = [code for page in PAGES for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]
RUN = (  # a text of each block that a test below runs
    "fusedres.unfuse(model)", "torch.compile(model)", "import torchvision", "import timm", 'backend="fusedres"',
    "filter_fn=", "class Block", "import lightning", "import accelerate", "mkldnn.flags",
)  # fmt: skip


def run(text: str) -> dict[str, Any]:
    """The names of the one block with ``text`` in it, after it ran."""
    [code] = [code for code in BLOCKS if text in code]
    names: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(code, "<recipe>", "exec"), names)
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
    assert len(BLOCKS) == len(RUN)
    assert all(sum(text in code for text in RUN) == 1 for code in BLOCKS)


def test_example():
    names = run("fusedres.unfuse(model)")
    assert not is_fused(names["model"])
    assert names["model"].conv1.weight.grad is not None


def test_table_of_the_example(monkeypatch, device):
    """The README shows lines of what the example prints where kernels run, and says how many rows it leaves out."""
    monkeypatch.setenv("FUSEDRES_BACKEND", "auto")
    table = fusedres.explain(fusedres.models.resnet50().to(device), input=(256, 3, 224, 224))
    readme = PAGES[0].read_text()
    [shown] = re.findall(r"```\n(module .*?)```", readme, re.DOTALL)
    printed = iter(str(table).splitlines())
    lines = [line for line in shown.splitlines() if line != "..."]
    for line in lines:
        start, shortened, _ = line.partition(" ...")
        assert any(full == line or (shortened and full.startswith(start)) for full in printed), line
    rows = len(lines) - 3  # without the header, the total and the remark
    assert f"with {len(table.rows) - rows} of {len(table.rows)} rows left out" in readme


def test_plain_loop(monkeypatch):
    # Inductor compiles such models in tests/fusion/test_fuse_compile.py; here a C++ compiler would take minutes.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    names = run("torch.compile(model)")
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
    names = run("import torchvision")
    assert is_fused(names["model"])
    assert 0 < sum(row["bytes_saved"] for row in names["report"].rows) == names["report"].bytes_saved
    assert "total" in capsys.readouterr().out


def test_timm():
    zoo.timm_models()
    names = run("import timm")
    assert is_fused(names["model"])
    assert names["scores"].shape == (2, 10)


def test_backend(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, options={"stop": "eager"}))
    names = run('backend="fusedres"')
    assert not is_fused(names["model"])
    assert names["model"].conv1.weight.grad is not None


def test_parts_left_out():
    model = run("filter_fn=")["model"]
    assert type(model.layer4[0].bn1) is nn.BatchNorm2d and is_fused(model.layer3)
    patterns = {row["pattern"] for row in fusedres.explain(model).rows}
    assert "bn_act_maxpool" not in patterns and "bn_add_act" in patterns


def test_own_block():
    block = run("class Block")["block"]
    rows = fusedres.explain(block).rows
    assert [row["pattern"] for row in rows] == ["bn_act", "bn_add_act"]
    assert block.bn1.weight.grad is not None


def test_without_onednn():
    """Where the weight gradient of its first projection would corrupt memory, see docs/conversion.md."""
    names = run("mkldnn.flags")
    projection = names["model"].layer2[0].downsample[0]
    assert projection.in_channels == 4 and torch.isfinite(projection.weight.grad).all()


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
    names = run("import lightning")
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
    names = run("import accelerate")
    model = names["model"]
    assert is_fused(model)
    assert torch.isfinite(names["loss"])
    assert int(model.bn1.num_batches_tracked) == 2
    assert changed(model.bn1, nn.BatchNorm2d(16).to(model.bn1.weight.device))
