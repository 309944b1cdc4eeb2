"""Launches of `mixer.metal`."""

from functools import cache
from pathlib import Path

import mlx.core as mx

from metal_kernels._build import MetalKernel
from metal_kernels.gated_delta.head_kernels import DTYPES, THREAD, threads, unsupported_sizes
from metal_kernels.gated_delta.layer import Heads

_MOST_TOKENS = 8
_INPUTS = ("qkvz", "x", "ba_weight", "conv_weight", "A_log", "dt_bias", "norm_weight", "eps", "conv_state", "state")
_STATES = ("y", "new_conv_state", "new_state")
_TAPE = ("tape_k", "tape_delta", "tape_log_decay")


@cache
def _kernel(masked: bool, taped: bool) -> MetalKernel:
    """The kernel with the buffers of one call; the function gets null for those that are not there."""
    no_mask = ("(const device bool*)nullptr", "(const constant int64_t*)nullptr")
    return MetalKernel(
        file=Path(__file__).with_name("mixer.metal"),
        function="mlx_qwen::gated_delta_mixer",
        inputs=(*_INPUTS, "mask") if masked else _INPUTS,
        outputs=(*_STATES, *_TAPE) if taped else _STATES,
        template=("E", "T", "DK", "DV", "W", "ROWS", "SIMDGROUPS", "MASKED", "TAPED"),
        arguments=(
            *("qkvz", "qkvz_strides", "x", "x_shape", "x_strides", "ba_weight", "ba_weight_strides"),
            *("conv_weight", "conv_weight_shape", "conv_weight_strides", "A_log", "A_log_shape", "A_log_strides"),
            *("dt_bias", "dt_bias_strides", "norm_weight", "norm_weight_strides", "eps"),
            *("conv_state", "conv_state_strides", "state", "state_strides"),
            *(("mask", "mask_strides") if masked else no_mask),
            *_STATES,
            *(_TAPE if taped else ("nullptr",) * 3),
            *("tokens", "partials", "gates"),
            *THREAD,
        ),
        threadgroup_arrays=(
            "float4 tokens[T * (2 * DK + DV) / 4]",
            "float2 partials[SIMDGROUPS * T]",
            "float2 gates[T]",
        ),
        row_contiguous=False,
    )


def unsupported(
    qkvz: mx.array,
    x: mx.array,
    ba_weight: mx.array,
    heads: Heads,
    conv_state: mx.array | None,
    state: mx.array | None,
) -> str | None:
    """Why the kernel does not take these inputs, or None when it does."""
    if conv_state is None or state is None:
        return "no state yet"
    if not 1 <= qkvz.shape[1] <= _MOST_TOKENS:
        return f"not 1 to {_MOST_TOKENS} tokens"
    if qkvz.dtype not in DTYPES or not qkvz.dtype == x.dtype == ba_weight.dtype == conv_state.dtype:
        return "dtype"
    if state.dtype != mx.float32:
        return "state not fp32"
    return unsupported_sizes(heads, conv_state) or ("empty or tiny input" if min(x.size, ba_weight.size) < 8 else None)


def launch(
    inputs: list[mx.array], mask: mx.array | None, heads: Heads, *, taped: bool
) -> tuple[mx.array, mx.array, mx.array, list[mx.array]]:
    """Run the kernel on the arrays that `_INPUTS` names.

    Returns y, conv_state, state and, if `taped`, the k, delta and log_decay of a `Tape`.
    """
    Hk, Dk, Hv, Dv = heads
    qkvz, conv_state, state = inputs[0], inputs[-2], inputs[-1]
    B, T, _ = qkvz.shape
    rows, simdgroups = threads("gated_delta_mixer", heads)
    tape_shapes = [(B, T, Hk, Dk), (B, T, Hv, Dv), (B, T, Hv)] if taped else []
    y, conv_state, state, *tape = _kernel(mask is not None, taped)(
        inputs if mask is None else [*inputs, mask],
        [qkvz.dtype, T, Dk, Dv, conv_state.shape[1] + 1, rows, simdgroups, mask is not None, taped],
        grid=(32 * simdgroups, Hv, B),
        threadgroup=(32 * simdgroups, 1, 1),
        output_shapes=[(B, T, Hv * Dv), conv_state.shape, state.shape, *tape_shapes],
        output_dtypes=[qkvz.dtype, qkvz.dtype, *[mx.float32] * (1 + len(tape_shapes))],
    )
    return y, conv_state, state, tape
