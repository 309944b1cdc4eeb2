"""A model that runs one layer at a time gives what the whole model gives, in the memory of one layer."""

from pathlib import Path
from typing import Literal

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert
from mlx_qwen.convert.layerwise import LayerwiseModel, open_layerwise
from mlx_qwen.errors import CheckpointError
from mlx_qwen.loading import load_model
from tests.conftest import CheckpointFactory

INPUT_IDS = mx.array(np.random.default_rng(0).integers(0, 320, (2, 23)))


def run(model: LayerwiseModel, input_ids: mx.array = INPUT_IDS) -> mx.array:
    hidden = model.embed(input_ids)
    for layer in model.layers():
        hidden = layer(hidden)
    return model.logits(hidden)


def whole(folder: Path, dtype: mx.Dtype | None = None) -> mx.array:
    return load_model(folder, ModelConfig.from_directory(folder), dtype=dtype)(INPUT_IDS)


def assert_close(actual: mx.array, expected: mx.array, tolerance: float) -> None:
    assert actual.dtype == expected.dtype
    difference = mx.abs(actual.astype(mx.float32) - expected.astype(mx.float32)).max()
    assert difference.item() <= tolerance * mx.abs(expected.astype(mx.float32)).max().item()


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("kind", ["dense", "moe", "next", "dense_vl"])
def test_logits_are_those_of_the_whole_model(
    checkpoint: CheckpointFactory, kind: str, options: dict[str, object]
) -> None:
    folder = checkpoint(kind, **options)
    with open_layerwise(folder, dtype=mx.float32) as model:
        assert_close(run(model), whole(folder, mx.float32), 1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["dense", "moe", "next"])
def test_so_they_are_of_a_quantized_model(checkpoint: CheckpointFactory, tmp_path: Path, kind: str, bits: int) -> None:
    folder = tmp_path / "mlx"
    convert(checkpoint(kind), folder, bits=bits, group_size=32, progress=False)
    with open_layerwise(folder) as model:
        assert_close(run(model), whole(folder), 1e-5)


def test_fused_experts_are_read_too(checkpoint: CheckpointFactory) -> None:
    folder = checkpoint("moe", fused_experts=True)
    with open_layerwise(folder) as model:
        assert_close(run(model), whole(folder), 1e-5)


def test_activations_take_the_dtype_that_was_asked_for(checkpoint: CheckpointFactory) -> None:
    folder = checkpoint("dense")
    with open_layerwise(folder, dtype=mx.bfloat16) as model:
        assert_close(run(model), whole(folder, mx.bfloat16), 1e-5)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_so_they_do_where_weights_are_microscaled(
    checkpoint: CheckpointFactory, tmp_path: Path, mode: Literal["mxfp4", "mxfp8", "nvfp4"]
) -> None:
    convert(checkpoint("dense"), tmp_path / "packed", mode=mode, progress=False)
    convert(tmp_path / "packed", tmp_path / "exact", dequantize=True, dtype="float32", progress=False)
    with open_layerwise(tmp_path / "packed", dtype=mx.float32) as model:
        assert_close(run(model), whole(tmp_path / "exact"), 1e-5)


def test_the_head_comes_in_blocks_of_the_vocabulary(checkpoint: CheckpointFactory) -> None:
    with open_layerwise(checkpoint("dense")) as model:
        hidden = model.embed(INPUT_IDS)
        normed = model.normed(hidden)
        blocks = [block(normed) for block in model.head(rows=100)]
        assert [block.shape[-1] for block in blocks] == [100, 100, 100, 20]
        assert_close(mx.concatenate(blocks, axis=-1), model.logits(hidden), 1e-6)


def test_batches_may_go_through_a_layer_one_after_the_other(checkpoint: CheckpointFactory) -> None:
    with open_layerwise(checkpoint("moe")) as model:
        together = run(model)
        hidden = [model.embed(row[None]) for row in INPUT_IDS]
        for layer in model.layers():
            hidden = [layer(states) for states in hidden]
        apart = mx.concatenate([model.logits(states) for states in hidden])
        assert_close(apart, together, 1e-5)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_deep_model_takes_no_more_memory_than_a_shallow_one(checkpoint: CheckpointFactory, kind: str) -> None:
    def peak(layers: int) -> int:
        folder = checkpoint(kind, layers=layers, interval=2)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        with open_layerwise(folder) as model:
            run(model)
        return mx.get_peak_memory() - before

    # Six layers more would take more than twice as much.
    assert peak(8) <= 1.5 * peak(2)


def test_a_layer_is_let_go_when_the_next_one_comes(checkpoint: CheckpointFactory) -> None:
    with open_layerwise(checkpoint("dense")) as model:
        layers = model.layers()
        first = next(layers)
        hidden = first(model.embed(INPUT_IDS))
        next(layers)
        with pytest.raises(ValueError, match="layer 0 was let go"):
            first(hidden)


def test_what_load_refuses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"), open_layerwise(tmp_path / "nothing"):
        pass
