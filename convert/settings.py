"""What a conversion is to do, in one value without contradictions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlx_qwen.checkpoint.layout import Quantization

from .recipes.recipe import Recipe

DType = Literal["bfloat16", "float16", "float32"]
AskedDType = DType | Literal["auto"]
Quantizer = Literal["rtn", "search", "gptq"]
AUTO: Literal["auto"] = "auto"
DEFAULT_TEXT = "default"


@dataclass(frozen=True, slots=True)
class Settings:
    """The `recipe` of all matrices (None: none is packed), and the `dtype` of the rest (None: the source's).

    `asked` says that the user chose the recipe, and `exact` that bits, group size and mode were named. With a
    `target_size` in bytes or `target_bits` a weight (all weights but vision and MTP), the recipe's `default` only says
    what group size is meant until bits are chosen to fit.
    `chip` is the one that "auto" chooses a dtype for, None for this machine's. `calibration` is set for the
    `quantizer` "gptq" alone. The adapter of `adapter_path` is merged into the source.
    """

    recipe: Recipe | None
    dtype: AskedDType | None
    dequantize: bool
    asked: bool = False
    exact: bool = False
    target_size: int | None = None
    target_bits: float | None = None
    chip: str | None = None
    quantizer: Quantizer = "search"
    calibration: str | Path | None = None
    adapter_path: str | Path | None = None

    @property
    def quantization(self) -> Quantization | None:
        """The precision of whatever the recipe does not name."""
        return None if self.recipe is None else self.recipe.default

    @property
    def is_open(self) -> bool:
        """Whether bits are yet to be chosen."""
        return self.target_size is not None or self.target_bits is not None

    @property
    def reads_values(self) -> bool:
        """Whether what is chosen depends on the weights themselves, beyond their headers.

        `target_bits` can be met by errors to be expected, where only headers are there.
        """
        return self.target_size is not None or self.dtype == AUTO

    def keeps(self, quantization: Quantization) -> bool:
        """Whether codes that a source of another runtime has in this precision are better kept than packed again."""
        if self.recipe is None:
            return False
        if self.exact:
            return quantization == self.recipe.default
        # With a size to meet, all is open; a recipe by name says bits, and the source's own groups lose nothing.
        same = (quantization.bits, quantization.mode) == (self.recipe.default.bits, self.recipe.default.mode)
        return not self.asked or (same and not self.is_open)
