"""Norms of the residual stream."""

from metal_kernels.norm.op import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "rms_norm"]
