"""The files of a checkpoint that say how its prompts are made: tokenizer, special tokens and preprocessors."""

from pathlib import Path

from tokenizers import Tokenizer

from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import CheckpointError
from mlx_qwen.fields import Fields
from mlx_qwen.json_files import read_json_object
from mlx_qwen.json_types import Json
from mlx_qwen.prompt.template import token_text

_END_OF_TURN = "<|im_end|>"
_END_OF_TEXT = "<|endoftext|>"


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a folder; raises CheckpointError where tokenizer.json is missing or damaged."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            f"{path} has no tokenizer.json. Copy it from the original model, or write one with transformers: "
            'AutoTokenizer.from_pretrained("...").save_pretrained("...").'
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise CheckpointError(f"{file} cannot be read as a tokenizer ({error}). Download it again.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_json(file: Path) -> dict[str, Json]:
    """The JSON object of a file, empty where there is none; raises CheckpointError for any other content."""
    return read_json_object(file) if file.is_file() else {}


def media_settings(path: Path, section: str, *files: str) -> dict[str, Json]:
    """A section of processor_config.json, or the first of the files that is there, as transformers looks for them."""
    nested = read_json(path / "processor_config.json").get(section)
    if isinstance(nested, dict):
        return nested
    return next((read_json_object(path / file) for file in files if (path / file).is_file()), {})


def end_token_ids(
    tokenizer: Tokenizer, config: ModelConfig, tokenizer_config: dict[str, Json], generation_config: dict[str, Json]
) -> frozenset[int]:
    """Every token that one of the files says ends an answer, and those of Qwen's own names.

    Raises CheckpointError and ConfigError for a token of another type.
    """
    ids = {*config.eos_token_ids, *Fields(generation_config, "generation_config.json").integers("eos_token_id")}
    named = token_text("eos_token", tokenizer_config.get("eos_token"))
    for text in (named, _END_OF_TURN, _END_OF_TEXT):
        token = tokenizer.token_to_id(text) if text else None
        if token is not None:
            ids.add(token)
    return frozenset(ids)
