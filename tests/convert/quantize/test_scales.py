"""Codes, scales and biases are MLX's own form, and lose less than MLX's own choice."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen.checkpoint.layout import Quantization
from mlx_qwen.convert.quantize.packing import packed, unpacked
from mlx_qwen.convert.quantize.rows import PackedRows, searched_rows
from mlx_qwen.convert.quantize.scales import extremes, mlx_grids, searched_grids
from mlx_qwen.convert.settings import DType

DTYPES: dict[DType, mx.Dtype] = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
BITS = (2, 3, 4, 5, 6, 8)


def weights(rows: int = 64, columns: int = 256, seed: int = 0) -> mx.array:
    """Rows like a trained matrix's: of different sizes, with outliers, some of one sign."""
    generator = np.random.default_rng(seed)
    values = generator.standard_t(5, (rows, columns)) * generator.uniform(0.005, 0.1, (rows, 1))
    values[: rows // 8] = np.abs(values[: rows // 8]) + 0.02
    return mx.array(values.astype(np.float32))


def group_errors(w: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, g: int, bits: int) -> np.ndarray:
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    lost = mx.dequantize(weight, scales, biases, group_size=g, bits=bits) - w.astype(mx.float32)
    return np.array((lost**2).reshape(-1, g).sum(axis=1))


def as_mlx(rows: PackedRows) -> tuple[mx.array, mx.array, mx.array]:
    return mx.array(rows.words), mx.array(rows.scales), mx.array(rows.biases)


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_packed_as_mlx_packs_them(bits: int) -> None:
    words = np.array(mx.quantize(weights(), group_size=64, bits=bits)[0])
    codes = unpacked(words, bits)
    assert codes.max() == 2**bits - 1
    assert np.array_equal(packed(codes, bits), words)
    read = mx.dequantize(mx.array(words), mx.ones((64, 4)), mx.zeros((64, 4)), group_size=64, bits=bits)
    assert np.array_equal(np.array(read), codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_the_search_begins_with_the_scales_and_biases_of_mlx(bits: int, dtype: DType) -> None:
    w = weights().astype(DTYPES[dtype])
    _, scales, biases = mx.quantize(w, group_size=32, bits=bits)
    low, high = extremes(np.array(w.astype(mx.float32)).reshape(-1, 32))
    found = mlx_grids(low, high, bits, dtype)
    assert np.array_equal(found.scales.reshape(64, 8), np.array(scales.astype(mx.float32)))
    assert np.array_equal(found.biases.reshape(64, 8), np.array(biases.astype(mx.float32)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, 64), (5, 128), (6, 64), (8, 32)])
def test_no_group_loses_more_than_by_mlx_and_the_whole_loses_less(bits: int, group_size: int, dtype: DType) -> None:
    w = weights().astype(DTYPES[dtype])
    ours = group_errors(w, *as_mlx(searched_rows(w, Quantization(bits, group_size), dtype)), group_size, bits)
    theirs = group_errors(w, *mx.quantize(w, group_size=group_size, bits=bits), group_size, bits)
    assert (ours <= theirs * 1.0001 + 1e-12).all()
    assert ours.sum() < 0.97 * theirs.sum()


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_whose_scales_float16_rounds_to_zero_lose_no_more_than_by_mlx(bits: int) -> None:
    w = (weights() * 1e-6).astype(mx.float16)
    ours = group_errors(w, *as_mlx(searched_rows(w, Quantization(bits, 64), "float16")), 64, bits)
    theirs = group_errors(w, *mx.quantize(w, group_size=64, bits=bits), 64, bits)
    assert (theirs > 0).any()
    assert (ours <= theirs * 1.0001).all()


def test_four_bits_lose_a_tenth_less_and_two_bits_a_quarter() -> None:
    w = weights(rows=256).astype(mx.bfloat16)
    for bits, most in ((4, 0.9), (2, 0.75)):
        ours = group_errors(w, *as_mlx(searched_rows(w, Quantization(bits, 64), "bfloat16")), 64, bits)
        assert ours.sum() < most * group_errors(w, *mx.quantize(w, group_size=64, bits=bits), 64, bits).sum()


def test_scales_and_biases_are_what_the_checkpoint_will_hold() -> None:
    found = searched_rows(weights(), Quantization(4, 64), "bfloat16")
    for array in (found.scales, found.biases):
        assert np.array_equal(np.array(mx.array(array).astype(mx.bfloat16).astype(mx.float32)), array)
    _, scales, biases = found.data
    assert np.array_equal(
        scales.view(np.uint16), np.array(mx.array(found.scales).astype(mx.bfloat16).view(mx.uint16)).ravel()
    )
    assert biases.size == 2 * found.biases.size


def test_important_columns_are_served_first() -> None:
    groups = np.array(weights()).reshape(-1, 64)
    importance = np.ones(64, np.float32)
    importance[:8] = 100.0
    errors = {}
    for name, h in (("even", None), ("weighted", importance)):
        grids = searched_grids(groups, 3, "float32", h)
        codes = np.clip(np.rint((groups - grids.biases) / grids.scales), 0, 7)
        errors[name] = (((codes * grids.scales + grids.biases - groups) ** 2)[:, :8]).sum()
    assert errors["weighted"] < 0.8 * errors["even"]


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_a_group_of_equal_weights_is_kept(value: float) -> None:
    rows = searched_rows(mx.full((2, 64), value), Quantization(4, 64), "bfloat16")
    read = mx.dequantize(*as_mlx(rows), group_size=64, bits=4)
    assert mx.allclose(read, mx.full((2, 64), value), atol=1e-6)


def test_the_rows_of_a_matrix_do_not_depend_on_how_it_is_cut() -> None:
    w = weights(rows=600).astype(mx.bfloat16)
    whole = searched_rows(w, Quantization(4, 64), "bfloat16")
    parts = PackedRows.joined([searched_rows(w[i : i + 7], Quantization(4, 64), "bfloat16") for i in range(0, 600, 7)])
    for name in ("words", "scales", "biases"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name))


def test_weights_that_are_not_finite_show_in_their_own_groups_only() -> None:
    values = np.array(weights(rows=2, columns=128))
    values[0, 3], values[1, 100] = np.nan, np.inf
    rows = searched_rows(mx.array(values), Quantization(4, 64), "float16")
    assert not rows.is_finite
    assert np.array_equal(np.isfinite(rows.scales), [[False, True], [True, False]])
    read = np.array(mx.dequantize(*as_mlx(rows), group_size=64, bits=4))
    assert np.isfinite(read[0, 64:]).all()
    assert not np.isfinite(read[0, :64]).any()
