"""Weights are counted as the converter writes them and as they are published."""

import shutil
from pathlib import Path

import pytest

from mlx_qwen.checkpoint.released import SIZES, reduced
from mlx_qwen.checkpoint.shards import checkpoint_tensors, companion_tensors
from mlx_qwen.convert import RECIPES, convert
from mlx_qwen.convert.planning import plan
from mlx_qwen.convert.planning.described import describe
from mlx_qwen.convert.planning.weight_sizes import LADDER, UNPACKED, Weights, weights_of
from mlx_qwen.convert.recipes.precisions import AFFINE_BITS
from tests.conftest import CheckpointFactory
from tests.support.checkpoints import KINDS
from tools.benchmarks.synthetic import write_random_checkpoint

PUBLISHED_BYTES = {
    "0.8B": 1_746_882_752,
    "4B": 9_319_737_856,
    "9B": 19_306_216_416,
    "27B": 55_562_872_800,
    "122B-A10B": 250_173_007_840,
    "397B-A17B": 806_795_875_168,
}


def counted(model: str | Path, recipe: str) -> Weights:
    return weights_of(describe(model), recipe)


def written_bytes(folder: Path) -> int:
    """Bytes of all tensors of a folder's files, companion included."""
    stored = [*checkpoint_tensors(folder).values(), *companion_tensors(folder).values()]
    return sum(info.nbytes for info in stored)


def without_weights(source: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    return folder


@pytest.mark.parametrize("name", PUBLISHED_BYTES)
def test_a_size_has_the_bytes_that_are_published(name: str) -> None:
    assert counted(name, "4bit").source == PUBLISHED_BYTES[name]


@pytest.mark.parametrize("recipe", [*RECIPES, UNPACKED])
@pytest.mark.parametrize("kind", ["dense_vl", "moe"])
def test_a_folder_is_counted_to_the_byte_that_its_conversion_writes(
    kind: str, recipe: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = checkpoint(kind, layers=2, interval=2, dtype="bfloat16", with_mtp=True)
    asked = None if recipe == UNPACKED else recipe
    convert(source, tmp_path / "out", recipe=asked, quantize=asked is not None)
    assert counted(source, recipe).total == written_bytes(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_alone_is_counted_within_a_hundredth(
    kind: str, dtype: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = checkpoint(kind, dtype=dtype, with_mtp=True)
    config_only = without_weights(source, tmp_path / "config")
    for recipe in LADDER:
        weights, exact = counted(config_only, recipe), counted(source, recipe)
        assert weights.total == pytest.approx(exact.total, rel=0.01)
        assert weights.source == exact.source


@pytest.mark.parametrize("size", ["0.8B", "35B-A3B"])
def test_the_files_on_the_disk_are_within_a_hundredth(size: str, tmp_path: Path) -> None:
    experts = {"num_experts": 8} if size == "35B-A3B" else {}
    config = reduced(size, num_layers=4, changes={"vocab_size": 8192, "hidden_size": 512, **experts})
    write_random_checkpoint(config, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")
    on_disk = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    config_only = without_weights(tmp_path / "source", tmp_path / "config")
    assert counted(config_only, "balanced").total == pytest.approx(on_disk, rel=0.01)


def test_a_converted_folder_is_counted_as_it_is(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    convert(checkpoint("moe_vl", dtype="bfloat16", with_mtp=True), tmp_path / "out", bits=4)
    assert counted(tmp_path / "out", "4bit").total == written_bytes(tmp_path / "out")


@pytest.mark.parametrize("name", SIZES)
def test_more_bits_are_more_bytes(name: str) -> None:
    model = describe(name)
    totals = [weights_of(model, f"{bits}bit").text for bits in AFFINE_BITS]
    assert totals == sorted(set(totals))


def test_a_token_reads_only_the_experts_it_chose() -> None:
    weights = counted("35B-A3B", "4bit")
    assert weights.active == pytest.approx(3e9, rel=0.2)
    assert weights.per_token < weights.text / 8


def test_a_token_reads_the_whole_of_a_tied_embedding_and_one_row_of_another() -> None:
    tied, untied = counted("4B", UNPACKED), counted("9B", UNPACKED)
    embedding = 2 * 248_320 * 4096
    assert tied.per_token == pytest.approx(tied.text, rel=0.001)
    assert untied.per_token == pytest.approx(untied.text - embedding, rel=0.001)


def test_the_vision_tower_is_loaded_only_on_request() -> None:
    blind, seeing = (plan("0.8B", context=16, memory="16GB", vision=vision) for vision in (False, True))
    assert seeing.total - blind.total == blind.weights.vision > 0
