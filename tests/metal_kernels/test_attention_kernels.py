"""Attention's prologue and epilogue, through the emulator, beside their reference and transformers."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5RMSNorm,
    Qwen3_5TextRotaryEmbedding,
    apply_rotary_pos_emb,
)

from metal_kernels import OpStats, _build, reset_stats, stats
from metal_kernels.attention import Rotary, attention_epilogue, attention_prologue, reference
from tests.metal_emulator import KernelError, emulated

EPS = 1e-6
ORDERS = ["forward", "reverse", "random"]
TOLERANCE = {mx.float32: 2e-6, mx.bfloat16: 2**-7, mx.float16: 2**-10}
RELEASED = Rotary(64, 1e7, (11, 11, 10))
SMALL = Rotary(8, 1e4, (2, 1, 1))


@pytest.fixture(autouse=True)
def _metal_backend(monkeypatch):
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    reset_stats()


def normal(*shape, dtype=mx.float32, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)).astype(dtype)


def assert_close(found, expected):
    """Within the dtype's tolerance of the largest value of a head."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    exact = expected.astype(mx.float32)
    bound = TOLERANCE[expected.dtype] * mx.abs(exact).max(axis=-1, keepdims=True)
    assert mx.all(mx.abs(found.astype(mx.float32) - exact) <= bound).item()


def check_prologue(positions, *, H=4, Hkv=2, D=32, B=1, T=1, rotary=SMALL, qkv=None, dtype=mx.float32):
    qkv = normal(B, T, (2 * H + 2 * Hkv) * D, dtype=dtype) if qkv is None else qkv
    weights = normal(D, seed=1), normal(D, seed=2)
    options = {"rotary": rotary, "num_heads": H, "num_kv_heads": Hkv, "eps": EPS}
    q, kv = attention_prologue(qkv, *weights, positions, **options)
    expected_q, expected_kv = reference.attention_prologue(qkv, *weights, positions, **options)
    assert_close(q, expected_q)
    assert_close(kv, expected_kv)
    assert mx.array_equal(kv[1], expected_kv[1])


def grid_positions(B, T):
    return mx.array(np.random.default_rng(3).integers(0, 4000, (3, B, T)))


@pytest.mark.parametrize(("H", "Hkv"), [(8, 2), (16, 2), (24, 4), (32, 2)], ids=str)
def test_the_heads_of_every_released_size_are_placed(H, Hkv):
    with emulated() as report:
        check_prologue(mx.array(1000), H=H, Hkv=Hkv, D=256, rotary=RELEASED)
    assert report.count() == 1
    assert stats() == {"attention_prologue": OpStats(kernel=1)}


@pytest.mark.parametrize(
    ("D", "rotary"),
    [(32, SMALL), (40, Rotary(40, 1e4)), (96, Rotary(34, 1e6)), (128, Rotary(128, 1e6))],
    ids=["a quarter turned", "all turned", "pairs past one SIMD group", "four elements a lane"],
)
def test_heads_of_any_width_are_placed(D, rotary):
    with emulated():
        check_prologue(mx.array(5), D=D, rotary=rotary, T=3)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_short_types_are_rounded_once(dtype):
    with emulated():
        check_prologue(mx.array([3, 100]), B=2, T=5, dtype=dtype)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("positions", "B"),
    [(mx.array(7), 2), (mx.array([7, 70]), 2), (mx.arange(9), 9), (grid_positions(2, 3), 2), (grid_positions(1, 1), 1)],
    ids=["one offset", "an offset a row", "many offsets", "three axes", "three axes of one token"],
)
def test_every_kind_of_position_is_read(positions, B, order):
    T = positions.shape[2] if positions.ndim == 3 else 3
    with emulated(checked=True, order=order):
        check_prologue(positions, B=B, T=T)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_keys_and_values_alone_are_those_beside_queries(dtype):
    qkv, weights = normal(2, 3, 8 * 32, dtype=dtype), (normal(32, seed=1), normal(32, seed=2))
    options = {"rotary": SMALL, "num_kv_heads": 2, "eps": EPS}
    with emulated(checked=True):
        _, beside = attention_prologue(qkv, *weights, mx.array([7, 70]), num_heads=4, **options)
        q, alone = attention_prologue(qkv[..., 4 * 32 :], *weights, mx.array([7, 70]), num_heads=0, **options)
    assert stats() == {"attention_prologue": OpStats(kernel=1, reference={"no queries": 1})}
    assert q.shape == (2, 0, 3, 32)
    assert_close(alone, beside)


def test_strided_rows_are_read_in_place():
    wide = normal(2, 6, 800)
    with emulated(checked=True) as report:
        check_prologue(mx.array(4), B=2, T=3, qkv=wide[:, ::2, 700:100:-2][..., :256])
    assert report.count() == 1


@pytest.mark.parametrize("backend", ["metal", "reference"])
@pytest.mark.parametrize("first", [0, 262_100], ids=["at the start", "at the end of the context"])
@pytest.mark.parametrize("text", [True, False], ids=["text", "images"])
def test_positions_up_to_the_last_equal_transformers(monkeypatch, backend, first, text):
    monkeypatch.setenv("MLX_QWEN_KERNELS", backend)
    B, T, H, Hkv, D = 1, 4, 2, 1, 256
    axes = np.random.default_rng(0).integers(first, first + 40, (3, B, T))
    if text:
        axes = np.broadcast_to(first + np.arange(T), (3, B, T))
    qkv = normal(B, T, (2 * H + 2 * Hkv) * D)
    weights = normal(D, seed=1), normal(D, seed=2)
    with emulated():
        q, kv = attention_prologue(
            qkv,
            *weights,
            mx.array(first) if text else mx.array(axes),
            rotary=RELEASED,
            num_heads=H,
            num_kv_heads=Hkv,
            eps=EPS,
        )
    expected = transformers_heads(qkv, weights, axes, H, Hkv)
    for found, wanted in zip((q, kv[0]), expected, strict=True):
        np.testing.assert_allclose(np.array(found), wanted, atol=4e-6 * np.abs(wanted).max())


