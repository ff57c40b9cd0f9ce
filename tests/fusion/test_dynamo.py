"""``torch.compile(model, backend="fusedres")``."""

from __future__ import annotations

import collections
import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func

import fusedres
from fusedres import models
from fusedres.fusion.dynamo import compile_fused
from tests import zoo
from tests.fusion.captured import Recorder
from tests.zoo import assert_same_steps, counts, images, randomise

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Whole(nn.Module):
    """Around a Sequential, which torch.compile does not take as a whole when it is compiled in place."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Norms(nn.Module):
    """BatchNorms of vectors and of volumes, frozen, untracked and without an affine map."""

    def __init__(self) -> None:
        super().__init__()
        self.volumes, self.vectors = nn.BatchNorm3d(3, affine=False), nn.BatchNorm1d(3, track_running_stats=False)
        self.frozen = nn.BatchNorm2d(3).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.volumes(x.unsqueeze(2))).squeeze(2)
        return (self.frozen(x) + x).relu() + self.vectors(x.flatten(2)).relu().view_as(x)

    def train(self, mode: bool = True) -> Norms:
        super().train(mode)
        self.frozen.eval()
        return self


LN_LINEAR, LINEAR_LN = "ln_linear_act", "linear_ln_act"
# Models, and what is found in each, in training and in evaluation.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "basic": (zoo.resnet, {"bn_act": 4, "bn_add_act": 2, "bn_add_bn_act": 1}),
    "shared relu": (
        lambda: zoo.HandResNet(zoo.HandBottleneck, [1, 1], width=4),
        {"bn_act_maxpool": 1, "bn_act": 4, "bn_add_bn_act": 2},
    ),
    "functional": (
        lambda: zoo.HandResNet(zoo.ResBlock, [1, 2], width=4),
        {"bn_act_maxpool": 1, "bn_act": 3, "bn_add_act": 1, "bn_add_bn_act": 1, "bn_add_act_avgpool": 1},
    ),
    "pre-activation": (
        lambda: zoo.HandPreActResNet(zoo.KuangliuBlock, [2, 2], width=4),
        {"bn_act": 5, "add_bn_act": 4},
    ),
    "identity first": (
        lambda: zoo.HandPreActResNet(zoo.ZeroPadBlock, [1, 2], width=4),
        {"bn_act": 4, "add_bn_act": 3},
    ),
    "preact_resnet": (
        lambda: models.preact_resnet_cifar(8, num_classes=5),
        {"bn_act": 4, "add_bn_act": 3},
    ),
    "norms": (Norms, {"bn_act": 2, "bn_add_act": 1}),
    "mlp": (lambda: Whole(nn.Flatten(), zoo.mlp((192, 16, 16, 5))), {LN_LINEAR: 3}),
    "residual_mlp": (
        lambda: Whole(models.residual_mlp(image_size=8, width=16, depth=2, num_classes=5)),
        {LINEAR_LN: 2},
    ),
    "functional mlp": (lambda: zoo.HandMLP(zoo.FunctionalMLPBlock, inputs=192), {LINEAR_LN: 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_each_mode_with_eager_results(name):
    build, found = MODELS[name]
    model = randomise(build())
    twin = copy.deepcopy(model)
    recorder = Recorder()
    twin.compile(backend=recorder, fullgraph=True)
    assert_same_steps(twin, model, images())
    modes = 2 if any("bn" in pattern for pattern in found) else 1
    assert recorder.graphs == [found] * modes  # no recompilation for the second step


DEEP = [3, 4, 6, 3]
FOUND = {"bn_act": 33, "bn_add_act": 11, "bn_add_bn_act": 4, "bn_add_act_avgpool": 1}


@pytest.mark.parametrize(("build", "found"), [
    (lambda: zoo.resnet(models.Bottleneck, (1, 2)), {"bn_act": 7, "bn_add_bn_act": 2, "bn_add_act_avgpool": 1}),
    pytest.param(lambda: models.ResNet(models.Bottleneck, DEEP, width=4, small_input=True), FOUND,
                 marks=pytest.mark.slow),
])  # fmt: skip
def test_the_same_is_found_as_in_a_fused_one(build, found):
    model, recorder = build().float(), Recorder()
    with torch.no_grad():
        torch.compile(model, backend=recorder, fullgraph=True)(images().float())
    assert recorder.graphs == [found] == [counts(fusedres.fuse(model))]


def test_a_fused_model():
    """Its rewritten forwards are captured like others; on the reference path the patterns are found again."""
    model = fusedres.fuse(zoo.resnet())
    twin, recorder = copy.deepcopy(model), Recorder()
    twin.compile(backend=recorder, fullgraph=True)
    assert_same_steps(twin, model, images())
    assert recorder.graphs == 2 * [MODELS["basic"][1]]


def operators(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, int]]:
    """The output of ``model`` compiled, and how often each fused operator is in AOTAutograd's forward graph."""
    called: collections.Counter[str] = collections.Counter()

    def note(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Any:
        for node in graph_module.graph.nodes:
            # An operator that mutates is an argument of a functional form of it.
            for value in (node.target, *node.args):
                if isinstance(value, torch._ops.OpOverload) and value.namespace == "fusedres":
                    called[value._schema.name.removeprefix("fusedres::")] += 1
        return make_boxed_func(graph_module.forward)

    with mock.patch.object(torch._dynamo, "lookup_backend", lambda name: aot_autograd(fw_compiler=note)):
        out = torch.compile(model, backend=compile_fused, options={"stop": "noted"}, fullgraph=True)(x)
    return out, dict(called)


KERNELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "residual": (lambda: zoo.ResBlock(3, 3), {"batch_norm_act": 2}),
    "pre-activation": (
        lambda: Whole(zoo.KuangliuBlock(3, 3), zoo.KuangliuBlock(3, 3)),
        {"batch_norm_act": 3, "add_batch_norm_act": 1},
    ),
    "mlp": (lambda: Whole(nn.Flatten(), zoo.MLPBlock(48, 48), zoo.mlp((48, 8))), {
        "linear_layer_norm_act": 1, "layer_norm_linear_act": 1,
    }),
}  # fmt: skip


