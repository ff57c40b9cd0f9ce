"""torch.library operators over the kernels, and the choice between them and the reference."""

from fusedres.ops import batch_norm as batch_norm
from fusedres.ops.dispatch import refusal, use_kernels

__all__ = ["refusal", "use_kernels"]
