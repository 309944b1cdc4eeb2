"""A calibration text makes a conversion that answers more like the original, and changes nothing else about it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mlx_qwen.cli import main
from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert
from mlx_qwen.convert.quantize import texts
from mlx_qwen.convert.quantize.texts import calibration_windows
from mlx_qwen.convert.work import pieces
from mlx_qwen.convert.work import write as weights
from mlx_qwen.errors import ConversionError
from mlx_qwen.loading import load_model
from mlx_qwen.prompt import Processor
from tests.conftest import CheckpointFactory
from tests.support.checkpoints import reference_logits
from tests.support.mlx_folders import digests, main_arrays
from tests.support.tokenizers import add_tokenizer

WORDS = ("what", "is", "the", "answer", "and", "which", "tool", "one", "you", "talk", "of", "to", "user", "assistant")
KINDS = ("dense", "moe", "next")
Source = Callable[..., Path]


def prose(seed: int, words: int = 1200) -> str:
    """A text of words in any order, which random weights understand as well as any other."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


@pytest.fixture
def source(checkpoint: CheckpointFactory, tmp_path: Path) -> Source:
    """`source(kind, **options)`: a tiny checkpoint with a tokenizer."""

    def make(kind: str, **options: object) -> Path:
        folder = tmp_path / f"source-{kind}"
        shutil.copytree(checkpoint(kind, dtype="bfloat16", **options), folder)
        return add_tokenizer(folder)

    return make


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(prose(seed=1))
    return file


@pytest.fixture
def short_text(tmp_path: Path) -> Path:
    """One for what does not depend on how well it calibrates."""
    file = tmp_path / "short-text.txt"
    file.write_text(prose(seed=1, words=300))
    return file


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float(), dim=-1)


