"""Prompts with images through the Metal kernels, in the emulator, give what they give through the references."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import stats
from mlx_qwen.config import ModelConfig
from mlx_qwen.loading import load_model
from tests.metal_emulator import emulated
from tests.vision.prompts import Prompt, ours


def test_images_then_decoding_then_another_image(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[..., Path]
) -> None:
    path = checkpoint("moe_vl")
    model = load_model(path, ModelConfig.from_directory(path))
    first, second = Prompt().text(3).image(4, 6).text(4), Prompt().text(2).image(2, 4).text(3)

    def logits() -> np.ndarray:
        cache, pieces = model.make_cache(), []
        for prompt in (first, Prompt([5]), Prompt([9]), second, Prompt([7])):
            pieces.append(model(mx.array(prompt.input_ids), cache, **ours(prompt)))
            mx.eval(pieces[-1], cache.arrays())
        return np.array(mx.concatenate(pieces, axis=1))

    monkeypatch.setenv("MLX_QWEN_KERNELS", "reference")
    expected = logits()
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    with emulated():
        found = logits()
    assert "attention_prologue" in stats()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
