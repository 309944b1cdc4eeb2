"""Attention's inputs as a cache has them, and what it should give: a softmax in fp64."""

import mlx.core as mx
import numpy as np

from metal_kernels.attention import attention

TOLERANCE = {mx.float32: 2e-6, mx.bfloat16: 2**-7, mx.float16: 2**-10}


def normal(*shape, dtype=mx.float32, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)).astype(dtype)


def inputs(B=1, H=4, Hkv=2, T=1, S=40, D=64, dtype=mx.float32):
    """q, and keys and values as a cache has them: the first S tokens of room for more, which holds no numbers."""
    room = mx.full((2, B, Hkv, S + 24, D), float("nan"), dtype)
    room[..., :S, :] = normal(2, B, Hkv, S, D, dtype=dtype, seed=1)
    keys, values = mx.split(room, 2)
    return normal(B, H, T, D, dtype=dtype), keys.squeeze(0)[:, :, :S], values.squeeze(0)[:, :, :S]


def packed_inputs(bits, group_size, **sizes):
    """q, packed keys and values within larger buffers, and the numbers that they stand for."""
    q, *held = inputs(**sizes)
    parts = [mx.quantize(x, group_size, bits) for x in held]
    wider = [tuple(mx.concatenate([part, part], axis=2)[:, :, : part.shape[2]] for part in each) for each in parts]
    exact = [
        mx.dequantize(words, scales.astype(mx.float32), biases.astype(mx.float32), group_size, bits)
        for words, scales, biases in parts
    ]
    return q, wider, exact


def softmax_attention(q, k, v, scale, mask=None):
    """In fp64, from the definition."""
    (_, H, T, _), (_, Hkv, S, _) = q.shape, k.shape
    q, k, v = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (q, k, v))
    seen = np.tril(np.ones((T, S), bool), S - T)[None, None] if mask is None else np.array(mask)
    k, v = (np.repeat(x, H // Hkv, axis=1) for x in (k, v))
    scores = np.where(seen, scale * q @ k.swapaxes(-1, -2), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


def assert_close(found, expected, dtype):
    assert found.dtype == dtype
    bound = TOLERANCE[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(np.array(found.astype(mx.float32)), expected, atol=bound, rtol=0)


def check(mask=None, **sizes):
    q, k, v = inputs(**sizes)
    scale = q.shape[-1] ** -0.5
    assert_close(attention(q, k, v, scale=scale, mask=mask), softmax_attention(q, k, v, scale, mask), q.dtype)


def padded(lengths, T, S):
    """Which keys each row of a left-padded batch sees: its own tokens, causally, and at least itself."""
    places, new = np.arange(S), np.arange(S - T, S)[:, None]
    first = S - np.array(lengths)[:, None, None, None]
    return mx.array(((places <= new) & (places >= first)) | (places == new))
