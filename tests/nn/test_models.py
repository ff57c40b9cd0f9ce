from __future__ import annotations

import ast
import inspect
import re
import sys

import pytest
import torch
from torch import nn

import fusedres
from fusedres import models
from tests import zoo

PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}
PREACT_PARAMETERS = {
    "preact_resnet18": 11_687_720,
    "preact_resnet34": 21_795_880,
    "preact_resnet50": 25_549_352,
    "preact_resnet101": 44_541_480,
    "preact_resnet152": 60_185_128,
    "preact_resnet200": 64_666_152,
}
CIFAR_PARAMETERS = {110: 1_730_522, 164: 1_703_258, 1001: 10_327_706}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_and_names_are_torchvisions(name):
    theirs = getattr(zoo.torchvision_models(), name)
    with torch.device("meta"):
        model, reference = getattr(models, name)(), theirs()
    assert parameters(model) == PARAMETERS[name]
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in reference.state_dict().items()}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_loads_torchvisions_weights_and_agrees(name):
    reference = getattr(zoo.torchvision_models(), name)(num_classes=7).double()
    model = getattr(models, name)(num_classes=7).double()
    model.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.eval()(x), reference.eval()(x), rtol=1e-10, atol=1e-10)


def test_initialisation_is_torchvisions():
    theirs = zoo.torchvision_models().resnet18
    torch.manual_seed(0)
    reference = theirs(zero_init_residual=True)
    torch.manual_seed(0)
    model = models.resnet18(zero_init_residual=True)
    # The orders of the random draws differ; the distributions are compared.
    for (name, ours), (_, its) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert ours.std(unbiased=False).item() == pytest.approx(its.std(unbiased=False).item(), rel=0.1), name
    assert all(block.bn2.weight.eq(0).all() for block in model.modules() if isinstance(block, models.BasicBlock))


@pytest.mark.parametrize("block", [models.BasicBlock, models.Bottleneck])
def test_small_images(block):
    model = models.ResNet(block, [1, 1, 1, 1], 10, in_channels=1, width=4, small_input=True)
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 10)
    assert model.layer1(model.conv1(torch.randn(3, 1, 8, 8))).shape[-2:] == (8, 8)


@pytest.mark.parametrize("name", PARAMETERS | PREACT_PARAMETERS)
def test_documented_parameter_count(name):
    function = getattr(models, name)
    with torch.device("meta"):
        count = parameters(function())
    assert count == (PARAMETERS | PREACT_PARAMETERS)[name]
    assert function.__doc__.startswith(f"{count:,} parameters")


@pytest.mark.parametrize("name", [name for name in PREACT_PARAMETERS if name != "preact_resnet200"])
def test_preact_parameter_count_is_timms(name):
    timm = zoo.timm_models()
    with torch.device("meta"):
        assert parameters(timm.create_model(name.replace("preact_resnet", "resnetv2_"))) == PREACT_PARAMETERS[name]


def from_timm(name: str) -> str:
    """A parameter's name in ours, given timm's."""
    for pattern, ours in (
        (r"^stem\.conv\.", "conv1."),
        (r"^stages\.(\d)\.blocks\.", lambda match: f"layer{int(match[1]) + 1}."),
        (r"\.downsample\.conv\.", ".downsample."),
        (r"\.norm(\d)\.", r".bn\1."),
        (r"^norm\.", "bn."),
        (r"^head\.fc\.", "fc."),
    ):
        name = re.sub(pattern, ours, name)
    return name


@pytest.mark.parametrize(("depth", "expansion"), [(18, 1), (50, 4)])
def test_preact_loads_timms_weights_and_agrees(depth, expansion):
    reference = zoo.timm_resnetv2(f"resnetv2_{depth}", layers=(2, 1, 2), width=8 * expansion)
    block = models.PreActBasicBlock if expansion == 1 else models.PreActBottleneck
    model = zoo.randomise(models.PreActResNet(block, [2, 1, 2], 5, width=8))
    weights = {from_timm(name): value for name, value in zoo.randomise(reference).state_dict().items()}
    weights["fc.weight"] = weights["fc.weight"].flatten(1)  # a 1x1 convolution there
    model.load_state_dict(weights)
    x = zoo.images(2, 3, 40, 40)
    for training in (True, False):
        ours, its = (zoo.step(m.train(training), x) for m in (model, reference))
        for name, value in its.items():
            kind, _, rest = name.partition(" ")
            mine = ours[f"{kind} {from_timm(rest)}" if rest else name]
            torch.testing.assert_close(mine.view_as(value), value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("depth", "block"),
    [
        (20, models.PreActBasicBlock),
        (56, models.PreActBasicBlock),
        (110, models.PreActBasicBlock),
        (1202, models.PreActBasicBlock),
        (29, models.PreActBottleneck),
        (164, models.PreActBottleneck),
        (200, models.PreActBottleneck),
        (1001, models.PreActBottleneck),
    ],
)
def test_cifar_depths(depth, block):
    with torch.device("meta"):
        model = models.preact_resnet_cifar(depth, shortcut="pad")
    assert {type(module) for name, module in model.named_modules() if re.fullmatch(r"layer\d\.\d+", name)} == {block}
    assert sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules()) == depth


@pytest.mark.parametrize("depth", CIFAR_PARAMETERS)
def test_documented_cifar_parameter_counts(depth):
    with torch.device("meta"):
        count = parameters(models.preact_resnet_cifar(depth))
    assert count == CIFAR_PARAMETERS[depth]
    assert f"{count:,}" in " ".join(str(models.preact_resnet_cifar.__doc__).split())


