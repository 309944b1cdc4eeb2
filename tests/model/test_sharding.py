"""A model that ranks share: every weight is somewhere, all ranks together compute what one does, and send little."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen.checkpoint.names import MTP_PREFIX, Role, tensor_specs
from mlx_qwen.checkpoint.released import SIZES, released
from mlx_qwen.config import ModelConfig
from mlx_qwen.demo import demo_folder
from mlx_qwen.errors import ShardingError
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model
from mlx_qwen.model.collectives import summed
from mlx_qwen.model.sharding import Share, check_ranks, possible_ranks
from tests.support.checkpoints import KINDS
from tests.support.ranks import in_processes, in_threads

Checkpoint = Callable[..., Path]
WHOLE = (Role.VISION, Role.ROUTER, Role.SHIFTED_NORM, Role.PLAIN_NORM)
TOLERANCE = 2e-4


def load(path: Path, group: Any = None, dtype: mx.Dtype | None = mx.float32) -> Model:
    return load_model(path, ModelConfig.from_directory(path), dtype=dtype, group=group)


def rows_of(spans: tuple[tuple[int, int], ...]) -> Iterator[int]:
    for start, stop in spans:
        yield from range(start, stop)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [2, 4, 8])
def test_every_released_size_is_divided_among_2_4_and_8_ranks_without_gap_or_overlap(size: str, count: int) -> None:
    config = released(size, num_layers=4)
    check_ranks(config.text, count)
    shares = [Share(config.text, rank, count) for rank in range(count)]
    for spec in tensor_specs(config):
        cuts = [share.cut(spec) for share in shares]
        if spec.role in WHOLE or spec.name.startswith(MTP_PREFIX):
            assert cuts == [None] * count
            continue
        of_columns = spec.name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight"))
        assert {cut.axis for cut in cuts if cut} == {"columns" if of_columns else "rows"}
        extent = spec.shape[-1] if of_columns else spec.shape[int(spec.role is Role.EXPERT)]
        taken = np.bincount([row for cut in cuts if cut for row in rows_of(cut.spans)], minlength=extent)
        repeated = max(count // config.text.num_key_value_heads, 1)
        assert set(taken) == {repeated if ".k_proj" in spec.name or ".v_proj" in spec.name else 1}, spec.name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [3, 5])
def test_3_and_5_ranks_are_refused_with_the_numbers_that_would_do(size: str, count: int) -> None:
    with pytest.raises(ShardingError, match=rf"{count} ranks do not divide .* \d+\. Start 2, 4(,| or) .*8.* ranks\."):
        check_ranks(released(size).text, count)
    assert {2, 4, 8} <= set(possible_ranks(released(size).text))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", [*KINDS, "demo"])
def test_ranks_together_compute_what_one_does(
    checkpoint: Checkpoint, kind: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = demo_folder() if kind == "demo" else checkpoint(kind, with_mtp=True)
    prompt = mx.array(np.random.default_rng(0).integers(0, 299, (2, 37)))

    def answer(group: Any) -> tuple[np.ndarray, list[int]]:
        model = load(path, group)
        cache = model.make_cache()
        logits, tokens = model(prompt[:1], cache), []
        for _ in range(16):
            tokens.append(int(mx.argmax(logits[0, -1])))
            logits = model(mx.array([tokens[-1:]]), cache)
        return np.array(model(prompt)), tokens

    expected, tokens = answer(None)
    for logits, written in in_threads(count, answer, monkeypatch):
        assert np.abs(logits - expected).max() <= TOLERANCE * np.abs(expected).max()
        assert written == tokens


def test_a_step_takes_two_sums_a_layer_and_those_of_embedding_and_head(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint("moe")

    def sent(group: Any) -> list[tuple[str, int]]:
        model = load(path, group)
        mx.eval(model(mx.array([[1, 2, 3]])))
        group.sent.clear()
        mx.eval(model(mx.array([[4]])))
        return list(group.sent)

    hidden, vocabulary, layers = 64, 320, 4
    expected = [("gather", 4 * hidden)] * (1 + 2 * layers) + [("gather", 4 * vocabulary // 2)]
    assert in_threads(2, sent, monkeypatch) == [expected, expected]


_RING = """
import sys
from pathlib import Path
import mlx.core as mx
from mlx_qwen.config import ModelConfig
from mlx_qwen.loading import load_model
group = mx.distributed.init(strict=True, backend="ring")
folder, steps = Path(sys.argv[1]), int(sys.argv[2])
model = load_model(folder, ModelConfig.from_directory(folder), dtype=mx.float32, group=group)
cache = model.make_cache()
logits = model(mx.array([[5, 9, 17, 33, 2]]), cache)
for _ in range(steps):
    token = int(mx.argmax(logits[0, -1]))
    print(token, *logits[0, -1].tolist())
    logits = model(mx.array([[token]]), cache)
