"""The language model computes what transformers computes: every family, every length, however the tokens arrive."""

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers

from mlx_qwen.config import ModelConfig
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model
from tests.support.checkpoints import KINDS, Kind, reference_model

Checkpoint = Callable[..., Path]
LENGTHS = (1, 7, 63, 64, 65, 130, 257)
TOLERANCE = 2e-4


def tokens(T: int, rows: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + T).integers(0, 299, (rows, T))


def load(path: Path) -> Model:
    return load_model(path, ModelConfig.from_directory(path))


def assert_close(ours: mx.array | np.ndarray, reference: torch.Tensor | mx.array | np.ndarray) -> None:
    """Within 2e-4 of the largest absolute logit."""
    expected = reference.numpy() if isinstance(reference, torch.Tensor) else np.array(reference)
    assert np.abs(np.array(ours) - expected).max() <= TOLERANCE * np.abs(expected).max()


def in_pieces(model: Model, ids: np.ndarray, cuts: list[int]) -> np.ndarray:
    cache = model.make_cache()
    edges = [0, *cuts, ids.shape[1]]
    pieces = [model(mx.array(ids[:, a:b]), cache) for a, b in pairwise(edges)]
    return np.array(mx.concatenate(pieces, axis=1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_transformers_at_every_length(checkpoint: Checkpoint, kind: Kind, tied: bool) -> None:
    path = checkpoint(kind, tied=tied)
    model, reference = load(path), reference_model(path)
    for T in LENGTHS:
        ids = tokens(T)
        with torch.no_grad():
            assert_close(model(mx.array(ids)), reference(input_ids=torch.tensor(ids), use_cache=False).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_in_pieces_equals_prefill_at_once(checkpoint: Checkpoint, kind: Kind) -> None:
    model, ids = load(checkpoint(kind)), tokens(130, rows=2)
    assert_close(in_pieces(model, ids, [1, 33, 97]), model(mx.array(ids)))


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_equals_prefill_at_once(checkpoint: Checkpoint, kind: Kind) -> None:
    model, ids = load(checkpoint(kind)), tokens(40)
    assert_close(in_pieces(model, ids, list(range(1, 40))), model(mx.array(ids)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_left_padded_row_equals_the_row_alone(checkpoint: Checkpoint, kind: Kind) -> None:
    model, ids, padding = load(checkpoint(kind)), tokens(30, rows=3), np.array([0, 4, 21])
    mask = np.arange(30) >= padding[:, None]
    cache = model.make_cache()
    pieces = [
        model(mx.array(ids[:, :9]), cache, mask=mx.array(mask[:, :9])),
        model(mx.array(ids[:, 9:26]), cache, mask=mx.array(mask[:, 9:26])),
        model(mx.array(ids[:, 26:27]), cache),
        model(mx.array(ids[:, 27:]), cache),
    ]
    batch = np.array(mx.concatenate(pieces, axis=1))
    for row, first in enumerate(padding):
        assert_close(batch[row : row + 1, first:], model(mx.array(ids[row : row + 1, first:])))


@pytest.mark.parametrize("kind", ["dense", "moe", "next"])
def test_64_greedy_tokens_are_those_of_transformers(checkpoint: Checkpoint, kind: Kind) -> None:
    path = checkpoint(kind)
    model, ids = load(path), tokens(12)
    with torch.no_grad():
        expected = reference_model(
            path
        ).generate(  # type: ignore[operator]
            torch.tensor(ids), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, 12:]
    cache, written = model.make_cache(), []
    step = mx.array(ids)
    for _ in range(64):
        step = mx.argmax(model(step, cache)[:, -1:], axis=-1)
        written.append(int(step.item()))
    assert written == expected.tolist()


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_bf16_is_nearer_to_fp32_than_torch_in_bf16(checkpoint: Checkpoint, kind: Kind) -> None:
    ours, theirs = [], []
    for seed in range(3):
        path = checkpoint(kind, dtype="bfloat16", layers=8, seed=seed)
        ids = tokens(64, rows=2, seed=seed)
        name = json.loads((path / "config.json").read_text())["architectures"][0]
        in_bf16 = getattr(transformers, name).from_pretrained(path, dtype=torch.bfloat16).eval()
        with torch.no_grad():
            truth = reference_model(path)(input_ids=torch.tensor(ids)).logits.numpy()
            theirs.append(np.square(in_bf16(input_ids=torch.tensor(ids)).logits.float().numpy() - truth).mean())
        logits = load(path)(mx.array(ids))
        assert logits.dtype == mx.bfloat16
        ours.append(np.square(np.array(logits.astype(mx.float32)) - truth).mean())
    assert np.mean(ours) < 0.8 * np.mean(theirs)


def test_fp16_stays_finite_and_near_fp32(checkpoint: Checkpoint) -> None:
    path = checkpoint("dense")
    ids = mx.array(tokens(64))
    half = load_model(path, ModelConfig.from_directory(path), dtype=mx.float16)(ids)
    full = np.array(load(path)(ids))
    assert half.dtype == mx.float16
    assert np.abs(np.array(half.astype(mx.float32)) - full).max() <= 0.05 * np.abs(full).max()


@pytest.mark.parametrize("ids", [mx.array([1, 2, 3]), mx.zeros((1, 0), mx.int32)])
def test_ids_that_are_no_batch_of_tokens_are_refused_with_their_shape(checkpoint: Checkpoint, ids: mx.array) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(str(ids.shape))}, expected \[B, T\]"):
        load(checkpoint("dense"))(ids)
