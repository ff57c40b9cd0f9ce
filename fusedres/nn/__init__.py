"""Drop-in modules over :mod:`fusedres.functional`."""

from fusedres.nn.batch_norm import BatchNormAct2d, as_batch_norm_act
from fusedres.nn.blocks import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck
from fusedres.nn.linear import LayerNormLinear, LinearLayerNorm, ResidualMLPBlock

__all__ = [
    "BasicBlock",
    "BatchNormAct2d",
    "Bottleneck",
    "LayerNormLinear",
    "LinearLayerNorm",
    "PreActBasicBlock",
    "PreActBottleneck",
    "ResidualMLPBlock",
    "as_batch_norm_act",
]
