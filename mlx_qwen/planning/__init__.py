"""What a model needs and what a Mac allows: `plan` and its result, `room_for_weights`."""

from mlx_qwen.chips import CHIPS, Chip
from mlx_qwen.planning.errors import PlanningError
from mlx_qwen.planning.planner import plan, room_for_weights
from mlx_qwen.planning.report import Plan

__all__ = ["CHIPS", "Chip", "Plan", "PlanningError", "plan", "room_for_weights"]