def divergence(source: Path, folder: Path) -> float:
    """The mean KL divergence of a conversion from transformers' own model, on a text of its own."""
    ids = Processor.from_directory(source, ModelConfig.from_directory(source)).encode(prose(seed=2, words=200))
    batch = np.array(ids[:240]).reshape(2, 120)
    truth = log_probabilities(reference_logits(source, torch.from_numpy(batch)))
    model = load_model(folder, ModelConfig.from_directory(folder), dtype=mx.float32)
    found = log_probabilities(torch.from_numpy(np.array(model(mx.array(batch)))))
    return float((truth.exp() * (truth - found)).sum(-1).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_it_diverges_less_than_the_search_which_diverges_less_than_rounding(
    kind: str, source: Source, text: Path, tmp_path: Path
) -> None:
    folder, found = source(kind), {}
    for quantizer in ("rtn", "search", "gptq"):
        target = tmp_path / quantizer
        convert(folder, target, recipe="3bit", quantizer=quantizer, calibration=text if quantizer == "gptq" else None)
        found[quantizer] = divergence(folder, target)
    assert found["search"] < found["rtn"]
    assert found["gptq"] < 0.8 * found["search"]


@pytest.mark.parametrize("tied", [False, True])
def test_every_matrix_of_the_layers_and_the_head_is_corrected_and_nothing_else(
    tied: bool, source: Source, short_text: Path, tmp_path: Path
) -> None:
    folder = source("moe", tied=tied)
    convert(folder, tmp_path / "search", recipe="4bit")
    convert(folder, tmp_path / "gptq", recipe="4bit", calibration=short_text)
    searched, corrected = main_arrays(tmp_path / "search"), main_arrays(tmp_path / "gptq")
    assert searched.keys() == corrected.keys()
    changed = {name for name in searched if not mx.array_equal(searched[name], corrected[name])}
    packed = {name for name, array in searched.items() if array.dtype == mx.uint32}
    untouched = set() if tied else {"language_model.model.embed_tokens.weight"}
    assert {name for name in changed if searched[name].dtype == mx.uint32} == packed - untouched
    assert all(name.endswith((".weight", ".scales", ".biases")) for name in changed)
    assert not any("norm" in name or "conv1d" in name or "in_proj_a" in name for name in changed)


def test_it_is_the_same_every_time_and_however_often_it_is_interrupted(
    source: Source, short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = source("moe")
    monkeypatch.setattr(pieces, "PIECE_BYTES", 20_000)
    convert(folder, tmp_path / "once", recipe="4bit", calibration=short_text)
    monkeypatch.setattr(weights, "RECORD_BYTES", 1)
    advance, seen = weights.Progress.advance, []

    def interrupted(line: weights.Progress, nbytes: int) -> None:
        seen.append(nbytes)
        if len(seen) % 40 == 0:
            raise KeyboardInterrupt
        advance(line, nbytes)

    monkeypatch.setattr(weights.Progress, "advance", interrupted)
    interruptions = 0
    while not (tmp_path / "often").exists():
        try:
            convert(folder, tmp_path / "often", recipe="4bit", calibration=short_text)
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions > 2
    assert digests(tmp_path / "often") == digests(tmp_path / "once")


def test_it_starts_afresh_for_another_text(source: Source, short_text: Path, tmp_path: Path) -> None:
    folder, other = source("dense"), tmp_path / "other.txt"
    other.write_text(prose(seed=5, words=300))
    convert(folder, tmp_path / "a", recipe="4bit", calibration=short_text)
    convert(folder, tmp_path / "b", recipe="4bit", calibration=other)
    assert digests(tmp_path / "a") != digests(tmp_path / "b")


def test_the_default_text_is_long_and_varied_and_comes_with_the_package(source: Source) -> None:
    folder = source("dense")
    windows = calibration_windows("default", folder, ModelConfig.from_directory(folder))
    assert windows.shape[1] == 512
    assert windows.shape[0] >= 8


def test_windows_of_a_long_text_are_taken_from_all_over_it(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = source("dense"), tmp_path / "long.txt"
    file.write_text(prose(seed=1, words=4000))
    config = ModelConfig.from_directory(folder)
    whole = calibration_windows(file, folder, config)
    monkeypatch.setattr(texts, "_MOST_TOKENS", 2048)
    some = calibration_windows(file, folder, config)
    assert some.shape == (4, 512)
    assert np.array_equal(some[0], whole[0])
    assert np.array_equal(some[-1], whole[-1])


def test_lines_of_jsonl_are_texts_or_conversations(source: Source, tmp_path: Path) -> None:
    folder, file = source("dense"), tmp_path / "lines.jsonl"
    chat = [{"role": "user", "content": "which one is it?"}, {"role": "assistant", "content": "the answer"}]
    file.write_text("\n".join(json.dumps(line) for line in ({"text": "what is it?"}, {"messages": chat})))
    config = ModelConfig.from_directory(folder)
    read = Processor.from_directory(folder, config).decode(calibration_windows(file, folder, config).ravel().tolist())
    assert read.startswith("what is it?")
    assert "<|im_start|>user\nwhich one is it?<|im_end|>" in read
    assert read.count("<|im_start|>assistant") == 1


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("no such file.txt", None, "cannot be read"),
        ("short.txt", b"so", "expected 16"),
        ("latin.txt", "Müller".encode("latin-1"), "not UTF-8"),
        ("bad.jsonl", b'{"text": "fine"}\nnot json', "Line 2"),
        ("other.jsonl", b'{"prompt": "what"}', "Line 1"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused_before_anything_is_written(
    name: str, content: bytes | None, expected: str, source: Source, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConversionError, match=expected):
        convert(source("dense"), tmp_path / "out", calibration=tmp_path / name)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"quantizer": "best"}, "expected one of rtn, search, gptq"),
        ({"quantizer": "search", "calibration": "default"}, "reads no calibration text"),
        ({"quantizer": "gptq", "calibration": "none"}, "needs a calibration text"),
        ({"quantizer": "rtn", "quantize": False}, "only matters when quantizing"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    options: dict[str, object], expected: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match=expected):
        convert(checkpoint("dense"), tmp_path / "out", **options)  # type: ignore[arg-type]


def test_the_command_calibrates_and_says_what_it_cannot_do(source: Source, short_text: Path, tmp_path: Path) -> None:
    folder = source("dense")
    common = ["convert", "--hf-path", str(folder), "--recipe", "4bit"]
    result = CliRunner().invoke(main, [*common, "--mlx-path", str(tmp_path / "cli"), "--calibration", str(short_text)])
    assert result.exit_code == 0, result.output
    convert(folder, tmp_path / "api", recipe="4bit", calibration=short_text)
    assert digests(tmp_path / "cli") == digests(tmp_path / "api")
    options = ["--mlx-path", str(tmp_path / "no"), "--calibration", "default", "--quantizer", "rtn"]
    refused = CliRunner().invoke(main, [*common, *options])
    assert refused.exit_code != 0
    assert "reads no calibration text" in refused.output + str(refused.exception)