def test_cifar_block_can_be_chosen():
    for block in (models.PreActBasicBlock, models.PreActBottleneck, fusedres.nn.PreActBottleneck):
        model = models.preact_resnet_cifar(20, block=block, width=2)
        stage = list(model.get_submodule("layer3").children())
        assert [type(module) for module in stage] == [block] * (3 if block.expansion == 1 else 2)


@pytest.mark.parametrize(("depth", "block"), [(21, None), (2, None), (-4, None), (1001, models.PreActBasicBlock)])
def test_cifar_depth_that_fits_nothing(depth, block):
    with pytest.raises(ValueError, match=rf"6n \+ 2 .* 9n \+ 2 .* got {depth}"):
        models.preact_resnet_cifar(depth, block=block)


def test_unknown_shortcut():
    with pytest.raises(ValueError, match=r"shortcut must be one of .*'conv'"):
        models.preact_resnet18(shortcut="conv")


@pytest.mark.parametrize("shortcut", ["projection", "pad"])
@pytest.mark.parametrize("block", [models.PreActBasicBlock, models.PreActBottleneck])
def test_preact_shapes(block, shortcut):
    large = models.PreActResNet(block, [1, 2, 1, 1], 7, width=4, in_channels=1, shortcut=shortcut)
    small = models.PreActResNet(block, [1, 2, 1], 7, width=4, in_channels=1, shortcut=shortcut, small_input=True)
    for model, image, sizes in ((large, 64, (16, 8, 4, 2)), (small, 9, (9, 5, 3))):
        x = torch.randn(3, 1, image, image)
        assert model(x).shape == (3, 7)
        x = model.maxpool(model.conv1(x))
        for i, size in enumerate(sizes):
            x = model.get_submodule(f"layer{i + 1}")(x)
            assert x.shape == (3, block.expansion * 4 * 2**i, size, size)
        identities = [b.downsample is None for b in model.modules() if isinstance(b, block)]
        assert identities == [block.expansion == 1, False, True, *[False] * (len(sizes) - 2)]


def test_zero_padding():
    x = torch.randn(2, 3, 6, 8).to(memory_format=torch.channels_last)
    out = models.ZeroPadShortcut(3, 5, 2)(x)
    assert torch.equal(out[:, :3], x[:, :, ::2, ::2]) and not out[:, 3:].any()
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert not list(models.ZeroPadShortcut(3, 5).parameters())
    with pytest.raises(ValueError, match="2 channels out of 3"):
        models.ZeroPadShortcut(3, 2)


@pytest.mark.parametrize("shortcut", ["projection", "pad"])
@pytest.mark.parametrize("name", ["PreActBasicBlock", "PreActBottleneck"])
def test_checkpoints_go_both_ways_between_plain_and_fused_blocks(name, shortcut):
    options = {"num_classes": 5, "width": 4, "shortcut": shortcut, "small_input": True}
    plain = zoo.randomise(models.PreActResNet(getattr(models, name), [1, 2], **options))
    fused = models.PreActResNet(getattr(fusedres.nn, name), [1, 2], **options).double()
    fused.load_state_dict(plain.state_dict())
    zoo.assert_same_steps(fused, plain, zoo.images())
    again = models.PreActResNet(getattr(models, name), [1, 2], **options).double()
    again.load_state_dict(fused.state_dict())
    zoo.assert_same_steps(again, plain, zoo.images())


@pytest.mark.parametrize(("skip", "count"), [("identity", 26_272_768), ("linear", 27_321_344)])
def test_residual_mlp(skip, count):
    with torch.device("meta"):
        model = models.residual_mlp(skip=skip)
        assert model(torch.empty(2, 3, 128, 128)).shape == (2, 102)
    assert parameters(model) == count
    assert f"{count:,}" in str(models.residual_mlp.__doc__)
    model = models.residual_mlp(image_size=4, in_channels=1, width=8, depth=3, num_classes=5, skip=skip).double()
    x = zoo.images(2, 1, 4, 4)
    out = model.stem(x.flatten(1))
    for block in model.get_submodule("blocks").children():
        branch = block.norm(block.linear(out)).relu()
        out = branch + (block.skip(out) if skip == "linear" else out)
    torch.testing.assert_close(model(x), model.head(out))
    biases = {name for name, _ in model.named_parameters() if name.endswith("linear.bias")}
    assert biases == {f"blocks.{i}.linear.bias" for i in range(3)}
    assert not {"stem.bias", "head.bias"} & model.state_dict().keys()


def test_plain_mlp():
    model = models.plain_mlp(in_features=6, width=8, out_features=4, depth=3)
    assert [type(layer) for layer in model] == [nn.LayerNorm, nn.Linear, nn.ReLU] * 3
    assert all(layer.bias is None for layer in model if isinstance(layer, nn.LayerNorm))
    assert model(torch.randn(2, 5, 6)).shape == (2, 5, 4)
    single = models.plain_mlp(in_features=6, out_features=4, depth=1, bias=False)
    assert single[1].weight.shape == (4, 6) and single[1].bias is None


def test_mlp_errors():
    with pytest.raises(ValueError, match=r"skip must be one of .*'conv'"):
        models.residual_mlp(skip="conv")
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        models.plain_mlp(depth=0)


@pytest.mark.parametrize("kind", [models.ResNet, models.PreActResNet, models.ResidualMLPBlock])
def test_models_are_plain_pytorch(kind):
    tree = ast.parse(inspect.getsource(sys.modules[kind.__module__]))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(name and name.startswith("fusedres") for name in imported)


def test_v1_projection_is_a_sequential():
    assert isinstance(models.resnet50().layer1[0].downsample, nn.Sequential)
