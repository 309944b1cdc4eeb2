"""Which matrix gets how many bits: by name, by kind, and by pattern."""

from .recipe import DEFAULT_RECIPE, RECIPES, Recipe, named, uniform

__all__ = ["DEFAULT_RECIPE", "RECIPES", "Recipe", "named", "uniform"]
