"""Taking tokens of a verify step back, in plain MLX: the kept ones are replayed on the state from before it.

A tape stands for a state after every token and is Dk Dv / (Dk Hk / Hv + Dv) times smaller: 64 to 102 times with the
released sizes. Writing it costs a verify step almost nothing, and conv_state is a slice of rows that exist anyway.
"""

from typing import NamedTuple

import mlx.core as mx


class Tape(NamedTuple):
    """What T tokens did to a layer's conv_state and state, token by token.

    Attributes:
        k: fp32 [B, T, Hk, Dk], keys of unit length.
        delta: fp32 [B, T, Hv, Dv], what each token added to the decayed state along its key.
        log_decay: fp32 [B, T, Hv].
        rows: [B, T, 2 Hk Dk + Hv Dv], inputs of the convolution, zero where masked.
    """

    k: mx.array
    delta: mx.array
    log_decay: mx.array
    rows: mx.array


def roll_back(tape: Tape, kept: int | mx.array, conv_state: mx.array, state: mx.array) -> tuple[mx.array, mx.array]:
    """Reference of `metal_kernels.gated_delta.roll_back`."""
    W = conv_state.shape[1] + 1
    rows = mx.concatenate([conv_state, tape.rows], axis=1)
    if isinstance(kept, int):
        first = slice(0, kept)
        k, delta, log_decay = tape.k[:, first], tape.delta[:, first], tape.log_decay[:, first]
        return rows[:, kept : kept + W - 1], replayed(k, delta, log_decay, state)
    T = tape.k.shape[1]
    is_kept = (mx.arange(T) < kept[:, None])[..., None]
    delta = mx.where(is_kept[..., None], tape.delta, 0.0)
    log_decay = mx.where(is_kept, tape.log_decay, 0.0)
    last = kept[:, None] + mx.arange(W - 1)
    return mx.take_along_axis(rows, last[..., None], axis=1), replayed(tape.k, delta, log_decay, state)


def replayed(k: mx.array, delta: mx.array, log_decay: mx.array, state: mx.array) -> mx.array:
    """Decay the state fp32 [B, Hv, Dv, Dk] by every token and add what every token wrote; arguments as in `Tape`."""
    B, T, Hk, Dk = k.shape
    Hv, Dv = delta.shape[2:]
    r = Hv // Hk
    decay_after = mx.exp(mx.cumsum(log_decay, axis=1, reverse=True, inclusive=False))
    written = (delta * decay_after[..., None]).reshape(B, T, Hk, r * Dv).transpose(0, 2, 3, 1)
    decayed = state * mx.exp(log_decay.sum(axis=1))[..., None, None]
    return mx.addmm(decayed.reshape(B, Hk, r * Dv, Dk), written, k.swapaxes(1, 2)).reshape(state.shape)