"""


@pytest.mark.parametrize(("count", "steps"), [(2, 8), (4, 2)])
def test_processes_on_a_ring_give_the_same_tokens_with_compiled_steps(
    checkpoint: Checkpoint, count: int, steps: int, tmp_path: Path
) -> None:
    path = checkpoint("next")
    model = load(path)
    cache = model.make_cache()
    logits = model(mx.array([[5, 9, 17, 33, 2]]), cache)
    written = [out.splitlines() for out in in_processes(count, _RING, path, steps, folder=tmp_path)]
    assert all(lines == written[0] for lines in written)
    for line in written[0]:
        token, *theirs = map(float, line.split())
        own = np.array(logits[0, -1])
        assert np.abs(np.array(theirs) - own).max() <= TOLERANCE * np.abs(own).max()
        assert int(token) == int(own.argmax())
        logits = model(mx.array([[int(token)]]), cache)


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_together_see_images_as_one_does(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.from_directory(demo_folder())
    assert config.vision is not None and config.image_token_id is not None
    patch = config.vision.in_channels * config.vision.temporal_patch_size * config.vision.patch_size**2
    pixels = mx.array(np.random.default_rng(0).normal(size=(16, patch)).astype(np.float32))
    ids = mx.array([[5, 9, *[config.image_token_id] * 4, 17, 33]])

    def answer(group: Any) -> np.ndarray:
        return np.array(load(demo_folder(), group)(ids, pixel_values=pixels, image_grid_thw=mx.array([[1, 4, 4]])))

    expected = answer(None)
    for logits in in_threads(count, answer, monkeypatch):
        assert np.abs(logits - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", ["moe", "demo"])
def test_ranks_in_bf16_are_as_near_to_fp32_as_one_rank(
    checkpoint: Checkpoint, kind: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = demo_folder() if kind == "demo" else checkpoint(kind)
    ids = mx.array(np.random.default_rng(0).integers(0, 299, (1, 48)))

    def logits(dtype: mx.Dtype, group: Any = None) -> np.ndarray:
        return np.array(load(path, group, dtype)(ids).astype(mx.float32))

    exact = logits(mx.float32)
    alone = np.sqrt(np.square(logits(mx.bfloat16) - exact).mean())
    for together in in_threads(count, lambda group: logits(mx.bfloat16, group), monkeypatch):
        assert np.sqrt(np.square(together - exact).mean()) <= alone


@pytest.mark.parametrize(("count", "size"), [(2, 70_000), (4, 65_536)])
def test_parts_in_bf16_are_added_without_rounding(count: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = np.random.default_rng(0).normal(size=(count, 1, size)).astype(np.float32)
    rounded = [mx.array(part).astype(mx.bfloat16) for part in parts]
    exact = sum(np.array(part.astype(mx.float32)).astype(np.float64) for part in rounded)
    for total in in_threads(count, lambda group: np.array(summed(rounded[group.rank()], group)), monkeypatch):
        np.testing.assert_allclose(total, exact, rtol=0, atol=2e-6)


def test_many_bytes_of_more_than_two_ranks_are_summed_by_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    def sent(group: Any) -> list[tuple[str, int]]:
        mx.eval(summed(mx.ones((1, 65_537), mx.bfloat16), group))
        return list(group.sent)

    assert in_threads(4, sent, monkeypatch) == [[("sum", 131_074)]] * 4
    assert in_threads(2, sent, monkeypatch) == [[("gather", 131_074)]] * 2
