"""Attention of a few tokens to all that is remembered, through the emulator, beside a softmax in fp64."""

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import OpStats, _build, reset_stats, stats
from metal_kernels._choices import Choices, chosen
from metal_kernels.attention import attention, attention_of_rows, packed_attention
from metal_kernels.attention.decode.kernel import _row_blocks
from tests.metal_emulator import KernelError, emulated
from tests.metal_kernels.attention_calls import (
    TOLERANCE,
    assert_close,
    check,
    inputs,
    normal,
    packed_inputs,
    padded,
    softmax_attention,
)

ORDERS = ["forward", "reverse", "random"]
LONG = Choices(attention_groups=64)


@pytest.fixture(autouse=True)
def _metal_backend(monkeypatch):
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    reset_stats()


@pytest.mark.parametrize(
    "sizes",
    [
        {"H": 8, "Hkv": 2, "T": 1, "S": 70},
        {"H": 16, "Hkv": 2, "T": 4, "S": 66},
        {"H": 6, "Hkv": 1, "T": 3, "S": 3},
    ],
    ids=["one token", "four rows of blocks, verified", "as many rows as fill no block"],
)
def test_heads_of_256_share_what_is_read(sizes):
    with emulated(checked=True) as report:
        check(**sizes, D=256)
    assert report.count() == 1
    assert stats() == {"attention": OpStats(kernel=1)}


@pytest.mark.parametrize(("T", "times"), [(4, 1), (8, 2)], ids=["32 rows", "64 rows"])
def test_all_rows_of_a_threadgroup_read_keys_once(T, times):
    with emulated(checked=True) as report:
        check(H=16, Hkv=2, T=T, S=20, D=256)
    (launch,) = report.launches
    held = 4 * 2 * 20 * 256
    assert launch.buffers["k"].read == launch.buffers["v"].read == times * held


@pytest.mark.parametrize(
    ("dtype", "order"), [(mx.float32, "forward"), (mx.bfloat16, "reverse"), (mx.float16, "random")], ids=str
)
def test_a_long_context_is_split_and_added_up(dtype, order):
    with emulated(checked=True, order=order) as report, chosen(LONG):
        check(B=2, H=2, Hkv=1, T=2, S=600, D=32, dtype=dtype)
    assert [launch.kernel for launch in report.launches] == ["mlx_qwen_decode_attention", "mlx_qwen_combine_attention"]


def test_few_threadgroups_take_a_long_context_in_longer_runs():
    with emulated() as report, chosen(Choices(attention_groups=4)):
        check(H=4, Hkv=2, S=1100, D=32)
    assert report.launches[0].grid[1] == 2


@pytest.mark.parametrize(("threads", "groups"), [(128, 1), (64, 1), (32, 2)])
def test_smaller_threadgroups_compute_the_same(threads, groups):
    with emulated(checked=True) as report, chosen(Choices(most_threads={"attention": threads})):
        check(H=4, Hkv=1, T=4, S=21, D=128)
    assert report.launches[0].grid == (threads * groups, 1, 1)
    assert report.launches[0].threadgroup == (threads, 1, 1)


@pytest.mark.parametrize("D", [32, 96, 160, 224])
def test_heads_of_every_width_attend(D):
    with emulated():
        check(H=2, Hkv=1, T=2, S=70, D=D)


@pytest.mark.parametrize("order", ORDERS)
def test_rows_of_different_lengths_see_their_own_tokens(order):
    with emulated(checked=True, order=order):
        check(padded([40, 3], 3, 40), B=2, T=3)


def test_runs_of_keys_that_a_row_does_not_see_add_nothing():
    with emulated() as report, chosen(LONG):
        check(padded([700, 20], 1, 700), B=2, H=2, Hkv=1, S=700, D=32)
    assert report.count("mlx_qwen_combine_attention") == 1


