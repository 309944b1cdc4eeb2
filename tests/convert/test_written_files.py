"""The folder that a conversion leaves: shards, index, config and everything that travels with the weights."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors import safe_open

from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert
from mlx_qwen.convert.source import origin
from mlx_qwen.convert.work import write as weights
from mlx_qwen.convert.writing import writer
from tests.conftest import CheckpointFactory
from tests.support.checkpoints import KINDS
from tests.support.mlx_folders import main_arrays
from tests.support.tokenizers import tiny_tokenizer


def _config(folder: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_describes_the_same_model(kind: str, checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = checkpoint(kind, with_mtp=True)
    convert(source, tmp_path / "out")
    before, after = ModelConfig.from_directory(source), ModelConfig.from_directory(tmp_path / "out")
    assert (after.text, after.vision, after.eos_token_ids) == (before.text, before.vision, before.eos_token_ids)


def test_the_config_lists_modules_that_differ_from_the_default(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    convert(checkpoint("moe", layers=1, with_mtp=True), tmp_path / "out", mode="mxfp4")
    eight_bits = {"group_size": 64, "bits": 8, "mode": "affine"}
    quantization = dict(_config(tmp_path / "out")["quantization"])  # type: ignore[call-overload]
    assert {key: quantization.pop(key) for key in ("group_size", "bits", "mode")} == {
        "group_size": 32,
        "bits": 4,
        "mode": "mxfp4",
    }
    main = {name for name in quantization if not name.startswith("mtp.")}
    assert main == {f"language_model.model.layers.0.mlp.{gate}" for gate in ("gate", "shared_expert_gate")}
    assert "mtp.fc" in quantization
    assert all(settings == eight_bits for settings in quantization.values())


def test_an_unquantized_config_has_no_quantization(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    convert(checkpoint("dense"), tmp_path / "packed")
    convert(tmp_path / "packed", tmp_path / "out", dequantize=True)
    assert {"quantization", "quantization_config"}.isdisjoint(_config(tmp_path / "out"))


def test_the_format_marker_names_the_companion(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    convert(checkpoint("dense", dtype="bfloat16"), tmp_path / "out")
    marker = {"format": 1, "norms": "shifted", "companion": ["mlx-qwen.safetensors"]}
    assert _config(tmp_path / "out")["mlx_qwen"] == marker


def test_large_outputs_are_split_into_numbered_shards_with_an_index(
    checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(checkpoint("moe"), tmp_path / "one")
    monkeypatch.setattr(writer, "SHARD_BYTES", 100_000)
    convert(checkpoint("moe"), tmp_path / "many")
    shards = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    held = {}
    for shard in shards:
        with safe_open(tmp_path / "many" / shard, framework="numpy") as file:
            assert file.metadata() == {"format": "mlx"}
            held |= dict.fromkeys(file.keys(), shard)
    assert index["weight_map"] == held
    arrays = main_arrays(tmp_path / "one")
    assert arrays.keys() == held.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())


def test_shards_hold_at_most_5_gb_each_of_any_tensors() -> None:
    entries = [writer.Entry(f"t{i}", "BF16", (i % 4 + 1, 300_000_000)) for i in range(12)]
    shards = writer.split_shards(entries, writer.SHARD_BYTES)
    assert [entry for shard in shards for entry in shard] == entries
    assert len(shards) < len(entries)
    assert max(sum(entry.nbytes for entry in shard) for shard in shards) <= 5_000_000_000


def test_every_tensor_starts_at_a_multiple_of_its_item_size() -> None:
    sizes = {"U8": 1, "BF16": 2, "F32": 4, "U32": 4}
    entries = [writer.Entry(dtype, dtype, (3,)) for dtype in sizes]
    _, starts = writer.header_bytes(entries)
    assert {dtype: starts[dtype] % size for dtype, size in sizes.items()} == dict.fromkeys(sizes, 0)


def test_the_index_counts_parameters_before_packing(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    for name, quantize in (("packed", True), ("plain", False)):
        convert(checkpoint("dense"), tmp_path / name, quantize=quantize)
    packed, plain = (
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text())["metadata"]["total_parameters"]
        for name in ("packed", "plain")
    )
    assert packed == plain == sum(array.size for array in main_arrays(tmp_path / "plain").values())


@pytest.fixture
def furnished(checkpoint: CheckpointFactory, tmp_path: Path) -> Path:
    """A checkpoint with everything else that a model folder can hold."""
    source = shutil.copytree(checkpoint("dense"), tmp_path / "source")
    tiny_tokenizer(300).save(str(source / "tokenizer.json"))
    (source / "preprocessor_config.json").write_text('{"patch_size": 4}')
    for name in ("chat_template.jinja", "merges.txt", "LICENSE"):
        (source / name).write_text(f"contents of {name}")
    for name in ("pytorch_model.bin", "optimizer.pth", "notes.pdf"):
        (source / name).write_text("not wanted")
    (source / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- qwen\n---\n# Original\n")
    return source


def test_everything_but_foreign_weights_travels(furnished: Path, tmp_path: Path) -> None:
    convert(furnished, tmp_path / "out")
    copied = ("tokenizer.json", "chat_template.jinja", "merges.txt", "preprocessor_config.json", "LICENSE")
    for name in (*copied, "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (furnished / name).read_bytes(), name
    written = {file.name for file in (tmp_path / "out").iterdir()} - {*copied, "generation_config.json"}
    assert written == {"README.md", "config.json", "model.safetensors", "model.safetensors.index.json"}


def test_the_model_card_keeps_its_front_matter_and_says_what_was_done(furnished: Path, tmp_path: Path) -> None:
    convert(furnished, tmp_path / "out", bits=6)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.library_name, card.data.tags) == ("apache-2.0", "mlx", ["qwen", "mlx"])
    assert "6 bits" in card.text


@pytest.mark.parametrize("front_matter", ["- a list", ": [no yaml"])
def test_an_unreadable_model_card_is_replaced_with_a_warning(
    furnished: Path, tmp_path: Path, front_matter: str
) -> None:
    (furnished / "README.md").write_text(f"---\n{front_matter}\n---\ntext")
    with pytest.warns(UserWarning, match="front matter"):
        convert(furnished, tmp_path / "out")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.library_name == "mlx"


def test_the_report_counts_what_is_on_the_disk(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    report = convert(checkpoint("moe", with_mtp=True, dtype="bfloat16"), tmp_path / "out")
    dry = convert(checkpoint("moe", with_mtp=True, dtype="bfloat16"), tmp_path / "dry", dry_run=True)
    on_disk = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert 0 <= on_disk - report.output_bytes < 100_000
    assert dry.output_bytes == report.output_bytes
    assert f"{report.bits_per_weight:.3f}" in report.table()
    assert not (tmp_path / "dry").exists()
    assert weights.COMPANION_STEM == "mlx-qwen"


def test_a_model_from_the_hub_is_named_as_the_base(
    furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(origin, "resolve", lambda name, revision: furnished)
    convert("Qwen/Qwen3.5-0.8B", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.base_model, card.data["base_model_relation"]) == ("Qwen/Qwen3.5-0.8B", "quantized")
    assert "# Qwen3.5-0.8B for MLX" in card.text
