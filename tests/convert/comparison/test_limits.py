"""What cannot be compared is refused in one line, and what can takes the memory of a layer."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_qwen.convert import compare
from mlx_qwen.errors import CheckpointError, ConversionError
from tests.conftest import CheckpointFactory
from tests.convert.comparison.conftest import TEXT
from tests.support.tokenizers import add_tokenizer


def test_a_deep_model_takes_no_more_memory_than_a_shallow_one(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    def peak(layers: int) -> int:
        source = checkpoint("moe", layers=layers, interval=2)
        folder = add_tokenizer(shutil.copytree(source, tmp_path / f"{layers}-layers"))
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        compare(folder, folder, text=TEXT[:100])
        return mx.get_peak_memory() - before

    # Six layers more would take more than twice as much.
    assert peak(8) <= 1.5 * peak(2)


def test_models_of_other_shapes_are_refused(reference: Path, checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    deeper = add_tokenizer(shutil.copytree(checkpoint("dense", layers=8), tmp_path / "deeper"))
    with pytest.raises(ConversionError, match=r"of different models: num_hidden_layers \(4 and 8\)"):
        compare(reference, deeper)
    sparse = add_tokenizer(shutil.copytree(checkpoint("moe"), tmp_path / "sparse"))
    with pytest.raises(ConversionError, match=r"different models.* conversion of the same model"):
        compare(reference, sparse)


def test_tokenizers_that_disagree_are_refused(reference: Path, tmp_path: Path) -> None:
    other = add_tokenizer(shutil.copytree(reference, tmp_path / "other"), vocab_size=280)
    with pytest.raises(ConversionError, match="tokenizers of the two models make different tokens"):
        compare(reference, other, text=TEXT)


def test_a_missing_tokenizer_is_named(reference: Path, checkpoint: CheckpointFactory) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        compare(reference, checkpoint("dense"), text=TEXT)


def test_a_text_without_anything_to_predict_is_refused(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="has 1 tokens, expected at least 2"):
        compare(reference, reference, text="a")
    (tmp_path / "latin-1.txt").write_bytes("Straße".encode("latin-1"))
    for file in (tmp_path / "latin-1.txt", tmp_path / "missing.txt"):
        with pytest.raises(ConversionError, match=r"cannot be read .* Give a text file in UTF-8"):
            compare(reference, reference, text=file)


def test_options_that_make_no_sense_are_refused(reference: Path) -> None:
    with pytest.raises(ConversionError, match="tokens is 1, expected at least 2"):
        compare(reference, reference, tokens=1)
    with pytest.raises(ConversionError, match="window is 0, expected at least 2"):
        compare(reference, reference, window=0)
    with pytest.raises(ConversionError, match="dtype is 'int8', expected one of bfloat16, float16, float32"):
        compare(reference, reference, dtype="int8")  # type: ignore[arg-type]


def test_a_folder_of_mixed_formats_is_refused_as_load_refuses_it(reference: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(reference, tmp_path / "damaged")
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps({**config, "mlx_qwen": {"format": 99}}))
    with pytest.raises(CheckpointError, match="format 99"):
        compare(reference, damaged)
