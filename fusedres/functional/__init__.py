"""Fused functions: validation, the choice between kernels and the reference, and the public documentation."""

from fusedres.functional.batch_norm import add_batch_norm_act, batch_norm_act
from fusedres.functional.checks import ACTIVATIONS as ACTIVATIONS  # for nn
from fusedres.functional.checks import BatchNormState as BatchNormState  # for fusion
from fusedres.functional.convolution import add_batch_norm_act_conv2d, batch_norm_act_conv2d
from fusedres.functional.linear import layer_norm_linear_act, linear_layer_norm_act
from fusedres.ops import KERNEL_DTYPES as KERNEL_DTYPES  # for explain, as what follows
from fusedres.ops import autocasts as autocasts
from fusedres.ops import layer_norm_refusal as layer_norm_refusal
from fusedres.ops import multiplies_itself as multiplies_itself
from fusedres.ops import path_for as path_for
from fusedres.ops import refusal as refusal
from fusedres.ops import slower_than_eager as slower_than_eager
from fusedres.ops import standing as standing

__all__ = [
    "add_batch_norm_act",
    "add_batch_norm_act_conv2d",
    "batch_norm_act",
    "batch_norm_act_conv2d",
    "layer_norm_linear_act",
    "linear_layer_norm_act",
]
