"""Conversion of Qwen3.5 checkpoints to MLX: `convert` and its report, `describe` and its description, `compare`."""

from .comparison import Comparison, compare
from .conversion import convert, describe
from .description import Description
from .recipes.recipe import RECIPES
from .report import ConversionReport

__all__ = ["RECIPES", "Comparison", "ConversionReport", "Description", "compare", "convert", "describe"]
