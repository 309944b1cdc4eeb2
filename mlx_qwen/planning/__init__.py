"""What a model needs and what a Mac allows: `plan` and its result."""

from mlx_qwen.planning.chips import CHIPS, Chip
from mlx_qwen.planning.errors import PlanningError
from mlx_qwen.planning.planner import plan
from mlx_qwen.planning.report import Plan

__all__ = ["CHIPS", "Chip", "Plan", "PlanningError", "plan"]
