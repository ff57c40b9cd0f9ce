"""torch.library operators over the kernels, and the choice between them and the reference."""

from fusedres.ops import add_batch_norm as add_batch_norm
from fusedres.ops import batch_norm as batch_norm
from fusedres.ops import layer_norm as layer_norm
from fusedres.ops.dispatch import autocast_dtypes, autocasts, layer_norm_refusal, refusal, tf32, use_kernels
from fusedres.ops.sync_batch_norm import sync_batch_norm_act

__all__ = [
    "autocast_dtypes",
    "autocasts",
    "layer_norm_refusal",
    "refusal",
    "sync_batch_norm_act",
    "tf32",
    "use_kernels",
]
