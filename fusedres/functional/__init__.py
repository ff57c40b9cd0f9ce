"""Fused functions: validation, the choice between kernels and the reference, and the public documentation."""

from fusedres.functional.batch_norm import add_batch_norm_act, batch_norm_act
from fusedres.functional.batch_norm import add_normalise as add_normalise  # for nn
from fusedres.functional.batch_norm import forked_batch_norm_act as forked_batch_norm_act  # for fusion
from fusedres.functional.batch_norm import normalise as normalise  # for nn
from fusedres.functional.batch_norm_head import batch_norm_act_global_avg_pool2d
from fusedres.functional.batch_norm_pool import batch_norm_act_max_pool2d
from fusedres.functional.batch_norm_pool import normalise_max_pool2d as normalise_max_pool2d  # for fusion
from fusedres.functional.checks import ACTIVATIONS as ACTIVATIONS  # for nn
from fusedres.functional.convolution import add_batch_norm_act_conv2d, batch_norm_act_conv2d
from fusedres.functional.join import batch_norm_add_batch_norm_act
from fusedres.functional.join import (
    forked_batch_norm_add_batch_norm_act as forked_batch_norm_add_batch_norm_act,  # for fusion
)
from fusedres.functional.linear import layer_norm_linear_act, linear_layer_norm_act
from fusedres.norm import Norm as Norm
from fusedres.ops import KERNEL_DTYPES as KERNEL_DTYPES  # for explain, as what follows
from fusedres.ops import autocasts as autocasts
from fusedres.ops import layer_norm_refusal as layer_norm_refusal
from fusedres.ops import multiplies_itself as multiplies_itself
from fusedres.ops import path_for as path_for
from fusedres.ops import pool_refusal as pool_refusal
from fusedres.ops import refusal as refusal
from fusedres.ops import takes_reference as takes_reference
from fusedres.reference import Extent as Extent  # for nn

__all__ = [
    "add_batch_norm_act",
    "add_batch_norm_act_conv2d",
    "batch_norm_act",
    "batch_norm_act_conv2d",
    "batch_norm_act_global_avg_pool2d",
    "batch_norm_act_max_pool2d",
    "batch_norm_add_batch_norm_act",
    "layer_norm_linear_act",
    "linear_layer_norm_act",
]
