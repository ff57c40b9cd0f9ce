"""torch.library operators over the kernels, and the choice between them and the reference."""

from fusedres.ops import layer_norm as layer_norm
from fusedres.ops.batch_norm import add_batch_norm_act as add_batch_norm_act
from fusedres.ops.batch_norm import batch_norm_act as batch_norm_act
from fusedres.ops.batch_norm_conv import add_batch_norm_act_conv2d as add_batch_norm_act_conv2d
from fusedres.ops.batch_norm_conv import batch_norm_act_conv2d as batch_norm_act_conv2d
from fusedres.ops.batch_norm_head import batch_norm_act_global_avg_pool2d as batch_norm_act_global_avg_pool2d
from fusedres.ops.batch_norm_join import batch_norm_add_batch_norm_act as batch_norm_add_batch_norm_act
from fusedres.ops.batch_norm_pool import batch_norm_act_max_pool2d as batch_norm_act_max_pool2d
from fusedres.ops.dispatch import KERNEL_DTYPES as KERNEL_DTYPES
from fusedres.ops.dispatch import autocast_dtypes as autocast_dtypes
from fusedres.ops.dispatch import autocasts as autocasts
from fusedres.ops.dispatch import is_known as is_known
from fusedres.ops.dispatch import layer_norm_refusal as layer_norm_refusal
from fusedres.ops.dispatch import multiplies_itself as multiplies_itself
from fusedres.ops.dispatch import path_for as path_for
from fusedres.ops.dispatch import pool_refusal as pool_refusal
from fusedres.ops.dispatch import refusal as refusal
from fusedres.ops.dispatch import takes_reference as takes_reference
from fusedres.ops.dispatch import tf32 as tf32
from fusedres.ops.dispatch import use_kernels as use_kernels
from fusedres.ops.sync_batch_norm import sync_batch_norm_act as sync_batch_norm_act
