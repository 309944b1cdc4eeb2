"""The error of a question that cannot be answered."""

from mlx_qwen.errors import MLXQwenError


class PlanningError(MLXQwenError, ValueError):
    """A model, precision, context, chip or memory size that cannot be planned for."""