@pytest.mark.floor
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_run(name, channels_last):
    build, expected = KERNELS[name]
    model = build()
    reference = copy.deepcopy(model)
    form = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=form)
    out, called = operators(model, x)
    assert called == expected
    with mock.patch.dict("os.environ", FUSEDRES_BACKEND="reference"):
        wanted = reference(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    wanted.backward(grad)
    assert out.stride() == wanted.stride()
    tolerance: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(out, wanted, **tolerance)
    for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, **tolerance)
    for buffer, other in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, **tolerance)


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside):
    """Around the model and in its forward: dtypes and values are those without the fusion."""

    class Cast(Whole):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                return self.layers(x)

    model = Cast(zoo.ResBlock(3, 3), nn.Flatten(), zoo.MLPBlock(48, 48)).eval()
    x = torch.randn(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside), torch.no_grad():
        expected = model(x)
        out, called = operators(model, x)
    assert called == {"batch_norm_act_inference": 2, "linear_layer_norm_act": 1}
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("triton_backend")
def test_inductor():
    """Kernels in Inductor's code, and statistics updated once a call; without a backward, which is slow to compile."""
    model = Whole(nn.BatchNorm2d(3), nn.ReLU())
    reference, x = copy.deepcopy(model), torch.randn(2, 3, 5, 5)
    compiled = torch.compile(model, backend=compile_fused, fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), reference(x), rtol=1e-4, atol=1e-4)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.usefixtures("triton_backend")
def test_inductor_trains(caplog):
    """Two steps in one graph: kernels in Inductor's code, and statistics updated once a step."""
    model = Whole(zoo.conv(3, 3, 1), zoo.ResBlock(3, 3))
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend=compile_fused, fullgraph=True)
    pairs = [
        (run, torch.optim.SGD(module.parameters(), lr=0.1)) for run, module in ((compiled, model), (reference,) * 2)
    ]
    with caplog.at_level("DEBUG", "fusedres.fusion.dynamo"):
        for _ in range(2):
            x, grad = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
            for run, optimizer in pairs:
                optimizer.zero_grad()
                run(x).backward(grad)
                optimizer.step()
    found = [record.getMessage() for record in caplog.records if record.name == "fusedres.fusion.dynamo"]
    assert found == ["{'bn_act': 1, 'bn_add_act': 1}"]
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-4, msg=name)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_mode_and_options_go_to_inductor():
    graph_module = fx.symbolic_trace(nn.Identity())
    with mock.patch("torch._inductor.compile_fx.compile_fx") as inductor:
        compile_fused(graph_module, [])
        compile_fused(graph_module, [], mode="reduce-overhead")
        compile_fused(graph_module, [], options={"max-autotune": True})  # torch.compile takes it with a hyphen too
    patches = [call.kwargs["config_patches"] for call in inductor.call_args_list]
    assert patches == [{}, {"triton.cudagraphs": True}, {"max_autotune": True}]


@pytest.mark.parametrize(("options", "message"), [
    ({"nonsense": 1}, "Unexpected optimization option nonsense"),
    ({"max_autotune": "yes"}, "Unexpected type of attr max_autotune"),
])  # fmt: skip
def test_options_are_checked_as_inductors(options, message):
    with pytest.raises(RuntimeError, match=message):
        compile_fused(fx.symbolic_trace(nn.Identity()), [], options=options)


def test_stop_takes_no_options():
    graph_module = fx.symbolic_trace(nn.Identity())
    with pytest.raises(ValueError, match="stop='eager' takes no mode and no other options, got mode='max-autotune'"):
        compile_fused(graph_module, [], mode="max-autotune", options={"stop": "eager"})


SCRIPT = """
import sys
import torch
import fusedres
assert "fusedres.fusion.dynamo" not in sys.modules and "torch._inductor.compile_fx" not in sys.modules
assert "fusedres" in torch.compiler.list_backends()
model = fusedres.nn.BatchNormAct2d(3)
compiled = torch.compile(model, backend="fusedres", options={"stop": "eager"}, fullgraph=True)
compiled(torch.randn(2, 3, 4, 4)).sum().backward()
assert int(model.num_batches_tracked) == 1
"""


def test_found_by_name(tmp_path):
    """By the entry point that pyproject.toml declares; read from an installed distribution's metadata."""
    section = (ROOT / "pyproject.toml").read_text().split("[project.entry-points.torch_dynamo_backends]\n")[1]
    line = section.splitlines()[0].replace('"', "")
    information = tmp_path / "declared-0.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: declared\nVersion: 0.0\n")
    (information / "entry_points.txt").write_text(f"[torch_dynamo_backends]\n{line}\n")
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n{SCRIPT}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
