"""The whole model through its Metal kernels, in the emulator, computes what it computes through the references."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import reset_stats, stats
from mlx_qwen.config import ModelConfig
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model
from tests.metal_emulator import emulated
from tests.support.checkpoints import Kind

Checkpoint = Callable[..., Path]
KINDS: tuple[Kind, ...] = ("dense", "moe", "next")
TOLERANCE = 1e-5


def load(path: Path) -> Model:
    return load_model(path, ModelConfig.from_directory(path))


def tokens(T: int, rows: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(T).integers(0, 299, (rows, T)))


def in_pieces(model: Model, ids: mx.array, edges: list[int], mask: np.ndarray | None = None) -> np.ndarray:
    """Logits of `ids`, fed from edge to edge; the first pieces are padded as `mask` says."""
    cache, pieces = model.make_cache(), []
    for a, b in pairwise(edges):
        part = None if mask is None or mask[:, a:b].all() else mx.array(mask[:, a:b])
        pieces.append(model(ids[:, a:b], cache, mask=part))
        mx.eval(pieces[-1], cache.arrays())
    return np.array(mx.concatenate(pieces, axis=1))


def both_ways(
    monkeypatch: pytest.MonkeyPatch, model: Model, ids: mx.array, edges: list[int], mask: np.ndarray | None = None
) -> None:
    """Assert that kernels and references agree to 1e-5 of the largest logit."""
    monkeypatch.setenv("MLX_QWEN_KERNELS", "reference")
    expected = in_pieces(model, ids, edges, mask)
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    reset_stats()
    with emulated():
        found = in_pieces(model, ids, edges, mask)
    real = slice(None) if mask is None else mask
    assert np.abs(found - expected)[real].max() <= TOLERANCE * np.abs(expected)[real].max()


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_in_pieces_then_decoding(monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, kind: Kind) -> None:
    both_ways(monkeypatch, load(checkpoint(kind)), tokens(80), [0, 66, 75, 76, 77, 80])


@pytest.mark.parametrize("kind", KINDS)
def test_a_left_padded_batch(monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, kind: Kind) -> None:
    mask = np.arange(24) >= np.array([[0], [5]])
    both_ways(monkeypatch, load(checkpoint(kind)), tokens(24, rows=2), [0, 20, 21, 24], mask)


def test_packed_weights_and_packed_keys(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    from mlx_qwen.convert import convert

    for bits in (4, 8):
        convert(checkpoint("moe"), tmp_path / str(bits), bits=bits, group_size=32, progress=False)
        both_ways(monkeypatch, load(tmp_path / str(bits)), tokens(12), [0, 9, 10, 11, 12])


@pytest.mark.parametrize("kind", KINDS)
def test_verifying_and_rolling_back(monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, kind: Kind) -> None:
    model, ids = load(checkpoint(kind)), tokens(26)
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    with emulated() as report:
        cache = model.make_cache()
        mx.eval(model(ids[:, :20], cache))
        cache.record()
        verified = np.array(model(ids[:, 20:24], cache))
        cache.roll_back(2, 4)
        continued = np.array(model(ids[:, 24:], cache))
    assert report.count("mlx_qwen_gated_delta_replay") or report.count("mlx_qwen_replay")
    monkeypatch.setenv("MLX_QWEN_KERNELS", "reference")
    whole = np.array(model(ids[:, :24]))[:, 20:]
    kept = np.array(model(mx.concatenate([ids[:, :22], ids[:, 24:]], axis=1)))[:, 22:]
    for found, expected in ((verified, whole), (continued, kept)):
        assert np.abs(found - expected).max() <= 10 * TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("kind", KINDS)
def test_every_operation_of_a_decoded_token_is_a_kernel(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, kind: Kind
) -> None:
    model = load(checkpoint(kind))
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    with emulated():
        cache = model.make_cache()
        mx.eval(model(tokens(20), cache))
        reset_stats()
        mx.eval(model(tokens(1), cache))
    counts = stats()
    assert {"gated_delta_decode", "add_rms_norm", "rms_norm"} <= set(counts)
    assert all(not op.reference for op in counts.values()), counts
