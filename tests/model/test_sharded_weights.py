"""What a rank reads and holds: its own part of each tensor, packed or not, and no more memory on the way there."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_qwen.checkpoint import shards
from mlx_qwen.checkpoint.matrices import Matrix, module_name, read_matrices
from mlx_qwen.checkpoint.slices import SlicedTensors
from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert
from mlx_qwen.convert.planning import plan
from mlx_qwen.demo import demo_folder
from mlx_qwen.errors import ShardingError
from mlx_qwen.loading import load_model, plan_model
from mlx_qwen.model import Model
from mlx_qwen.model.sharding import Share
from tests.support.ranks import in_threads

Checkpoint = Callable[..., Path]


class Alone:
    """A rank that loads without the others."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def load(path: Path, group: Any = None) -> Model:
    return load_model(path, ModelConfig.from_directory(path), group=group)


def bytes_of(model: Model, without: str = "nothing") -> int:
    return sum(array.nbytes for name, array in tree_flatten(model.parameters()) if not name.startswith(without))


def unpacked(matrix: Matrix) -> mx.array:
    quantization = matrix.quantization
    assert quantization is not None
    return mx.dequantize(
        matrix.weight, matrix.scales, matrix.biases, group_size=quantization.group_size, bits=quantization.bits
    )


@pytest.fixture(scope="module")
def packed(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[object, Path] = {}

    def make(kind: str, **options: Any) -> Path:
        key = (kind, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("packed") / kind
            convert(checkpoint(kind), made[key], **options)
        return made[key]

    return make


@pytest.mark.parametrize(("kind", "group_size"), [("dense", 64), ("moe_vl", 32), ("next", 32)])
def test_ranks_with_packed_weights_together_compute_what_one_does(
    packed: Callable[..., Path], kind: str, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = packed(kind, bits=4, group_size=group_size, dtype="float32")
    ids = mx.array(np.random.default_rng(0).integers(0, 299, (1, 21)))
    expected = np.array(load(path)(ids))
    for logits in in_threads(2, lambda group: np.array(load(path, group)(ids)), monkeypatch):
        assert np.abs(logits - expected).max() <= 2e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("kind", "count"), [("dense", 2), ("dense", 4), ("moe_vl", 2), ("next", 2)])
def test_a_packed_part_means_bit_for_bit_what_it_does_in_the_whole(
    packed: Callable[..., Path], kind: str, count: int
) -> None:
    path = packed(kind, bits=4, group_size=32, dtype="float32")
    plan = plan_model(path, ModelConfig.from_directory(path))
    targets = [target for target in plan.targets if target.quantization is not None]
    whole = {name: np.array(unpacked(matrix)) for name, matrix in read_matrices(targets, plan.config, None).items()}
    shares = [Share(plan.config.text, rank, count) for rank in range(count)]
    for share in shares:
        for name, matrix in SlicedTensors(targets, plan.config, None, share.cut).items():
            spec = next(
                target.spec for target in targets if module_name(target.spec.name, plan.config) == f"{name}.weight"
            )
            cut = share.cut(spec)
            if cut is None:
                continue
            taken = np.concatenate([np.arange(*span) for span in cut.spans])
            expected = np.take(whole[name], taken, axis=-1 if cut.axis == "columns" else -2)
            np.testing.assert_array_equal(np.array(unpacked(matrix)), expected, err_msg=name)


def test_ranks_that_would_cut_through_a_group_are_refused_with_what_would_do(packed: Callable[..., Path]) -> None:
    path = packed("moe", bits=4, group_size=32, dtype="float32")
    said = r"4 ranks would cut the 64 columns of .*down_proj.weight every 16, through groups of 32 .* Start 2 ranks"
    with pytest.raises(ShardingError, match=said):
        load(path, Alone(0, 4))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_what_it_holds_of_each_tensor_once(
    checkpoint: Checkpoint, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = checkpoint("moe", fused_experts=True), []
    as_mlx = shards._as_mlx
    monkeypatch.setattr(shards, "_as_mlx", lambda values, kind: read.append(values.nbytes) or as_mlx(values, kind))
    config = ModelConfig.from_directory(path)
    load(path, Alone(rank, 2))
    share = Share(config.text, rank, 2)
    assert sum(read) == 4 * sum(int(np.prod(share.shape(target.spec))) for target in plan_model(path, config).targets)


@pytest.fixture
def peak_above(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., float]]:
    """The most memory, MLX's and NumPy's, that loading takes beside a rank's weights, in largest stored tensors."""
    monkeypatch.setattr("mlx_qwen.loading.gathered_numbers", lambda number, group: [number] * group.size())
    while_read: list[int] = []
    as_mlx = shards._as_mlx

    def copied(values: np.ndarray, kind: mx.Dtype | None) -> mx.array:
        array = as_mlx(values, kind)
        mx.eval(array)
        while_read.append(mx.get_active_memory() + values.nbytes)
        return array

    monkeypatch.setattr(shards, "_as_mlx", copied)

    def measure(path: Path, rank: int, count: int, **options: Any) -> float:
        config = ModelConfig.from_directory(path)
        largest = max(info.nbytes for info in shards.checkpoint_tensors(path).values())
        gc.collect()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        while_read.clear()
        held = bytes_of(load_model(path, config, group=Alone(rank, count), **options), without="vision.")  # type: ignore[arg-type]
        return (max(mx.get_peak_memory(), *while_read) - before - held) / largest

    limit = mx.set_cache_limit(0)  # larger buffers would be used again for smaller arrays
    yield measure
    mx.set_cache_limit(limit)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("dtype", [None, mx.float32], ids=["as stored", "cast"])
@pytest.mark.parametrize("kind", ["dense", "moe", "next", "bundled"])
def test_a_rank_never_holds_more_than_its_share_and_one_tensor(
    checkpoint: Checkpoint, peak_above: Callable[..., float], kind: str, dtype: mx.Dtype | None, count: int
) -> None:
    options = {"with_mtp": True} if kind == "dense" else {"fused_experts": True}
    path = demo_folder() if kind == "bundled" else checkpoint(kind, dtype="bfloat16", **options)
    for rank in range(count):
        assert 0 < peak_above(path, rank, count, dtype=dtype) <= 1


@pytest.mark.parametrize("kind", ["dense", "moe", "next"])
def test_nor_does_a_rank_with_packed_weights(
    packed: Callable[..., Path], peak_above: Callable[..., float], kind: str
) -> None:
    assert 0 < peak_above(packed(kind, bits=4, group_size=32, dtype="float32"), 1, 2) <= 1


@pytest.mark.parametrize("rank", [0, 1])
def test_nor_does_a_rank_with_whole_layers(peak_above: Callable[..., float], rank: int) -> None:
    assert 0 < peak_above(demo_folder(), rank, 2, pipeline=True) <= 1


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("kind", ["dense", "moe", "next"])
def test_a_plan_counts_what_a_rank_holds(checkpoint: Checkpoint, kind: str, count: int) -> None:
    path = checkpoint(kind, dtype="bfloat16")
    planned = plan(path, memory="16GB", ranks=count, recipe="unpacked")
    # Norms, A_log and dt_bias, a hundredth here, are wider in memory, and of norms the companion has exact copies.
    assert planned.weights.text == pytest.approx(bytes_of(load(path, Alone(0, count))), rel=0.01)
    assert planned.stored == plan(path, memory="16GB", recipe="unpacked").weights
