"""What a model needs and what a Mac allows: `plan` and its result, `room_for_weights`."""

from mlx_qwen.errors import PlanningError

from .chips import CHIPS, Chip
from .planned import Plan
from .planner import plan, room_for_weights

__all__ = ["CHIPS", "Chip", "Plan", "PlanningError", "plan", "room_for_weights"]
