"""A recipe decides about every matrix; what it promises is written, and what cannot be meant is refused."""

import json
from pathlib import Path

import pytest

from mlx_qwen.checkpoint.layout import Quantization
from mlx_qwen.checkpoint.names import TensorSpec, tensor_specs
from mlx_qwen.checkpoint.released import SIZES, released
from mlx_qwen.convert import RECIPES, convert, describe
from mlx_qwen.convert.recipes import named
from mlx_qwen.convert.recipes.kinds import Kind, joined_with, kind_of
from mlx_qwen.errors import ConversionError
from tests.conftest import CheckpointFactory

FOUR, EIGHT = Quantization(4, 64), Quantization(8, 64)
SENSITIVE = {
    Kind.EMBEDDING,
    Kind.HEAD,
    Kind.ATTENTION_IN,
    Kind.ATTENTION_OUT,
    Kind.LINEAR_IN,
    Kind.LINEAR_OUT,
    Kind.SHARED_EXPERT,
    Kind.ROUTER,
    Kind.MTP,
}


def specs(size: str) -> list[TensorSpec]:
    return tensor_specs(released(size))


def precisions(folder: Path, **options: object) -> dict[str, Quantization | None]:
    """What every matrix of the checkpoint at `folder` is going to be stored as."""
    description = describe(folder, **options)  # type: ignore[arg-type]
    return {tensor.name: tensor.quantization for tensor in description.tensors if tensor.kind.is_matrix}


@pytest.mark.parametrize("size", SIZES)
def test_in_mixed_4_8_what_is_sensitive_gets_eight_bits_and_the_rest_four(size: str) -> None:
    recipe = named("mixed-4-8")
    for spec in specs(size):
        kind = kind_of(spec)
        expected = None if not kind.is_matrix else EIGHT if kind in SENSITIVE else FOUR
        assert recipe.precision(spec) == expected, spec.name


@pytest.mark.parametrize("recipe", RECIPES)
def test_norms_convolutions_decay_and_vision_are_never_packed(recipe: str) -> None:
    for spec in specs("35B-A3B"):
        if any(part in spec.name for part in ("norm", "conv1d", "A_log", "dt_bias", "in_proj_a", "vision_tower")):
            assert named(recipe).precision(spec) is None, spec.name


@pytest.mark.parametrize("recipe", RECIPES)
def test_routers_keep_eight_bits_in_every_recipe(recipe: str) -> None:
    routers = [spec for spec in specs("35B-A3B") if kind_of(spec) is Kind.ROUTER]
    assert {named(recipe).precision(spec) for spec in routers} <= {EIGHT, Quantization(8, 32, "mxfp8")}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", ["9B", "35B-A3B"])
def test_matrices_that_are_read_as_one_have_one_precision(recipe: str, size: str) -> None:
    chosen: dict[str, set[Quantization | None]] = {}
    for spec in specs(size):
        chosen.setdefault(joined_with(spec.name), set()).add(named(recipe).precision(spec))
    assert [name for name, kinds in chosen.items() if len(kinds) > 1] == []


def test_what_was_described_is_written(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = checkpoint("moe", with_mtp=True)
    convert(source, tmp_path / "out", recipe="mixed-3-6")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    default = {key: written.pop(key) for key in ("group_size", "bits", "mode")}
    for name, quantization in precisions(source, recipe="mixed-3-6").items():
        assert quantization is not None
        expected = {"group_size": quantization.group_size, "bits": quantization.bits, "mode": quantization.mode}
        assert written.get(name.removesuffix(".weight"), default) == expected


def test_a_pattern_goes_before_the_recipe_and_the_last_before_all(checkpoint: CheckpointFactory) -> None:
    bits_for: dict[str, int | str] = {"mlp": "6,32", r"layers\.[01]\..*down_proj": "mxfp8", "embed_tokens": "none"}
    chosen = precisions(checkpoint("dense"), recipe="4bit", bits_for=bits_for)
    layer = "language_model.model.layers.{}.mlp.{}_proj.weight"
    assert chosen[layer.format(0, "down")] == chosen[layer.format(1, "down")] == Quantization(8, 32, "mxfp8")
    assert chosen[layer.format(2, "down")] == chosen[layer.format(0, "up")] == Quantization(6, 32)
    assert chosen["language_model.model.embed_tokens.weight"] is None
    assert chosen["language_model.lm_head.weight"] == FOUR


def test_bits_of_a_pattern_are_in_the_group_size_asked_for(checkpoint: CheckpointFactory) -> None:
    chosen = precisions(checkpoint("dense"), group_size=32, bits_for={"down_proj": 8, "up_proj": "8,64"})
    layer = "language_model.model.layers.0.mlp.{}_proj.weight"
    found = [chosen[layer.format(name)] for name in ("down", "up", "gate")]
    assert found == [Quantization(8, 32), Quantization(8, 64), Quantization(4, 32)]


def test_bits_alone_are_uniform(checkpoint: CheckpointFactory) -> None:
    assert set(precisions(checkpoint("dense"), bits=6).values()) == {Quantization(6, 64)}


@pytest.mark.filterwarnings("ignore:.*packed again")
def test_a_source_of_fewer_bits_is_not_blown_up_by_default(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    convert(checkpoint("dense"), tmp_path / "four", bits=4)
    assert set(precisions(tmp_path / "four").values()) == {FOUR}
    assert EIGHT in precisions(tmp_path / "four", recipe="mixed-4-8").values()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"recipe": "mixed_4_8"}, "Did you mean mixed-4-8"),
        ({"recipe": "4bit", "bits": 4}, "bits and recipe contradict"),
        ({"recipe": "4bit", "mode": "mxfp4"}, "mode and recipe contradict"),
        ({"recipe": "4bit", "target_size": "1GB"}, "recipe and target_size contradict"),
        ({"bits": 4, "target_size": "1GB"}, "bits and target_size contradict"),
        ({"recipe": "mxfp4", "group_size": 64}, "group_size is 64, but mxfp4 has only 32"),
        ({"recipe": "4bit", "quantize": False}, "recipe only matters when quantizing"),
        ({"bits_for": {"mlp": 8}, "dequantize": True}, "bits_for only matters when quantizing"),
        ({"target_size": "much"}, "such as 16GB"),
        ({"bits_for": {"mlp": 7}}, "'mlp' cannot be used. bits is 7"),
        ({"bits_for": {"mlp": "four"}}, "'four' is no precision"),
        ({"bits_for": {"(": 4}}, "no regular expression"),
        ({"bits_for": {"out_porj": 8}}, "Names near it: .*out_proj"),
        ({"bits_for": {"experts": 8}}, "Names near it: .*switch_mlp"),
        ({"bits_for": {"layernorm": 8}}, "never packed, such as .*layernorm"),
        ({"bits_for": {"switch_mlp.gate_proj": 8}}, "readers multiply both as one matrix"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_one_clear_error(
    options: dict[str, object], said: str, checkpoint: CheckpointFactory
) -> None:
    with pytest.raises(ConversionError, match=said):
        describe(checkpoint("moe"), **options)  # type: ignore[arg-type]
