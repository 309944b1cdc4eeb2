"""Conversion of Qwen3.5 checkpoints to MLX: `convert` and its report, `describe` and its description, `compare`.

The package is called as mlx-lm's function is: `mlx_qwen.convert("Qwen/Qwen3.5-0.8B", "folder")` is
`mlx_qwen.convert.convert` with the same arguments.
"""

import sys
from inspect import Signature, signature
from types import ModuleType

from .comparison import Comparison, compare
from .conversion import convert, describe
from .description import Description
from .recipes.recipe import RECIPES
from .report import ConversionReport

__all__ = ["RECIPES", "Comparison", "ConversionReport", "Description", "compare", "convert", "describe"]


class _Callable(ModuleType):
    """A module that is called as its function `convert`."""

    __call__ = staticmethod(convert)

    def __dir__(self) -> list[str]:
        """What is meant for users, without helpers that happen to be imported here."""
        return sorted([*__all__, *(name for name in super().__dir__() if name.startswith("__"))])

    @property
    def __signature__(self) -> Signature:
        return signature(convert)


sys.modules[__name__].__class__ = _Callable
