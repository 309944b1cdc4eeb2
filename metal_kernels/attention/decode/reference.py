"""Softmax attention of the last tokens of a sequence to all of it, in plain MLX: the definition."""

from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx

Packed = tuple[mx.array, mx.array, mx.array]
MOST_TOKENS = 8


def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | None) -> mx.array:
    """See `metal_kernels.attention.attention`."""
    if mask is None and takes_few_nodes(q):
        return attention_of_rows(q, [(k, v)], scale=scale)
    part: mx.array | str | None = mask
    if mask is None and q.shape[2] > 1:
        part = "causal"
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=part)


def takes_few_nodes(q: mx.array) -> bool:
    """Whether `attention_of_rows` is for these queries: MLX's own attention is one kernel on a GPU, many on a CPU."""
    return q.shape[2] <= MOST_TOKENS and mx.default_device().type == mx.DeviceType.cpu


def attention_of_rows(q: mx.array, rows: Sequence[tuple[mx.array, mx.array]], *, scale: float) -> mx.array:
    """See `metal_kernels.attention.attention_of_rows`, of up to 8 tokens; a single row may be a batch itself.

    Queries that share a key head are rows of one matrix.
    """
    (B, H, T, D), Hkv = q.shape, rows[0][0].shape[1]
    grouped = (q * scale).reshape(B, Hkv, -1, D)
    attended = []
    for row, (k, v) in zip(parted(grouped, len(rows)), rows, strict=True):
        scores = row @ k.swapaxes(-1, -2)
        if T > 1:
            scores = mx.where(_causal(H // Hkv, T, k.shape[2]), scores, mx.finfo(scores.dtype).min)
        attended.append(mx.softmax(scores, axis=-1, precise=True) @ v)
    return (attended[0] if len(rows) == 1 else mx.concatenate(attended)).reshape(q.shape)


def parted(x: mx.array, count: int) -> list[mx.array]:
    """`x` in `count` equal parts along its first axis."""
    return [x] if count == 1 else list(mx.split(x, count))


@lru_cache(maxsize=16)
def _causal(times: int, T: int, S: int) -> mx.array:
    """Which of S tokens the last T of them see, bool [times T, S]: the layers and rows of a pass share one."""
    rows = b"".join(b"\1" * seen + b"\0" * (S - seen) for seen in range(S - T + 1, S + 1))
    return mx.array(memoryview(rows * times).cast("?", (times * T, S)))  # type: ignore[arg-type]  # a buffer


def packed_attention(
    q: mx.array, keys: Packed, values: Packed, *, bits: int, group_size: int, scale: float, mask: mx.array | None
) -> mx.array:
    """See `metal_kernels.attention.packed_attention`.

    Queries that share a key head are rows of one matrix, so that keys and values are read once for all of them.
    """
    (B, H, T, D), (_, Hkv, S, _) = q.shape, keys[0].shape

    def multiplied(x: mx.array, packed: Packed, *, transpose: bool) -> mx.array:
        return mx.quantized_matmul(x, *packed, transpose=transpose, group_size=group_size, bits=bits)

    scores = multiplied((q * scale).reshape(B, Hkv, -1, D), keys, transpose=True)
    part = None if mask is None else mask[:, :, None]
    if mask is None and T > 1:
        part = mx.arange(S)[None] <= mx.arange(S - T, S)[:, None]
    if part is not None:
        grouped = scores.reshape(B, Hkv, H // Hkv, T, S)
        scores = mx.where(part, grouped, mx.finfo(scores.dtype).min).reshape(scores.shape)
    weights = mx.softmax(scores, axis=-1, precise=True)
    return multiplied(weights, values, transpose=False).reshape(B, H, T, D)
