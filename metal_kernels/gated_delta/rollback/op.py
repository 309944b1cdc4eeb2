"""What a model calls to take tokens of a verify step back."""

from pathlib import Path

import mlx.core as mx

from metal_kernels._backend import takes_kernel
from metal_kernels._build import MetalKernel
from metal_kernels.gated_delta import head_kernels
from metal_kernels.gated_delta.layer import Heads
from metal_kernels.gated_delta.rollback import reference
from metal_kernels.gated_delta.rollback.reference import Tape

_KERNEL = MetalKernel(
    file=Path(__file__).with_name("replay.metal"),
    function="mlx_qwen::gated_delta_replay",
    inputs=("k", "delta", "log_decay", "rows", "kept", "conv_state", "state"),
    outputs=("new_conv_state", "new_state"),
    template=("E", "DK", "DV", "W", "ROWS", "SIMDGROUPS"),
    arguments=(
        *("k", "k_strides", "delta", "delta_shape", "delta_strides", "log_decay", "log_decay_strides"),
        *("rows", "rows_shape", "rows_strides", "kept", "kept_strides", "conv_state", "conv_state_strides"),
        *("state", "state_strides", "new_conv_state", "new_state"),
        *head_kernels.THREAD,
    ),
    row_contiguous=False,
)


def roll_back(tape: Tape, kept: int | mx.array, conv_state: mx.array, state: mx.array) -> tuple[mx.array, mx.array]:
    """Return the conv_state and state after the first `kept` of the tape's T tokens.

    The state differs from that of a call with only the kept tokens by less than 2e-6 of its largest value. One kernel
    takes the heads, taps and dtypes that `gated_delta_mixer`'s takes. When all tokens are kept, the call that made the
    tape has already returned these states.

    Args:
        tape: of `gated_delta_mixer(..., tape=True)`.
        kept: 0 to T, for all sequences; or integers [B], one for each.
        conv_state: [B, W - 1, 2 Hk Dk + Hv Dv], from before the tape.
        state: fp32 [B, Hv, Dv, Dk], from before the tape.

    Returns:
        conv_state and state, shaped as given.

    Raises:
        ValueError: `kept` is a number outside 0 to T.
    """
    if isinstance(kept, int):
        if not 0 <= kept <= tape.k.shape[1]:
            raise ValueError(f"roll_back: kept is {kept}, expected 0 to the {tape.k.shape[1]} tokens of the tape")
        if kept == 0:
            return conv_state, state
    if takes_kernel("roll_back", _unsupported(tape, conv_state, state)):
        return _launch(tape, kept, conv_state, state)
    return reference.roll_back(tape, kept, conv_state, state)


def _unsupported(tape: Tape, conv_state: mx.array, state: mx.array) -> str | None:
    if tape.rows.dtype != conv_state.dtype or conv_state.dtype not in head_kernels.DTYPES or state.dtype != mx.float32:
        return "dtype"
    return head_kernels.unsupported_sizes(_heads(tape), conv_state)


def _heads(tape: Tape) -> Heads:
    return Heads(*tape.k.shape[2:], *tape.delta.shape[2:])


def _launch(tape: Tape, kept: int | mx.array, conv_state: mx.array, state: mx.array) -> tuple[mx.array, mx.array]:
    B, taps, _ = conv_state.shape
    heads = _heads(tape)
    counts = mx.array([kept] * B) if isinstance(kept, int) else kept
    rows, simdgroups = head_kernels.threads("roll_back", heads)
    new_conv_state, new_state = _KERNEL(
        [*tape, counts, conv_state, state],
        [conv_state.dtype, heads.key_dim, heads.value_dim, taps + 1, rows, simdgroups],
        # Smaller threadgroups are more threadgroups: a GPU may have more cores than there are heads.
        grid=(32 * simdgroups * -(-heads.value_dim // (4 * rows * simdgroups)), heads.num_value, B),
        threadgroup=(32 * simdgroups, 1, 1),
        output_shapes=[conv_state.shape, state.shape],
        output_dtypes=[conv_state.dtype, mx.float32],
    )
    return new_conv_state, new_state
