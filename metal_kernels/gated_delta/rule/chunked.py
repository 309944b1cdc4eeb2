"""The gated delta rule over many tokens at once: the chunked WY form.

Inside a chunk every token's write depends on the writes before it through a unit lower triangular matrix. Inverting
that matrix turns the chunk into a few matrix products; only the state is carried from one chunk to the next.
Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (2024).
"""

from typing import NamedTuple

import mlx.core as mx

from metal_kernels.gated_delta.lanes import join_lanes, run_in_lanes
from metal_kernels.gated_delta.rule.step import NORM_EPS
from metal_kernels.gated_delta.rule.triangular import inverse_of_unit_lower

_SMALLEST_LOG_DECAY = -60.0


class _Chunk(NamedTuple):
    """What C tokens do to the state S [B, Hk, r, 1, Dk, Dv], r = Hv / Hk; all arrays are fp32.

    With R = v - k_decayed S the outputs are q_decayed S + read R, and S becomes decay S + keys (write R).
    """

    q_decayed: mx.array  # [B, Hk, r, 1, C, Dk]
    k_decayed: mx.array  # [B, Hk, r, 1, C, Dk]
    keys: mx.array  # [B, Hk, 1, 1, Dk, C]
    v: mx.array  # [B, Hk, r, 1, C, Dv]
    read_write: mx.array  # [B, Hk, r, 1, 2 C, C]
    decay: mx.array  # [B, Hk, r, 1, 1, 1]


def chunked_gated_delta_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_decay: mx.array,
    beta: mx.array,
    state: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """Run the gated delta rule over T tokens.

    Shapes as in :func:`metal_kernels.gated_delta.gated_delta_rule`; log_decay and beta are already masked.

    Returns:
        y fp32 [B, T, Hv, Dv] and the state fp32 [B, Hv, Dv, Dk].
    """
    T, Hk = q.shape[1:3]
    r = v.shape[2] // Hk

    def run(first: int, last: int) -> tuple[mx.array, mx.array]:
        keys, values = slice(first, last), slice(first * r, last * r)
        return _run_heads(
            q[:, :, keys],
            k[:, :, keys],
            v[:, :, values],
            log_decay[:, :, values],
            beta[:, :, values],
            None if state is None else state[:, values],
        )

    outputs, states = zip(*run_in_lanes(run, Hk, T), strict=True)
    return join_lanes(list(outputs), axis=2), join_lanes(list(states), axis=1)


