"""A model that computes NaN or infinity is named, with the first of its parts that does."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from torch import Tensor

from mlx_qwen.cli import main
from mlx_qwen.convert import compare, convert
from mlx_qwen.errors import ConversionError
from tests.conftest import CheckpointFactory
from tests.convert.comparison.conftest import TEXT
from tests.support.foreign import edit_tensors
from tests.support.tokenizers import add_tokenizer

UP = "model.layers.2.mlp.up_proj.weight"


def spoiled(source: Path, folder: Path, name: str, value: float = float("nan")) -> Path:
    """A copy with `value` in the middle of tensor `name`."""
    shutil.copytree(source, folder)
    edit_tensors(folder, lambda tensors: tensors[name].view(-1)[tensors[name].numel() // 2].fill_(value))  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize("name", [UP, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_the_damaged_tensor_and_its_model_are_named(name: str, value: float, reference: Path, tmp_path: Path) -> None:
    damaged = spoiled(reference, tmp_path / "damaged", name, value)
    told = rf"^{damaged} is damaged: language_model\.{name} holds NaN or infinite"
    for pair in ((damaged, reference), (reference, damaged)):
        with pytest.raises(ConversionError, match=told):
            compare(*pair, text=TEXT)


def test_of_many_the_first_that_the_model_meets_is_named(reference: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(reference, tmp_path / "damaged")

    def spoil(tensors: dict[str, Tensor]) -> None:
        for index in (3, 1, 2):
            tensors[f"model.layers.{index}.mlp.down_proj.weight"].fill_(float("inf"))

    edit_tensors(damaged, spoil)
    with pytest.raises(ConversionError, match=r"layers\.1\.mlp\.down_proj"):
        compare(reference, damaged, text=TEXT)


def test_a_head_that_only_one_model_has_shows_in_the_logits(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    tied = add_tokenizer(shutil.copytree(checkpoint("dense", tied=True), tmp_path / "tied"))
    untied = shutil.copytree(checkpoint("dense"), tmp_path / "untied")
    edit_tensors(untied, lambda tensors: tensors["lm_head.weight"].fill_(float("nan")))  # type: ignore[arg-type]
    with pytest.raises(ConversionError, match=rf"^The logits of {untied} are NaN or infinite"):
        compare(tied, add_tokenizer(untied), text=TEXT)


def test_activations_that_overflow_are_named_by_layer_with_the_way_out(reference: Path, tmp_path: Path) -> None:
    large = shutil.copytree(reference, tmp_path / "large")
    edit_tensors(large, lambda tensors: tensors[UP].mul_(1e6))  # type: ignore[arg-type]
    with pytest.raises(ConversionError, match=rf"hidden states after layer 2 of {large} .* use float32"):
        compare(reference, large, text=TEXT, dtype="float16")
    assert compare(reference, large, text=TEXT).layers[2] > 1


def test_the_command_says_so_instead_of_drawing(reference: Path, tmp_path: Path) -> None:
    damaged = spoiled(reference, tmp_path / "damaged", UP)
    arguments = ["compare", str(reference), str(damaged), "--plot", str(tmp_path / "plot.png")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {damaged} is damaged")
    assert not (tmp_path / "plot.png").exists()


def test_an_output_that_a_narrow_dtype_spoiled_is_not_verified(reference: Path, tmp_path: Path) -> None:
    large = spoiled(reference, tmp_path / "large", UP, 1e6)
    with (
        pytest.warns(UserWarning, match="too narrow"),
        pytest.raises(ConversionError, match=rf"language_model\.{UP} holds NaN or infinite"),
    ):
        convert(large, tmp_path / "out", quantize=False, dtype="float16", verify=True)
    assert not (tmp_path / "out").exists()
