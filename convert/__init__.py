"""Conversion of Qwen3.5 checkpoints to MLX: `convert` and its report."""

from .conversion import convert
from .report import ConversionReport

__all__ = ["ConversionReport", "convert"]