def _run_heads(
    q: mx.array, k: mx.array, v: mx.array, log_decay: mx.array, beta: mx.array, state: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Run the rule in whole chunks and one shorter chunk for the tokens that remain."""
    B, T, Hk, Dk = q.shape
    Hv, Dv = v.shape[2:]
    C = _chunk_length()
    whole = T - T % C
    chunks: list[_Chunk] = []
    for tokens, length in ((slice(whole), C), (slice(whole, T), T - whole)):
        if q[:, tokens].shape[1]:
            chunks += _prepare(q[:, tokens], k[:, tokens], v[:, tokens], log_decay[:, tokens], beta[:, tokens], length)
    if state is not None:
        state = state.reshape(B, Hk, Hv // Hk, 1, Dv, Dk).swapaxes(-1, -2)
    y, state = _scan(chunks, state, T)
    return y.reshape(B, T, Hv, Dv), state.swapaxes(-1, -2).reshape(B, Hv, Dv, Dk)


def _chunk_length() -> int:
    """Return the longest chunk: on the CPU arithmetic counts and is least with 16, on a GPU launches do."""
    return 64 if mx.default_device() == mx.gpu else 16


def _prepare(q: mx.array, k: mx.array, v: mx.array, log_decay: mx.array, beta: mx.array, C: int) -> list[_Chunk]:
    """Compute what does not depend on the state, for all chunks of exactly C tokens at once."""
    B, T, Hk, Dk = q.shape
    Hv, Dv = v.shape[2:]
    n, r = T // C, Hv // Hk
    q = _normalized_chunks(q, n, Dk**-0.5)
    k = _normalized_chunks(k, n, 1.0)
    keys = k.swapaxes(-1, -2)
    v = v.astype(mx.float32).reshape(B, n, C, Hk, r, Dv).transpose(0, 3, 4, 1, 2, 5)
    log_decay, beta = (x.reshape(B, n, C, Hk, r).transpose(0, 3, 4, 1, 2) for x in (log_decay, beta))

    between = decay_between(log_decay)
    inverse = inverse_of_unit_lower(beta[..., None] * between * (k @ keys)) * beta[..., None, :]
    read = (between * (q @ keys)) @ inverse
    write = between[..., -1, :, None] * inverse
    decay = _exp(mx.cumsum(log_decay, axis=-1))[..., None]
    fields = (q * decay, k * decay, keys, v, mx.concatenate([read, write], axis=-2), decay[..., -1:, :])
    return [_Chunk(*chunk) for chunk in zip(*(mx.split(x, n, axis=3) for x in fields), strict=True)]


def _normalized_chunks(x: mx.array, n: int, scale: float) -> mx.array:
    """Return ``scale`` times the L2-normalized rows of x [B, T, Hk, Dk], as fp32 [B, Hk, 1, n, T / n, Dk]."""
    B, T, Hk, _ = x.shape
    x = x.astype(mx.float32)
    norm = mx.rsqrt(mx.square(x).sum(axis=-1, keepdims=True) + NORM_EPS) * scale
    x, norm = (a.reshape(B, n, T // n, Hk, 1, -1).transpose(0, 3, 4, 1, 2, 5) for a in (x, norm))
    return x * norm


def decay_between(log_decay: mx.array) -> mx.array:
    """Return exp(sum of log_decay [..., C] over (j, i]) for i >= j and 0 above the diagonal, [..., C, C].

    The sums are formed directly: a difference of two running sums would cancel when decay is strong.
    """
    steps = mx.arange(log_decay.shape[-1])
    sums = mx.cumsum(mx.where(steps[:, None] > steps, log_decay[..., None], 0.0), axis=-2)
    return _exp(mx.where(steps[:, None] >= steps, sums, -mx.inf))


def _exp(log_decay: mx.array) -> mx.array:
    """Return exp(log_decay), 0 where it is below e^-60: subnormal factors slow CPU matrix products down severalfold."""
    return mx.exp(mx.where(log_decay < _SMALLEST_LOG_DECAY, -mx.inf, log_decay))


def _scan(chunks: list[_Chunk], state: mx.array | None, T: int) -> tuple[mx.array, mx.array]:
    """Carry the state through the chunks; returns y [B, T, Hk, r, Dv] and the last state [B, Hk, r, 1, Dk, Dv].

    The chunks write into one y in turn: joining them at the end would let the scheduler run lanes one after another.
    """
    y: mx.array | None = None
    start = 0
    for chunk in chunks:
        out, state = _advance(chunk, state)
        out = out[:, :, :, 0].transpose(0, 3, 1, 2, 4)
        if len(chunks) == 1:
            return out, state
        if y is None:
            y = mx.zeros((out.shape[0], T, *out.shape[2:]))
        y[:, start : start + out.shape[1]] = out
        start += out.shape[1]
    assert y is not None
    assert state is not None
    return y, state


def _advance(chunk: _Chunk, state: mx.array | None) -> tuple[mx.array, mx.array]:
    """Return the chunk's outputs [B, Hk, r, 1, C, Dv] and the state after it; a state of None is zeros."""
    C = chunk.v.shape[-2]
    residual = chunk.v if state is None else mx.addmm(chunk.v, chunk.k_decayed, state, alpha=-1.0)
    read, written = mx.split(chunk.read_write @ residual, [C], axis=-2)
    if state is None:
        return read, chunk.keys @ written
    return mx.addmm(read, chunk.q_decayed, state), mx.addmm(chunk.decay * state, chunk.keys, written)
