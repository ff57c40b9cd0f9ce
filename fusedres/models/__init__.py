"""Residual networks in plain PyTorch: what :func:`fusedres.fuse` starts from. The ResNets have torchvision's names."""

from fusedres.models.mlp import ResidualMLPBlock, plain_mlp, residual_mlp
from fusedres.models.preact_resnet import (
    PreActBasicBlock,
    PreActBottleneck,
    PreActResNet,
    ZeroPadShortcut,
    preact_resnet18,
    preact_resnet34,
    preact_resnet50,
    preact_resnet101,
    preact_resnet152,
    preact_resnet200,
    preact_resnet_cifar,
)
from fusedres.models.resnet import (
    BasicBlock,
    Bottleneck,
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
)

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "PreActBasicBlock",
    "PreActBottleneck",
    "PreActResNet",
    "ResNet",
    "ResidualMLPBlock",
    "ZeroPadShortcut",
    "plain_mlp",
    "preact_resnet18",
    "preact_resnet34",
    "preact_resnet50",
    "preact_resnet101",
    "preact_resnet152",
    "preact_resnet200",
    "preact_resnet_cifar",
    "residual_mlp",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
]
