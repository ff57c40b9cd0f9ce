"""Drop-in modules over :mod:`fusedres.functional`."""

from fusedres.nn.batch_norm import BatchNormAct2d, BatchNormActMaxPool2d, as_batch_norm_act
from fusedres.nn.batch_norm import batch_norm_state as batch_norm_state  # for fusion
from fusedres.nn.blocks import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck
from fusedres.nn.linear import LayerNormLinear, LinearLayerNorm, ResidualMLPBlock
from fusedres.nn.sync_batch_norm import OWN_NORMS, SyncBatchNormAct, convert_sync_batchnorm

__all__ = [
    "OWN_NORMS",
    "BasicBlock",
    "BatchNormAct2d",
    "BatchNormActMaxPool2d",
    "Bottleneck",
    "LayerNormLinear",
    "LinearLayerNorm",
    "PreActBasicBlock",
    "PreActBottleneck",
    "ResidualMLPBlock",
    "SyncBatchNormAct",
    "as_batch_norm_act",
    "convert_sync_batchnorm",
]