def test_a_mask_is_read_where_it_lies():
    wide = mx.array(np.random.default_rng(0).random((1, 1, 8, 200)) < 0.5) | (mx.arange(200) % 40 == 0)
    with emulated(checked=True):
        check(wide[:, :, 1:7:2, 2:82:2] | (mx.arange(40) == 0), T=3)
        check(mx.array([[[[True, False, True]]]]), S=3)


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype"),
    [
        *((bits, 64, dtype) for bits in (4, 8) for dtype in TOLERANCE),
        (4, 32, mx.float32),
        (8, 128, mx.float32),
    ],
    ids=str,
)
def test_packed_keys_and_values_are_read_as_they_are(bits, group_size, dtype):
    q, (keys, values), exact = packed_inputs(bits, group_size, H=4, Hkv=2, T=2, S=37, D=128, dtype=dtype)
    options = {"bits": bits, "group_size": group_size, "scale": 0.1}
    with emulated(checked=True) as report:
        found = packed_attention(q, keys, values, **options)
    assert report.count() == 1
    assert stats() == {"packed_attention": OpStats(kernel=1)}
    assert_close(found, softmax_attention(q, *exact, 0.1), dtype)


def test_packed_heads_of_256_are_split_and_masked():
    q, (keys, values), exact = packed_inputs(4, 64, B=2, H=4, Hkv=1, T=1, S=520, D=256)
    mask = padded([520, 7], 1, 520)
    with emulated() as report, chosen(LONG):
        found = packed_attention(q, keys, values, bits=4, group_size=64, scale=0.1, mask=mask)
    assert report.count() == 2
    assert_close(found, softmax_attention(q, *exact, 0.1, mask), mx.float32)


def test_packed_bytes_are_read_once_for_all_rows():
    q, (keys, values), _ = packed_inputs(4, 64, H=16, Hkv=2, T=2, S=24, D=256, dtype=mx.bfloat16)
    with emulated(checked=True) as report:
        packed_attention(q, keys, values, bits=4, group_size=64, scale=0.1)
    (launch,) = report.launches
    read = sum(buffer.read for name, buffer in launch.buffers.items() if name[0] in "kv")
    # 64-byte lines of scales and biases hold those of rows behind the last, too.
    assert sum(part.nbytes for part in (*keys, *values)) <= read < 1.1 * sum(part.nbytes for part in (*keys, *values))


@pytest.mark.parametrize("mask", [None, padded([30, 4], 5, 30)], ids=["causal", "padded"])
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_the_references_are_what_they_define(monkeypatch, bits, mask):
    monkeypatch.setenv("MLX_QWEN_KERNELS", "reference")
    sizes = {"B": 2, "T": 5, "S": 30}
    if bits is None:
        check(mask, **sizes)
        return
    q, (keys, values), exact = packed_inputs(bits, 32, **sizes)
    found = packed_attention(q, keys, values, bits=bits, group_size=32, scale=0.1, mask=mask)
    expected = softmax_attention(q, *exact, 0.1, mask)
    np.testing.assert_allclose(np.array(found), expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("backend", ["reference", "metal"])
def test_each_row_of_a_batch_attends_to_keys_of_its_own_length(monkeypatch, backend, T):
    monkeypatch.setenv("MLX_QWEN_KERNELS", backend)
    held = [inputs(T=T, S=S) for S in (40, 7, 21)]
    q = mx.concatenate([normal(1, 4, T, 64, seed=number) for number in range(3)])
    with emulated():
        found = attention_of_rows(q, [(k, v) for _, k, v in held], scale=0.1)
    for number, (_, k, v) in enumerate(held):
        row = slice(number, number + 1)
        assert_close(found[row], softmax_attention(q[row], k, v, 0.1), q.dtype)


@pytest.mark.parametrize(
    ("sizes", "because"),
    [
        ({"T": 9}, "not 1 to 8 tokens"),
        ({"D": 48}, "head size not a multiple of 32 up to 256"),
        ({"D": 288}, "head size not a multiple of 32 up to 256"),
    ],
    ids=str,
)
def test_what_the_kernel_does_not_take_runs_as_the_reference(sizes, because):
    with emulated() as report:
        check(**sizes)
    assert report.count() == 0
    assert stats() == {"attention": OpStats(reference={because: 1})}


def test_keys_of_another_dtype_run_as_the_reference():
    q, k, v = inputs()
    with emulated() as report:
        attention(q, k.astype(mx.float16), v.astype(mx.float16), scale=0.1)
    assert report.count() == 0
    assert stats() == {"attention": OpStats(reference={"dtype": 1})}


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="mask is"):
        check(mx.ones((1, 4, 1, 40), mx.bool_))
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        check(H=3)


