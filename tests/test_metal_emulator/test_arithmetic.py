"""Numbers come out as on a GPU: types, rounding, vectors and mathematics."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from tests.test_metal_emulator.kernels import floats, run

Values = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_each_operation_on_a_small_float_rounds(dtype: mx.Dtype) -> None:
    mx.random.seed(1)
    a, b, c = (mx.random.normal((64,)).astype(dtype) for _ in range(3))
    (out,), _ = run(
        "uint i = thread_position_in_grid.x; out[i] = a[i] * b[i] + c[i];",
        {"a": a, "b": b, "c": c},
        {"out": ((64,), dtype)},
        grid=(64, 1, 1),
    )
    assert mx.array_equal(out, a * b + c)
    once = (a.astype(mx.float32) * b.astype(mx.float32) + c.astype(mx.float32)).astype(dtype)
    assert not mx.array_equal(out, once)


def test_unary_functions_agree_with_numpy() -> None:
    functions: dict[str, Callable[[Values], Values]] = {
        "exp": np.exp,
        "precise::exp": np.exp,
        "fast::exp": np.exp,
        "exp2": np.exp2,
        "log": np.log,
        "log2": np.log2,
        "sqrt": np.sqrt,
        "rsqrt": lambda x: 1 / np.sqrt(x),
        "sin": np.sin,
        "cos": np.cos,
        "tanh": np.tanh,
        "floor": np.floor,
        "ceil": np.ceil,
        "trunc": np.trunc,
        "rint": np.rint,
        "abs": np.abs,
        "fract": lambda x: x - np.floor(x),
    }
    x = np.linspace(0.1, 4.3, 32, dtype=np.float32)
    lines = [f"out[{k} * 32 + i] = metal::{name}(x[i]);" for k, name in enumerate(functions)]
    (out,), _ = run(
        "uint i = thread_position_in_grid.x;\n" + "\n".join(lines),
        {"x": mx.array(x)},
        {"out": ((len(functions), 32), mx.float32)},
    )
    expected = np.stack([function(x.astype(np.float64)) for function in functions.values()])
    np.testing.assert_allclose(floats(out), expected, rtol=3e-7, atol=1e-7)


def test_functions_of_several_numbers_agree_with_numpy() -> None:
    x = np.linspace(-2, 2, 32, dtype=np.float32)
    y = x[::-1].copy() + 0.5
    (out,), _ = run(
        """
        uint i = thread_position_in_grid.x;
        float a = x[i], b = y[i];
        out[i] = min(a, b);
        out[32 + i] = max(a, b);
        out[64 + i] = clamp(a, -1.0, 1.0);
        out[96 + i] = select(a, b, a > 0);
        out[128 + i] = fma(a, b, 1.0f);
        out[160 + i] = pow(metal::abs(a), b);
        out[192 + i] = dot(float4(a, b, 1, 2), float4(b, a, 3, 4));
        out[224 + i] = mix(a, b, 0.25f);
        """,
        {"x": mx.array(x), "y": mx.array(y)},
        {"out": ((8, 32), mx.float32)},
    )
    a, b = x.astype(np.float64), y.astype(np.float64)
    expected = [np.minimum(a, b), np.maximum(a, b), np.clip(a, -1, 1), np.where(a > 0, b, a), a * b + 1]
    expected += [np.abs(a) ** b, 2 * a * b + 11, a + (b - a) * 0.25]
    np.testing.assert_allclose(floats(out), np.stack(expected), rtol=1e-6, atol=1e-6)


def test_vectors_are_built_converted_and_swizzled() -> None:
    (out,), _ = run(
        """
        using T4 = vec<T, 4>;
        float4 ramp = float4(1.0, 2.0, 3.0, 4.0);
        T4 small = T4(ramp);
        float4 back = static_cast<float4>(small) + vec<float, 4>(0.5);
        ramp.xy = ramp.zw;
        float4 joined = float4(ramp.xy, back.x, 9);
        device float4* rows = (device float4*)out;
        rows[0] = back;
        rows[1] = ramp;
        rows[2] = joined;
        rows[3] = float4(uint4(7, 8, 9, 10)) * 2;
        """,
        {},
        {"out": ((4, 4), mx.float32)},
        grid=(1, 1, 1),
        template=[("T", mx.bfloat16)],
    )
    assert out.tolist() == [[1.5, 2.5, 3.5, 4.5], [3, 4, 3, 4], [3, 4, 1.5, 9], [14, 16, 18, 20]]


def test_bits_are_reinterpreted_and_counted() -> None:
    (out,), _ = run(
        """
        out[0] = as_type<uint>(1.0f);
        out[1] = as_type<ushort>(bfloat(1.0f));
        out[2] = popcount(0xF0F0u);
        out[3] = clz(1u);
        out[4] = ctz(8u);
        out[5] = extract_bits(0xABCDu, 4, 8);
        out[6] = reverse_bits(1u);
        out[7] = mulhi(0x80000000u, 6u);
        out[8] = as_type<ushort2>(0x00020001u).y;
        """,
        {},
        {"out": ((9,), mx.uint32)},
        grid=(1, 1, 1),
    )
    assert out.tolist() == [0x3F800000, 0x3F80, 8, 31, 3, 0xBC, 1 << 31, 3, 2]


def test_literals_without_a_suffix_are_floats() -> None:
    (out,), _ = run(
        "out[0] = sizeof(1.5); out[1] = sizeof(1e3); out[2] = sizeof(0.5h); out[3] = (0.1 == 0.1f);",
        {},
        {"out": ((4,), mx.int32)},
        grid=(1, 1, 1),
    )
    assert out.tolist() == [4, 4, 2, 1]


def test_limits_and_infinities_have_their_values() -> None:
    (out,), _ = run(
        """
        out[0] = Limits<float>::min;
        out[1] = metal::numeric_limits<float>::max();
        out[2] = float(metal::numeric_limits<half>::max());
        out[3] = Limits<int>::max;
        out[4] = metal::isnan(NAN) && metal::isinf(-INFINITY) && metal::isfinite(1.0f);
        out[5] = metal::numeric_limits<short>::min();
        """,
        {},
        {"out": ((6,), mx.float32)},
        grid=(1, 1, 1),
    )
    assert out.tolist() == [-np.inf, np.finfo(np.float32).max, 65504, 2**31, 1, -32768]
