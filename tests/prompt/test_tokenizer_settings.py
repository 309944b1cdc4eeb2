"""Tokens and templates that tokenizer_config.json and generation_config.json name: other types are one clear error."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import CheckpointError, ConfigError
from mlx_qwen.prompt import Processor
from tests.support.configs import text_config
from tests.support.tokenizers import add_tokenizer, tiny_tokenizer

SPECIAL = PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES
NO_TEXTS = [5, -1.5, True, [], ["</think>"], {}, {"content": 5}, {"content": None}, 10**400]
TEMPLATE = "{{ messages[0].content }}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return add_tokenizer(tmp_path)


def read(folder: Path, name: str, changes: dict[str, object]) -> Processor:
    """The processor of a folder one of whose files says something else."""
    file = folder / name
    said = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**said, **changes}))
    return Processor.from_directory(folder, ModelConfig.from_dict(text_config()))


@pytest.mark.parametrize("value", NO_TEXTS, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("name", SPECIAL)
def test_a_special_token_that_is_no_text_is_refused_by_name(folder: Path, name: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"^tokenizer_config\.json says {name} is .{{1,210}}, expected a text"):
        read(folder, "tokenizer_config.json", {name: value})


@pytest.mark.parametrize("name", SPECIAL)
def test_a_special_token_is_a_text_an_object_or_none(folder: Path, name: str) -> None:
    for value in ("</think>", {"content": "</think>", "lstrip": False}, None):
        read(folder, "tokenizer_config.json", {name: value})


def test_flags_and_tokens_of_other_names_may_be_anything(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ image_token }}{{ add_bos_token is defined }}")
    said = {"add_bos_token": False, "add_eos_token": True, "image_token": "<|image_pad|>", "some_token": 5}
    processor = read(folder, "tokenizer_config.json", said)
    assert processor.apply_chat_template([{"role": "user", "content": "?"}]) == "<|image_pad|>False"


@pytest.mark.parametrize(
    "value",
    [5, True, False, 0, [5], ["x"], [{}], [{"name": "default"}], [{"template": 5}], {"default": 5}, {"default": None}],
    ids=str,
)
def test_a_chat_template_of_another_type_is_refused(folder: Path, value: object) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match=r"chat template in .*tokenizer_config\.json is neither a text nor named"):
        read(folder, "tokenizer_config.json", {"chat_template": value})


@pytest.mark.parametrize(
    "value", [TEMPLATE, {"default": TEMPLATE}, [{"name": "default", "template": TEMPLATE}]], ids=["text", "map", "list"]
)
def test_a_chat_template_is_a_text_or_named_texts(folder: Path, value: object) -> None:
    (folder / "chat_template.jinja").unlink()
    processor = read(folder, "tokenizer_config.json", {"chat_template": value})
    assert processor.apply_chat_template([{"role": "user", "content": "Hello"}]) == "Hello"


@pytest.mark.parametrize("value", ["x", 1.5, True, {}, [1, "x"], [[1]], [True]], ids=str)
def test_an_end_token_that_is_no_number_is_refused(folder: Path, value: object) -> None:
    with pytest.raises(ConfigError, match=r"^generation_config\.json\.eos_token_id is .*, expected a whole number or"):
        read(folder, "generation_config.json", {"eos_token_id": value})


@pytest.mark.parametrize(("value", "added"), [(None, set()), ([], set()), (7, {7}), ([7, 9], {7, 9})], ids=str)
def test_end_tokens_are_one_several_or_none(folder: Path, value: object, added: set[int]) -> None:
    own = {tiny_tokenizer().token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")}
    assert read(folder, "generation_config.json", {"eos_token_id": value}).end_token_ids == own | added