@pytest.mark.parametrize(
    ("sound", "broken", "kind"),
    [
        ("if (first + key + row < keys) {", "if (true) {", "out of bounds"),
        ("if (query < rows) {", "if (true) {", "out of bounds"),
        (
            "softmax.take(scores, factors, simdgroup, lane);\nmetal::threadgroup_barrier",
            "softmax.take(scores, factors, simdgroup, lane);\n(void)",
            "uninitialised read",
        ),
        (
            "i < CHANNELS / 8; ++i) {\n#pragma unroll\nfor (int e = 0; e < 2",
            "i < CHANNELS / 8; i += 2) {\n#pragma unroll\nfor (int e = 0; e < 2",
            "unwritten output",
        ),
    ],
    ids=["a value too many", "a row too many", "a barrier left out", "channels left out"],
)
def test_a_broken_kernel_is_caught(monkeypatch, sound, broken, kind):
    compact = _build.compact

    def changed(text):
        assert text.find("decode_attention") < 0 or sound in compact(text)
        return compact(text).replace(sound, broken)

    monkeypatch.setattr(_build, "compact", changed)
    _build._built.cache_clear()
    try:
        with emulated(checked=True), pytest.raises(KernelError) as caught:
            q, k, v = inputs(H=3, Hkv=1, S=20)
            attention(q, mx.contiguous(k), mx.contiguous(v), scale=0.1)
    finally:
        _build._built.cache_clear()
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("sound", "broken"),
    [
        ("key + tokens <= keys + token", "key < keys"),
        ("scale(parts[block][i], factor);", ""),
        ("total[n] * older", "total[n]"),
        ("weight * sums[2 * from + 1]", "sums[2 * from + 1]"),
    ],
    ids=["what comes later is seen", "older tiles keep their weight", "and their sum", "runs weigh the same"],
)
def test_a_kernel_that_computes_something_else_differs(monkeypatch, sound, broken):
    text = _build.source_text
    monkeypatch.setattr(_build, "source_text", lambda file: text(file).replace(sound, broken))
    _build._built.cache_clear()
    try:
        with emulated(), chosen(LONG), pytest.raises(AssertionError):
            check(H=2, Hkv=1, T=2, S=600, D=32)
    finally:
        _build._built.cache_clear()


@pytest.mark.parametrize(
    ("rows", "simdgroups", "D", "shared"),
    [
        (8, 8, 256, (1, 1)),
        (32, 8, 256, (4, 1)),
        (36, 8, 256, (3, 2)),
        (64, 8, 256, (4, 2)),
        (64, 4, 256, (2, 4)),
        (40, 2, 256, (1, 5)),
        (72, 4, 128, (3, 3)),
    ],
)
def test_no_threadgroup_is_without_rows(rows, simdgroups, D, shared):
    blocks, groups = _row_blocks(rows, simdgroups, D)
    assert (blocks, groups) == shared
    assert 8 * blocks * (groups - 1) < rows <= 8 * blocks * groups


def test_the_last_threadgroup_may_have_fewer_rows():
    with emulated(checked=True) as report:
        check(H=5, Hkv=1, T=8, S=10, D=256)
        check(H=9, Hkv=1, T=8, S=10, D=256)
    assert [launch.grid[0] // launch.threadgroup[0] for launch in report.launches] == [2, 3]
