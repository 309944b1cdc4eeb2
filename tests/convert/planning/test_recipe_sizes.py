"""Every recipe of every released size takes the bytes that follow from what the recipe promises."""

import re
from math import prod
from pathlib import Path

import pytest

from mlx_qwen.checkpoint.names import TensorSpec, tensor_specs
from mlx_qwen.checkpoint.released import SIZES, reduced, released
from mlx_qwen.convert import RECIPES, convert
from mlx_qwen.convert.planning.described import describe
from mlx_qwen.convert.planning.weight_sizes import weights_of
from tools.benchmarks.synthetic import write_random_checkpoint

# What a weight takes, its share of scales and biases included: affine in groups of 64 with two bf16 numbers each,
# the others with one byte for 32 or 16 weights.
AFFINE = {bits: bits + 32 / 64 for bits in (2, 3, 4, 5, 6, 8)}
MODES = {"mxfp4": 4 + 8 / 32, "nvfp4": 4 + 8 / 16, "mxfp8": 8 + 8 / 32}
MATRIX = re.compile(r"(_proj|embed_tokens|lm_head|mtp\.fc|in_proj_qkv|in_proj_z|mlp\.gate|shared_expert_gate)\.weight$")
ROUTER = re.compile(r"mlp\.(gate|shared_expert_gate)\.weight$")
SENSITIVE = re.compile(r"embed_tokens|lm_head|self_attn|linear_attn|mlp\.shared_expert\.|^mtp\.")


def promised_bits(recipe: str, spec: TensorSpec) -> float:
    """Bits of one weight of this tensor, by the name of the recipe."""
    if spec.name.startswith("vision_tower.") or not MATRIX.search(spec.name):
        return 32 if spec.name.endswith("A_log") else 16
    if ROUTER.search(spec.name):
        return AFFINE[8]
    name, *mixed = recipe.removeprefix("mixed-").split("-")
    low = MODES[name] if name in MODES else AFFINE[int(name.removesuffix("bit"))]
    if mixed:
        return AFFINE[int(mixed[0])] if SENSITIVE.search(spec.name) else low
    return AFFINE[8] if spec.name.startswith("mtp.") else low


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", SIZES)
def test_planned_weights_are_within_a_hundredth_of_what_the_recipe_promises(size: str, recipe: str) -> None:
    promised = sum(promised_bits(recipe, spec) * prod(spec.shape) / 8 for spec in tensor_specs(released(size)))
    assert weights_of(describe(size), recipe).total == pytest.approx(promised, rel=0.01)


@pytest.fixture(scope="module", params=["0.8B", "35B-A3B"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a released shape, narrowed."""
    changes = {"vocab_size": 4096, "hidden_size": 256, "linear_num_key_heads": 4, "linear_num_value_heads": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2} if request.param == "35B-A3B" else {}
    folder = tmp_path_factory.mktemp(request.param) / "source"
    write_random_checkpoint(reduced(request.param, num_layers=4, changes={**changes, **experts}), folder)
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_files_that_were_written_are_within_a_hundredth_of_the_plan(source: Path, recipe: str, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", recipe=recipe, quantizer="rtn")
    on_disk = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert weights_of(describe(source), recipe).total == pytest.approx(on_disk, rel=0.01)
