"""Fused Triton kernels for residual networks, behind drop-in modules and one call, :func:`fuse`."""

from fusedres import functional, models, nn
from fusedres.fusion import explain, fuse, unfuse
from fusedres.nn import convert_sync_batchnorm

__version__ = "0.1.0"
__all__ = ["convert_sync_batchnorm", "explain", "functional", "fuse", "models", "nn", "unfuse"]
