"""Everything a caller can choose about a comparison, declared once."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from mlx_qwen.declared import check_values, documented, option
from mlx_qwen.errors import ConversionError

from ..arrays import FLOATS
from ..settings import DType
from .texts import FEWEST_TOKENS, TOKENS, WINDOW


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonOptions:
    """The keywords of `compare`. Raises ConversionError for values that cannot be used.

    Attributes:
        {options}
    """

    text: str | Path | None = option(
        None,
        help="text to compare on: a file's Path, or the text itself. By default a short one of several languages and "
        "kinds that comes with mlx-qwen.",
        flag="--text",
        metavar="FILE",
    )
    tokens: int = option(TOKENS, help="most tokens of the text.", flag="--tokens")
    window: int = option(
        WINDOW,
        help="tokens of each sequence; the text makes as many as it fills.",
        flag="--window",
    )
    dtype: DType = option(
        "float32",
        help="type of activations and unpacked weights: float32 shows the weights' errors alone, 16 bits take half the "
        "memory and add their own rounding to both.",
        flag="--dtype",
    )
    adapter_path: str | Path | None = option(
        None,
        help="adapter to merge into the first checkpoint, as it was into the second when that was converted.",
        flag="--adapter-path",
        metavar="FOLDER|REPO",
    )
    progress: bool | None = option(None, help="show a line of progress. By default on a terminal and in a notebook.")

    def __post_init__(self) -> None:
        if isinstance(self.dtype, str) and self.dtype not in FLOATS:
            raise ConversionError(f"dtype is {self.dtype!r}, expected one of {', '.join(FLOATS)}.")
        check_values(self, ConversionError)
        for name, value in (("tokens", self.tokens), ("window", self.window)):
            if value < FEWEST_TOKENS:
                raise ConversionError(
                    f"{name} is {value}, expected at least {FEWEST_TOKENS}: the first predicts the next."
                )


class ComparisonKeywords(TypedDict, total=False):
    """The names and types of `ComparisonOptions`, for type checkers."""

    text: str | Path | None
    tokens: int
    window: int
    dtype: DType
    adapter_path: str | Path | None
    progress: bool | None
