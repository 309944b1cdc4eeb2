"""A checkpoint's tokenizer files become ids, text and the tokens that end an answer."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_qwen.answer import TextStream
from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import CheckpointError, PromptError
from mlx_qwen.prompt import Processor
from tests.support.configs import text_config
from tests.support.tokenizers import add_tokenizer, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def config(**changes: object) -> ModelConfig:
    return ModelConfig.from_dict(text_config(**changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return add_tokenizer(tmp_path)


def test_special_tokens_in_text_are_recognised_and_none_is_added(folder: Path) -> None:
    processor = Processor.from_directory(folder, config())
    ids = processor.encode("<|im_start|>hi<think>")
    assert ids[0] == TOKENIZER.token_to_id("<|im_start|>")
    assert ids[-1] == TOKENIZER.token_to_id("<think>")
    assert processor.decode(ids) == "<|im_start|>hi<think>"


def test_any_of_the_end_tokens_that_the_files_name_ends_an_answer(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": {"content": "</think>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    processor = Processor.from_directory(folder, config(eos_token_id=9))
    named = {TOKENIZER.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>", "</think>")}
    assert processor.end_token_ids == {7, 8, 9} | named


def test_a_missing_tokenizer_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json.*Copy it"):
        Processor.from_directory(tmp_path, config())


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_damaged_file_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text('{"cut off')
    with pytest.raises(CheckpointError, match=name):
        Processor.from_directory(folder, config())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.json", b"{"),
        ("chat_template.json", b"{}"),
        ("chat_template.json", b'{"chat_template": [{"name": "default"}]}'),
        ("chat_template.json", b'{"chat_template": 5}'),
        ("chat_template.jinja", b"Gr\xfc\xdfe"),
    ],
)
def test_a_damaged_chat_template_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}.*Download it again"):
        Processor.from_directory(folder, config())


def test_text_that_is_no_unicode_is_refused_with_its_place(folder: Path) -> None:
    text = b"Caf\xe9 au lait".decode(errors="surrogateescape")
    with pytest.raises(PromptError, match=r"not UTF-8, near 'Caf.udce9 au lait'"):
        Processor.from_directory(folder, config()).encode(text)


@pytest.mark.parametrize(("hidden", "layers", "thinks"), [(1024, 24, False), (2048, 24, False), (2560, 32, True)])
def test_the_two_smallest_sizes_do_not_think_unless_asked(folder: Path, hidden: int, layers: int, thinks: bool) -> None:
    processor = Processor.from_directory(folder, config(hidden_size=hidden, num_hidden_layers=layers))
    assert processor.default_thinking is thinks


def test_a_template_that_thinks_only_when_asked_is_believed_for_every_size(folder: Path) -> None:
    template = (folder / "chat_template.jinja").read_text()
    opt_in = template.replace("enable_thinking is false", "enable_thinking is not true").replace(
        "{%- if enable_thinking is defined and", "{%- if enable_thinking is not defined or"
    )
    assert opt_in != template
    (folder / "chat_template.jinja").write_text(opt_in)
    assert Processor.from_directory(folder, config(hidden_size=2560, num_hidden_layers=32)).default_thinking is False


def test_a_template_that_knows_no_thinking_has_no_default_for_it(tmp_path: Path) -> None:
    add_tokenizer(tmp_path, template="{{ messages[0].content }}")
    assert Processor.from_directory(tmp_path, config()).default_thinking is None


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\nWell, ", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>user\n<think> what?<|im_end|>\n<|im_start|>assistant\n", False),
        ("plain", False),
        ("What does <think> mean?", False),
        ("<|im_start|>user\nWhat does <think> mean?", False),
        ("Why? <think>\n", True),
        ("Why?\n<think>", True),
        ("What does it mean to write <think>", False),
        ("What does it mean to write <think> ", False),
    ],
)
def test_an_open_think_block_at_the_end_of_the_prompt_is_seen(folder: Path, text: str, inside: bool) -> None:
    processor = Processor.from_directory(folder, config())
    assert processor.opens_thinking(processor.encode(text)) is inside


@given(st.text(max_size=30))
def test_streamed_text_never_ends_inside_a_character(text: str) -> None:
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(token) for token in TOKENIZER.encode(text).ids]
    assert "".join(pieces) + stream.finish() == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(st.lists(st.integers(0, 299), max_size=30))
def test_streamed_pieces_join_to_the_text_of_any_ids(ids: list[int]) -> None:
    stream = TextStream(TOKENIZER)
    joined = "".join(stream.push(token) for token in ids) + stream.finish()
    assert joined == TOKENIZER.decode(ids, skip_special_tokens=False)
