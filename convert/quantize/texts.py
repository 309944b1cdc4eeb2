"""Calibration text: read from a file or the package, and cut into windows of tokens."""

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import ConversionError, PromptError
from mlx_qwen.json_types import Messages
from mlx_qwen.prompt import Processor

from ..settings import DEFAULT_TEXT

_WINDOW = 512
_MOST_TOKENS = 1 << 15
_LEAST_TOKENS = 16


def calibration_windows(source: str | Path, model: Path, config: ModelConfig) -> npt.NDArray[np.int64]:
    """Token ids [n, T] of the text `source` by the tokenizer in the folder `model`.

    All windows have one length of at most 512; of more than 32,768 tokens, windows from all over the text are taken.

    Args:
        source: a file of UTF-8 text; a `.jsonl` file of objects with a "text", or with "messages" that the chat
            template lays out; or "default" for the text that comes with the package.
        model: the folder with the tokenizer.
        config: of that folder.

    Raises:
        ConversionError: the text cannot be read, or there is nothing in it.
        CheckpointError: the folder has no tokenizer, or no chat template where one is needed.
    """
    path = Path(source).expanduser()
    processor = Processor.from_directory(model, config)
    text = _decoded(source, path)
    parts = list(_lines(text, processor)) if path.suffix == ".jsonl" else [text]
    ids = processor.encode("\n\n".join(parts))
    length = min(_WINDOW, len(ids))
    if length < _LEAST_TOKENS:
        raise ConversionError(
            f"The calibration text {source} holds {len(ids)} tokens, expected {_LEAST_TOKENS} and better thousands. "
            "Give some pages of ordinary text."
        )
    cut = np.array(ids[: len(ids) // length * length], dtype=np.int64).reshape(-1, length)
    most = _MOST_TOKENS // length
    return cut[np.linspace(0, len(cut) - 1, most).astype(int)] if len(cut) > most else cut


def _decoded(source: str | Path, path: Path) -> str:
    if source == DEFAULT_TEXT:
        return (files("mlx_qwen.convert.quantize") / "calibration.txt").read_text(encoding="utf-8")
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConversionError(
            f"The calibration text {source} cannot be read ({error.strerror}). Give a text or .jsonl file, or "
            f'"{DEFAULT_TEXT}" for the text that comes with mlx-qwen.'
        ) from error
    except UnicodeDecodeError as error:
        raise ConversionError(f"The calibration text {source} is not UTF-8. Save it as UTF-8.") from error


def _lines(text: str, processor: Processor) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            chat = entry.get("messages")
            yield str(entry["text"]) if chat is None else _laid_out(chat, processor)
        except (ValueError, KeyError, AttributeError, PromptError) as error:
            raise ConversionError(
                f'Line {number} of the calibration text is no JSON object with "text" or "messages". Correct it, or '
                "save the text as .txt."
            ) from error


def _laid_out(messages: Messages, processor: Processor) -> str:
    return processor.apply_chat_template(messages, add_generation_prompt=False)
