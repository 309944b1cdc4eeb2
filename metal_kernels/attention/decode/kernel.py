"""Launches of `decode.metal`, and of `combine.metal` behind it where a context is long."""

from functools import cache
from pathlib import Path

import mlx.core as mx

from metal_kernels._build import MetalKernel
from metal_kernels._choices import choices
from metal_kernels.attention.decode.reference import MOST_TOKENS, Packed

_DTYPES = (mx.float32, mx.bfloat16, mx.float16)
_WIDEST_HEAD, _MOST_ROW_BLOCKS = 256, 4
# Fewer keys than that are not worth a second launch and the sums between them.
_FEWEST_KEYS = 256
_MOST_MEMORY = 32 << 10
_PLAIN = ("k", "v")
_PACKED = tuple(f"{side}{part}" for side in "kv" for part in ("", "_scales", "_biases"))
_COMBINE = MetalKernel(
    file=Path(__file__).with_name("combine.metal"),
    function="mlx_qwen::combine_attention",
    inputs=("partial", "sums"),
    outputs=("out",),
    template=("T", "D"),
    arguments=("partial", "partial_shape", "sums", "out", "thread_position_in_grid"),
)


@cache
def _kernel(packed: bool, masked: bool, split: bool) -> MetalKernel:
    """The kernel with the buffers of one call; the function gets null for those that are not there."""
    remembered = _PACKED if packed else _PLAIN
    held = [name for array in remembered for name in (array, f"{array}_strides")]
    held.insert(1, "k_shape")
    no_mask = ("(const device bool*)nullptr", "(const constant int64_t*)nullptr")
    return MetalKernel(
        file=Path(__file__).with_name("decode.metal"),
        function=f"mlx_qwen::{'packed_' if packed else ''}decode_attention",
        inputs=("q", *remembered, "factor", *(("mask",) if masked else ())),
        outputs=("partial", "sums") if split else ("out",),
        template=(
            *("T", "D", "ROW_BLOCKS", "SIMDGROUPS", "MASKED", "SPLIT", "STAGED"),
            *(("BITS", "GROUP") if packed else ()),
        ),
        arguments=(
            *("q", "q_shape", *held, "factor"),
            *(("mask", "mask_strides") if masked else no_mask),
            *(("(device T*)nullptr", "partial", "sums") if split else ("out", "nullptr", "nullptr")),
            *("staged", "scores", "factors"),
            *("threadgroup_position_in_grid", "threads_per_grid"),
            *("simdgroup_index_in_threadgroup", "thread_index_in_simdgroup"),
        ),
        threadgroup_arrays=(
            "T staged[STAGED ? ROW_BLOCKS * 8 * (D + 8) : 1]",
            "float scores[ROW_BLOCKS * 8 * (SIMDGROUPS * 8 + 4)]",
            "float factors[ROW_BLOCKS * 8]",
        ),
        row_contiguous=False,
    )


def unsupported(q: mx.array, dtype: mx.Dtype, keys: int, mask: mx.array | None) -> str | None:
    """Why the kernel does not take queries beside so many keys of this dtype, or None when it does."""
    *_, T, D = q.shape
    if not 1 <= T <= MOST_TOKENS:
        return f"not 1 to {MOST_TOKENS} tokens"
    if D % 32 or not 32 <= D <= _WIDEST_HEAD:
        return f"head size not a multiple of 32 up to {_WIDEST_HEAD}"
    if q.dtype not in _DTYPES or dtype != q.dtype or (mask is not None and mask.dtype != mx.bool_):
        return "dtype"
    return "empty input" if q.size * keys == 0 else None


def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | None) -> mx.array:
    """See `metal_kernels.attention.attention`; inputs as `unsupported` allows."""
    return _launched("attention", q, [k, v], k.shape, scale, mask)


def packed_attention(
    q: mx.array, keys: Packed, values: Packed, *, bits: int, group_size: int, scale: float, mask: mx.array | None
) -> mx.array:
    """See `metal_kernels.attention.packed_attention`; inputs as `unsupported` allows."""
    return _launched("packed_attention", q, [*keys, *values], keys[0].shape, scale, mask, (bits, group_size))


def _launched(
    name: str,
    q: mx.array,
    remembered: list[mx.array],
    shape: tuple[int, ...],
    scale: float,
    mask: mx.array | None,
    packing: tuple[int, int] | None = None,
) -> mx.array:
    (B, H, T, D), (_, Hkv, S, _) = q.shape, shape
    rows = H // Hkv * T
    simdgroups = _simdgroups(name, D)
    blocks, groups = _row_blocks(rows, simdgroups, D)
    staged = 8 * blocks * ((D + 8) * q.dtype.size + 4 * (8 * simdgroups + 5)) <= _MOST_MEMORY
    runs = min(max(1, choices().attention_groups // (B * Hkv)), -(-S // _FEWEST_KEYS))
    split, heads = runs > 1, B * Hkv
    template = [q.dtype, D, blocks, simdgroups, mask is not None, split, staged, *(packing or ())]
    inputs = [mx.contiguous(q), *remembered, mx.array(scale), *([] if mask is None else [mask])]
    outputs = _kernel(packing is not None, mask is not None, split)(
        inputs,
        template,
        grid=(32 * simdgroups * groups, runs, heads),
        threadgroup=(32 * simdgroups, 1, 1),
        output_shapes=[(heads, runs, rows, D), (heads, runs, rows, 2)] if split else [q.shape],
        output_dtypes=[mx.float32, mx.float32] if split else [q.dtype],
    )
    if not split:
        return outputs[0]
    return _COMBINE(
        outputs,
        [q.dtype, D],
        grid=(D, rows, heads),
        threadgroup=(D, 1, 1),
        output_shapes=[q.shape],
        output_dtypes=[q.dtype],
    )[0]


def _simdgroups(name: str, D: int) -> int:
    """As many SIMD groups as share the channels in runs of 32."""
    most, runs = choices().threads(name, D) // 32, D // 32
    return max(n for n in range(1, most + 1) if runs % n == 0)


def _row_blocks(rows: int, simdgroups: int, D: int) -> tuple[int, int]:
    """Blocks of eight query rows in a threadgroup, and the threadgroups that share all of them.

    With more rows than 32 a lane's part of the output would not fit into its registers beside all else.
    """
    blocks = -(-rows // 8)
    groups = -(-blocks // max(1, _MOST_ROW_BLOCKS * 32 * simdgroups // D))
    together = -(-blocks // groups)
    return together, -(-blocks // together)
