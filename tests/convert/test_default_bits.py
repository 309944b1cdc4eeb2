"""Without further words a conversion has 4.5 to 5 bits a weight, spent where each matrix's error calls for them."""

import re
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_qwen.checkpoint.layout import Quantization
from mlx_qwen.checkpoint.released import SIZES, reduced
from mlx_qwen.convert import convert, describe
from mlx_qwen.convert.planning import plan
from mlx_qwen.convert.recipes.kinds import Kind, joined_with
from tests.conftest import CheckpointFactory
from tests.support.conversions import HURT_LAYER, chosen, hurt_source, out_proj_bits
from tests.support.mlx_folders import main_arrays
from tools.benchmarks.synthetic import write_random_checkpoint

EIGHT = Quantization(8, 64)
NARROW = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
}


@pytest.fixture(scope="module", params=["0.8B", "9B", "35B-A3B"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a released shape, narrowed."""
    changes = NARROW | (EXPERTS if request.param == "35B-A3B" else {"intermediate_size": 512})
    folder = tmp_path_factory.mktemp(request.param) / "source"
    write_random_checkpoint(reduced(request.param, num_layers=8, changes=changes), folder)
    return folder


@pytest.mark.parametrize("size", SIZES)
def test_every_released_size_has_less_than_five_bits_a_weight(size: str) -> None:
    assert 4.55 <= plan(size, memory="64GB").weights.text_bits <= 4.61


def test_what_is_written_has_less_than_five_bits_a_weight(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", quantizer="rtn")
    arrays = main_arrays(tmp_path / "out")
    assert 4.5 <= 8 * sum(array.nbytes for array in arrays.values()) / report.parameters <= 4.601
    assert report.description.recipe == "balanced"
    assert 4.5 <= report.description.text_bits <= 4.6


def test_the_same_source_always_gives_the_same_bits_and_joined_matrices_the_same(source: Path) -> None:
    first = describe(source)
    assert first == describe(source) == describe(source, recipe="balanced")
    groups: dict[str, set[Quantization | None]] = {}
    for name, quantization in chosen(first).items():
        groups.setdefault(joined_with(name), set()).add(quantization)
    assert all(len(kinds) == 1 for kinds in groups.values())


def test_a_matrix_that_rounding_hurts_more_gets_more_bits(source: Path, tmp_path: Path) -> None:
    bits = out_proj_bits(describe(hurt_source(source, tmp_path / "source")))
    assert bits[HURT_LAYER] > max(bits[i] for i in (0, 2, 4, 5, 6))


def test_the_mtp_layer_and_routers_have_eight_bits(checkpoint: CheckpointFactory) -> None:
    found = describe(checkpoint("moe", with_mtp=True))
    kinds = {tensor.kind: tensor.quantization for tensor in found.tensors if tensor.kind in (Kind.MTP, Kind.ROUTER)}
    careful = [row.quantization for row in found.rows if row.kind in kinds]
    assert EIGHT in careful and set(careful) <= {EIGHT, None}


@pytest.mark.filterwarnings("ignore:.*packed again")
def test_converted_again_nothing_changes(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "first", quantizer="rtn")
    convert(tmp_path / "first", tmp_path / "second", quantizer="rtn")
    before, after = main_arrays(tmp_path / "first"), main_arrays(tmp_path / "second")
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)


@pytest.mark.filterwarnings("ignore:.*packed again")
def test_a_source_of_eight_bits_comes_out_as_small(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "eight", bits=8)
    assert 4.5 <= describe(tmp_path / "eight").text_bits <= 4.6


def test_what_the_user_fixed_neither_takes_from_the_rest_nor_adds_to_it(source: Path) -> None:
    found = describe(source, bits_for={"embed_tokens": 8})
    rest = [tensor for tensor in found.tensors if tensor.kind.is_matrix and "embed_tokens" not in tensor.name]
    weights = sum(tensor.nbytes * 8 for tensor in rest) / sum(_count(tensor.shape) for tensor in rest)
    assert chosen(found)["language_model.model.embed_tokens.weight"] == EIGHT
    assert 4.4 <= weights <= 4.63


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


DOCS = Path(__file__).parents[2] / "docs" / "recipes.md"
ROW = re.compile(r"^\| ([\w.-]+B) \| ([\d.]+) GB \| ([\d.]+) \| ([\d.]+) GB \| (\d+) GB \|$", re.MULTILINE)


@pytest.mark.parametrize(("size", "text", "bits", "disk", "memory"), ROW.findall(DOCS.read_text(encoding="utf-8")))
def test_the_table_of_sizes_is_what_is_planned(size: str, text: str, bits: str, disk: str, memory: str) -> None:
    weights = plan(size, memory=f"{memory}GB").weights
    assert (text, bits) == (f"{weights.text / 1e9:.1f}", f"{weights.text_bits:.2f}")
    assert disk == f"{weights.total / 1e9:.1f}"
    memories = (8, 16, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)
    assert plan(size, memory=f"{memory}GB").fits
    smaller = [each for each in memories if each < int(memory)]
    assert not smaller or not plan(size, memory=f"{smaller[-1]}GB").fits


def test_the_table_names_every_size() -> None:
    assert [row[0] for row in ROW.findall(DOCS.read_text(encoding="utf-8"))] == list(SIZES)
