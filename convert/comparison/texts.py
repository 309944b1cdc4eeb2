"""The text on which models are compared, as windows of tokens."""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_qwen.errors import ConversionError
from mlx_qwen.prompt import Processor

from ..layerwise.batching import window_batches

# Compared unless the caller says otherwise: so many tokens, in windows of so many.
TOKENS, WINDOW = 4096, 512
FEWEST_TOKENS = 2


def evaluation_text() -> str:
    """The text that is used where none is given: prose, code, mathematics, data and dialogue in several languages."""
    return files(__package__).joinpath("evaluation.txt").read_text(encoding="utf-8")


def read_text(text: str | Path | None) -> str:
    """The contents of a file, the text itself, or `evaluation_text`; raises ConversionError for an unreadable file."""
    if text is None:
        return evaluation_text()
    if isinstance(text, str):
        return text
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"{text} cannot be read ({error}). Give a text file in UTF-8.") from error


def token_ids(a: Processor, b: Processor, text: str, most: int) -> list[int]:
    """The first `most` tokens of `text`; raises ConversionError unless both tokenizers agree about them."""
    ids = a.encode(text)
    if ids != b.encode(text):
        raise ConversionError(
            "The tokenizers of the two models make different tokens of the text, so that their probabilities cannot be "
            "compared. Compare a checkpoint with a conversion of the same model."
        )
    if len(ids) < FEWEST_TOKENS:
        raise ConversionError(f"The text has {len(ids)} tokens, expected at least {FEWEST_TOKENS}. Give a longer one.")
    return ids[:most]


def batches(ids: list[int], window: int) -> Iterator[mx.array]:
    """Windows of `window` tokens side by side, int32 [B, T], as many as make a batch of about 2,048 tokens.

    What is left at the end is a shorter window, unless it is a single token, which has nothing to predict.
    """
    whole = len(ids) // window * window
    yield from window_batches(np.array(ids[:whole], np.int32).reshape(-1, window))
    if len(ids) - whole >= FEWEST_TOKENS:
        yield mx.array(ids[whole:])[None]
