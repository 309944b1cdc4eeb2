"""Launches of the gated-delta prefill kernels, and the choice between their two forms."""

from pathlib import Path
from typing import Literal

import mlx.core as mx

from metal_kernels._build import MetalKernel
from metal_kernels._choices import choices

PrefillForm = Literal["sequential", "chunked"]

CHUNK = 16
WIDEST_CHUNKED_KEY = 128
_DTYPES = (mx.float32, mx.bfloat16, mx.float16)
_INPUTS = ("q", "k", "v", "log_decay", "beta", "mask", "state")
_ARGUMENTS = (
    *("q", "q_shape", "q_strides", "k", "k_strides", "v", "v_shape", "v_strides"),
    *("log_decay", "log_decay_strides", "beta", "beta_strides", "mask", "mask_strides", "state", "y", "last_state"),
    *("threadgroup_position_in_grid", "simdgroup_index_in_threadgroup", "thread_index_in_simdgroup"),
    *("q_tile", "k_tile", "v_tile", "gates"),
)
_SEQUENTIAL = MetalKernel(
    file=Path(__file__).with_name("prefill_sequential.metal"),
    function="mlx_qwen::gated_delta_prefill_sequential",
    inputs=_INPUTS,
    outputs=("y", "last_state"),
    template=("Dk", "ROWS", "TOKENS", "HAS_STATE", "MASKED"),
    arguments=_ARGUMENTS,
    threadgroup_arrays=(
        *("float4 q_tile[TOKENS * Dk / 4]", "float4 k_tile[TOKENS * Dk / 4]"),
        *("float v_tile[TOKENS * (ROWS + 8)]", "float4 gates[TOKENS]"),
    ),
    row_contiguous=False,
)
_CHUNKED = MetalKernel(
    file=Path(__file__).with_name("prefill_chunked.metal"),
    function="mlx_qwen::gated_delta_prefill_chunked",
    inputs=_INPUTS,
    outputs=("y", "last_state"),
    template=("Dk", "ROWS", "TOKENS", "HAS_STATE", "MASKED"),
    arguments=(*_ARGUMENTS, "key_key", "query_key", "decays"),
    threadgroup_arrays=(
        *("float q_tile[TOKENS * (Dk + 8)]", "float k_tile[TOKENS * (Dk + 8)]", "float v_tile[TOKENS * (ROWS + 8)]"),
        *("float key_key[TOKENS * (TOKENS + 8)]", "float query_key[TOKENS * (TOKENS + 8)]"),
        *("float4 gates[TOKENS]", "float2 decays[TOKENS]"),
    ),
    row_contiguous=False,
)


def unsupported(
    q: mx.array, k: mx.array, v: mx.array, log_decay: mx.array, beta: mx.array, state: mx.array | None
) -> str | None:
    """Why the kernels do not take these inputs, or None when they do."""
    Dk, Dv = q.shape[-1], v.shape[-1]
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype not in _DTYPES:
        return "dtype"
    if any(x is not None and x.dtype != mx.float32 for x in (log_decay, beta, state)):
        return "gates or state not fp32"
    if any(size % 32 or size > 256 for size in (Dk, Dv)):
        return "head size not a multiple of 32 up to 256"
    return "empty input" if q.size == 0 or v.size == 0 else None


def chosen_form(T: int, Dk: int) -> PrefillForm:
    """The form that runs T tokens with keys of Dk when none is asked for.

    Chunks from `Choices.chunked_from` on, where there are several to carry the state through and most are full; a
    chunk's keys and queries fit into threadgroup memory up to Dk = 128.
    """
    return "chunked" if choices().chunked_from <= T and Dk <= WIDEST_CHUNKED_KEY else "sequential"


def gated_delta_prefill(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_decay: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    form: PrefillForm | None = None,
) -> tuple[mx.array, mx.array]:
    """Run the gated delta rule over T >= 1 tokens in one launch.

    Arguments, results and source as of `metal_kernels.gated_delta.gated_delta_rule`, for inputs that `unsupported`
    allows. All arithmetic is fp32 and differs from the reference by the order of sums: y and state by at most 1e-5 of
    their largest magnitude before y is rounded. q, k, v, the gates and the mask are read in place at any strides.
    A masked token's y is 0.

    Args:
        form: "sequential" (any size) or "chunked" (Dk up to 128) instead of `chosen_form`.

    Raises:
        ValueError: the chunked form is asked for with Dk above 128.
    """
    B, T, _, Dk = q.shape
    Hv, Dv = v.shape[2:]
    form = form or chosen_form(T, Dk)
    if form == "chunked" and Dk > WIDEST_CHUNKED_KEY:
        raise ValueError(
            f"gated_delta_prefill: the chunked form takes keys of up to {WIDEST_CHUNKED_KEY}, found {Dk}; "
            f"use the sequential form"
        )
    rows = choices().prefill_rows if Dv % 64 == 0 else 32
    tokens = CHUNK if form == "chunked" else _tile_tokens(Dk)
    y, last_state = (_CHUNKED if form == "chunked" else _SEQUENTIAL)(
        # An absent mask or state is stood in for by beta, which is then not read in its place.
        [q, k, v, log_decay, beta, beta if mask is None else mask, beta if state is None else mx.contiguous(state)],
        [Dk, rows, tokens, state is not None, mask is not None],
        grid=(4 * Dv, Hv, B),
        threadgroup=(rows * 4, 1, 1),
        output_shapes=[(B, T, Hv, Dv), (B, Hv, Dv, Dk)],
        output_dtypes=[v.dtype, mx.float32],
    )
    return y, last_state


def _tile_tokens(Dk: int) -> int:
    """Tokens in a tile: as many, up to 32, as let q and k stay within 16 KB as fp32."""
    return 32 if Dk <= 64 else 16 if Dk <= 128 else 8
