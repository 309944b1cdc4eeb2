"""Rounding that knows the inputs changes a matrix's outputs less."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen.checkpoint.layout import Quantization
from mlx_qwen.convert.quantize import correction as module
from mlx_qwen.convert.quantize.correction import column_blocks, corrected_rows, correction
from mlx_qwen.convert.quantize.packing import unpacked
from mlx_qwen.convert.quantize.rows import PackedRows, searched_rows

Floats = np.ndarray
K, G = 128, 32


def inputs(rows: int, seed: int) -> Floats:
    """Inputs as layers have them: correlated, and of different sizes."""
    mixing = np.random.default_rng(7).standard_normal((K, K)) * np.geomspace(3, 0.05, K)[:, None]
    return (np.random.default_rng(seed).standard_normal((rows, K)) @ mixing).astype(np.float32)


def matrix(rows: int = 24) -> Floats:
    return (np.random.default_rng(1).standard_normal((rows, K)) * 0.05).astype(np.float32)


def values(rows: PackedRows, bits: int) -> Floats:
    read = mx.dequantize(mx.array(rows.words), mx.array(rows.scales), mx.array(rows.biases), group_size=G, bits=bits)
    return np.array(read)


def output_error(found: Floats, x: Floats) -> float:
    return float((((found - matrix()) @ x.T) ** 2).sum())


def moments(x: Floats) -> list[Floats]:
    return [x[:, block].T @ x[:, block] for block in column_blocks(K)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_outputs_on_other_inputs_change_by_half_as_much(bits: int) -> None:
    precision = Quantization(bits, G)
    how = correction(moments(inputs(2000, seed=1)))
    ours = output_error(values(corrected_rows(matrix(), precision, "bfloat16", how), bits), inputs(500, seed=2))
    plain = output_error(values(searched_rows(mx.array(matrix()), precision, "bfloat16"), bits), inputs(500, seed=2))
    assert ours < 0.5 * plain


def test_it_is_gptq_with_the_inverse_of_the_moments() -> None:
    w, bits = matrix(), 4
    h = moments(inputs(2000, seed=1))[0].astype(np.float64)
    ours = corrected_rows(w, Quantization(bits, G), "float32", correction([h], damping=0.01))
    inverse = np.linalg.inv(h + 0.01 * np.diag(h).mean() * np.eye(K))
    upper = np.linalg.cholesky(inverse).T
    left, codes = w.astype(np.float64), np.empty(w.shape)
    for j in range(K):
        scale, bias = ours.scales[:, j // G], ours.biases[:, j // G]
        codes[:, j] = np.clip(np.rint((left[:, j] - bias) / scale), 0, 2**bits - 1)
        error = (left[:, j] - codes[:, j] * scale - bias) / upper[j, j]
        left[:, j:] -= np.outer(error, upper[j, j:])
    assert (unpacked(ours.words, bits) == codes).mean() > 0.999


def test_without_correlation_it_rounds_as_the_search_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REFITS", 1)
    precision, how = Quantization(4, G), correction([np.eye(K, dtype=np.float32)])
    ours, plain = (
        corrected_rows(matrix(), precision, "bfloat16", how),
        searched_rows(mx.array(matrix()), precision, "bfloat16"),
    )
    assert np.array_equal(ours.words, plain.words)


@pytest.mark.parametrize("seen", [0, 1, 5])
def test_few_inputs_do_no_harm(seen: int) -> None:
    precision = Quantization(4, G)
    x = inputs(seen, seed=3)
    found = values(corrected_rows(matrix(), precision, "bfloat16", correction(moments(x))), 4)
    plain = values(searched_rows(mx.array(matrix()), precision, "bfloat16"), 4)
    assert np.isfinite(found).all()
    assert ((found - matrix()) ** 2).sum() < 2 * ((plain - matrix()) ** 2).sum()


def test_more_columns_than_memory_allows_are_corrected_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_COLUMNS", 64)
    monkeypatch.setattr(module, "_BLOCK_STEP", 32)
    assert column_blocks(K) == [slice(0, 64), slice(64, 128)]
    how = correction(moments(inputs(2000, seed=1)))
    ours = output_error(values(corrected_rows(matrix(), Quantization(4, G), "bfloat16", how), 4), inputs(500, seed=2))
    plain = searched_rows(mx.array(matrix()), Quantization(4, G), "bfloat16")
    assert ours < 0.8 * output_error(values(plain, 4), inputs(500, seed=2))
