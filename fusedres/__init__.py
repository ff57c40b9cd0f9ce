"""Fused Triton kernels for residual networks, behind drop-in modules and one call, :func:`fuse`."""

from fusedres import functional, nn

__version__ = "0.1.0"
__all__ = ["functional", "nn"]