def transformers_heads(qkv, weights, axes, H, Hkv):
    """q and k as transformers norms and turns them."""
    parameters = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    parameters |= {"mrope_section": [11, 11, 10], "mrope_interleaved": True}
    rope = Qwen3_5TextRotaryEmbedding(Qwen3_5TextConfig(head_dim=256, rope_parameters=parameters))
    rows = torch.from_numpy(np.array(qkv))
    cos, sin = rope(rows, torch.from_numpy(np.array(axes)))
    heads = rows.view(*rows.shape[:2], -1, 256)[:, :, : H + Hkv].split([H, Hkv], dim=2)
    normed = []
    for x, weight in zip(heads, weights, strict=True):
        norm = Qwen3_5RMSNorm(256, eps=EPS)
        norm.weight.data = torch.from_numpy(np.array(weight)) - 1
        normed.append(norm(x).transpose(1, 2))
    return [x.detach().numpy() for x in apply_rotary_pos_emb(*normed, cos, sin)]


@pytest.mark.parametrize(("B", "H", "T", "D"), [(1, 4, 1, 256), (2, 3, 5, 32), (1, 3, 2, 9)], ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_the_gate_multiplies_the_heads_beside_each_other(B, H, T, D, dtype):
    attended, gate = normal(B, H, T, D, dtype=dtype), 20 * normal(B, T, H * D, dtype=dtype, seed=1)
    with emulated() as report:
        assert_close(attention_epilogue(attended, gate), reference.attention_epilogue(attended, gate))
    assert report.count() == 1
    assert stats() == {"attention_epilogue": OpStats(kernel=1)}


@pytest.mark.parametrize("order", ORDERS)
def test_the_gate_is_read_where_it_lies(order):
    B, H, T, D = 2, 3, 2, 32
    attended = normal(B, T, H, D + 1).transpose(0, 2, 1, 3)[..., 1:]
    gate = normal(B, T, 4 * H * D, seed=1)[..., 3 * H * D :]
    with emulated(checked=True, order=order) as report:
        assert_close(attention_epilogue(attended, gate), reference.attention_epilogue(attended, gate))
    assert report.count() == 1


def test_every_byte_moves_once():
    B, T, H, Hkv, D = 1, 1, 16, 2, 256
    with emulated(checked=True) as report:
        check_prologue(mx.array(9), H=H, Hkv=Hkv, D=D, rotary=RELEASED)
        attention_epilogue(normal(B, H, T, D), normal(B, T, H * D))
    prologue, epilogue = report.launches
    needed = 4 * (2 * (H + 2 * Hkv) * D + 2 * D + RELEASED.dims)
    assert prologue.bytes_read + prologue.bytes_written < 1.05 * needed
    assert epilogue.bytes_read + epilogue.bytes_written == 4 * 3 * H * D


@pytest.mark.parametrize(
    ("changes", "because"),
    [({"D": 1024}, "heads are not 8 to 512 wide"), ({"D": 4, "rotary": Rotary(4, 1e4)}, "heads are not 8 to 512 wide")],
    ids=["too wide", "too narrow"],
)
def test_what_the_prologue_does_not_take_runs_as_the_reference(changes, because):
    with emulated() as report:
        check_prologue(mx.array(0), **changes)
    assert report.count() == 0
    assert stats()["attention_prologue"] == OpStats(reference={because: 1})


def test_what_the_epilogue_does_not_take_runs_as_the_reference():
    attended, gate = normal(1, 2, 1, 32), normal(1, 1, 64, dtype=mx.bfloat16)
    with emulated() as report:
        assert mx.array_equal(attention_epilogue(attended, gate), reference.attention_epilogue(attended, gate))
    assert report.count() == 0
    assert stats()["attention_epilogue"] == OpStats(reference={"dtype": 1})


@pytest.mark.parametrize("shape", [(3,), (3, 1), (2, 1, 1)], ids=str)
def test_positions_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match="positions are"):
        check_prologue(mx.zeros(shape, mx.int32))


@pytest.mark.parametrize(
    ("sound", "broken", "kind"),
    [
        ("if (i < HALF) {", "if (i <= HALF) {", "out of bounds"),
        ("HKV + (head - H) % HKV", "HKV + (head - H)", "out of bounds"),
        ("if (is_value) {", "if (is_value || lane > 30) {", "divergence"),
        ("column < width;", "column <= width;", "out of bounds"),
        ("column += grid.x", "column += 2 * grid.x", "unwritten output"),
    ],
    ids=["one pair too many", "a head too far", "a lane that leaves", "one column too many", "columns left out"],
)
def test_a_broken_kernel_is_caught(monkeypatch, sound, broken, kind):
    text = _build.source_text
    monkeypatch.setattr(_build, "source_text", lambda file: text(file).replace(sound, broken))
    _build._built.cache_clear()
    try:
        with emulated(checked=True), pytest.raises(KernelError) as caught:
            check_prologue(mx.array(0))
            attention_epilogue(normal(1, 3, 1, 32), normal(1, 1, 96))
    finally:
        _build._built.cache_clear()
    assert caught.value.kind == kind
