"""torchvision's and timm's networks: how each is built small, what it takes, and what one step of it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn

from fusedres import reference
from tests import zoo

# Those without a BatchNorm2d, by the beginning of their names.
_NORMLESS = ("alexnet", "convnext", "squeezenet", "swin", "vit", "vgg11", "vgg13", "vgg16", "vgg19")
_TIMM_MODULES = (
    "resnet", "resnetv2", "regnet", "res2net", "sknet", "resnest", "dla", "cspnet", "vovnet", "byobnet", "densenet",
)  # fmt: skip
_OTHER_NORMS = ("_gn", "_bit", "_evos", "_frn", "_sgn")
# More than 400 million parameters, in float64 with gradients; smaller ones of their kind are taken.
_HUGE = ("regnet_y_128gf", "regnety_1280", "regnety_2560", "resnext101_32x32d")
_BYOBNET = "repvgg"  # the family of that module which is meant


@dataclass(frozen=True)
class Entry:
    """A network by name; ``build`` makes it, ``size`` is the side of the images that it takes."""

    build: Callable[[], nn.Module]
    size: int = 32


def _vision(name: str, **options: object) -> Callable[[], nn.Module]:
    if not name.startswith(("deeplab", "fcn", "lraspp")):
        return lambda: zoo.torchvision_models().get_model(name, num_classes=5, **options)
    options["weights_backbone"] = None
    return lambda: zoo.torchvision_models().segmentation.__dict__[name](num_classes=5, **options)


def _timm(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: zoo.timm_models().create_model(name, num_classes=5, **options)


def _cspnet() -> nn.Module:
    zoo.timm_models()
    from timm.models.cspnet import CspStagesCfg

    return _timm("cspresnet50", stages=CspStagesCfg((1, 1), (16, 32), (1, 2), expand_ratio=2.0, cross_linear=True))()


def _repvgg() -> nn.Module:
    zoo.timm_models()
    from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

    blocks = tuple(ByoBlockCfg(type="rep", d=2, c=channels, s=2, gs=0) for channels in (8, 16))
    return ByobNet(ByoModelCfg(blocks, stem_type="rep", stem_chs=8), num_classes=5)


def _regnet() -> nn.Module:
    zoo.torchvision_models()
    from torchvision.models.regnet import BlockParams, RegNet

    return RegNet(BlockParams([1, 2], [16, 24], [8, 8], [1.0, 1.0], [2, 2], se_ratio=0.25), num_classes=5)


def _resnet(block: str = "Bottleneck", **options: object) -> nn.Module:
    models = zoo.torchvision_models()
    return models.ResNet(getattr(models.resnet, block), ONES, num_classes=5, **options)


def _densenet() -> nn.Module:
    return zoo.torchvision_models().DenseNet(8, (2, 2), 16, num_classes=5, drop_rate=0.3)


def _segmentation(kind: str) -> nn.Module:
    """With the head for training alone."""
    zoo.torchvision_models()
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    backbone = IntermediateLayerGetter(_resnet("BasicBlock"), {"layer4": "out", "layer3": "aux"})
    if kind == "fcn":
        return FCN(backbone, FCNHead(512, 5), FCNHead(256, 5))
    return DeepLabV3(backbone, DeepLabHead(512, 5), FCNHead(256, 5))


ONES = [1, 1, 1, 1]
# For every run of the tests, as shallow as they go: one for each way of writing a forward. Families that differ from
# these in their widths, groups and activations alone, or have other layers around the same blocks, are in full() only.
SMALL = {
    "densenet": Entry(_densenet),
    "regnet": Entry(_regnet),
    "resnet": Entry(lambda: _resnet(width_per_group=16)),
    "shufflenet": Entry(_vision("shufflenet_v2_x0_5")),
    "deeplabv3": Entry(lambda: _segmentation("deeplabv3")),
    "timm resnet": Entry(_timm("resnet10t")),
    "timm seresnet": Entry(_timm("seresnet18", layers=ONES)),
    "timm resnetv2": Entry(lambda: zoo.timm_resnetv2("resnetv2_50", (1, 2))),
    "timm res2net": Entry(_timm("res2net50_26w_4s", layers=ONES, base_width=4)),
    "timm resnest": Entry(_timm("resnest14d", base_width=8)),
    "timm cspresnet": Entry(_cspnet),
    "timm repvgg": Entry(_repvgg),
    "timm densenet": Entry(_timm("densenet121", block_config=(2, 2), growth_rate=8)),
}
# One a family: what is found in them is compared, and none is run.
FAMILIES = SMALL | {
    "googlenet": Entry(_vision("googlenet", init_weights=False), 64),
    "mnasnet": Entry(_vision("mnasnet0_5")),
    "mobilenet_v2": Entry(_vision("mobilenet_v2", width_mult=0.35)),
    "mobilenet_v3": Entry(_vision("mobilenet_v3_small", width_mult=0.5)),
    "lraspp": Entry(_vision("lraspp_mobilenet_v3_large")),
    "fcn": Entry(lambda: _segmentation("fcn")),
    "timm resnext": Entry(_timm("resnext50_32x4d", layers=ONES, base_width=1)),
    "timm ecaresnet": Entry(_timm("ecaresnet26t", layers=ONES)),
    "timm regnet": Entry(_timm("regnety_002")),
    "timm skresnet": Entry(_timm("skresnet18", layers=ONES)),
    "timm dla": Entry(_timm("dla46x_c")),
    "timm vovnet": Entry(_timm("ese_vovnet19b_slim_dw")),
}


def full() -> dict[str, Entry]:
    """Every network of the families that has a BatchNorm2d, but the largest, as its library builds it for 5 classes."""
    vision, timm = zoo.torchvision_models(), zoo.timm_models()
    entries: dict[str, Entry] = {}
    for name in vision.list_models(module=vision) + vision.list_models(module=vision.segmentation):
        if name.endswith("_bn") or not name.startswith(_NORMLESS):
            size = {"inception_v3": 299, "maxvit_t": 224, "googlenet": 64}.get(name, 64 if "_bn" not in name else 32)
            options = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
            entries[name] = Entry(_vision(name, **options), size)
    for module in _TIMM_MODULES:
        for name in timm.list_models(module=module):
            if not any(part in name for part in _OTHER_NORMS) and (module != "byobnet" or name.startswith(_BYOBNET)):
                entries[f"timm {name}"] = Entry(_timm(name), 64)
    return {name: entry for name, entry in entries.items() if not name.endswith(_HUGE)}


@dataclass
class Calls:
    """Of 2d BatchNorms, as ``torch.batch_norm`` sees them: all, and those from fusedres."""

    all: int = 0
    ours: int = 0


@contextmanager
def counted_calls() -> Iterator[Calls]:
    calls = Calls()
    normalise, ours = torch.batch_norm, reference.normalise

    def count(input: Tensor, *args: object, **kwargs: object) -> Tensor:
        calls.all += input.dim() == 4
        return normalise(input, *args, **kwargs)

    def count_ours(input: Tensor, *args: object, **kwargs: object) -> Tensor:
        calls.ours += input.dim() == 4
        return ours(input, *args, **kwargs)

    with mock.patch.object(torch, "batch_norm", count), mock.patch.object(reference, "normalise", count_ours):
        yield calls


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of a training step, then outputs of an evaluation; the buffers are put back."""
    before = [buffer.clone() for buffer in model.buffers()]
    torch.manual_seed(1)
    leaf = x.clone().requires_grad_()
    outputs = dict(_tensors("output", model.train()(leaf)))
    chosen = [out for out in outputs.values() if out.requires_grad]
    torch.autograd.backward(chosen, [torch.randn_like(out) for out in chosen])
    assert leaf.grad is not None
    values = {name: out.detach() for name, out in outputs.items()} | {"grad input": leaf.grad}
    values |= {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    values |= {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad()
    with torch.no_grad():
        values |= _tensors("evaluation", model.eval()(x))
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
    return values


def _tensors(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors in ``value``, which may be a tuple or a dict of them."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(f"{name} {key}", item)
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _tensors(f"{name} {index}", item)
