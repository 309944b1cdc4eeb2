"""What a model calls: the gated delta rule, with the choice between kernel and reference."""

import mlx.core as mx

from metal_kernels._backend import takes_kernel
from metal_kernels.gated_delta.rule import prefill, reference
from metal_kernels.gated_delta.rule.chunked import chunked_gated_delta_rule


def gated_delta_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_decay: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Run the gated delta rule over T tokens.

    For every token and value head, with k and q L2-normalized (eps 1e-6 is added to the sum of squares) and q scaled
    by Dk^-0.5: S <- exp(log_decay) S; S <- S + beta (v - S k) k^T; y = S q. All arithmetic is fp32. One token is a
    direct step; more are the chunked WY form of Yang et al., "Gated Delta Networks" (2024).

    A kernel takes heads of 32 to 256 in steps of 32 and any T, at any strides, in one of the two forms of
    `prefill.chosen_form`. It sums in another order than the reference: y and the state are within 1e-5 of the
    reference's largest value, before y is rounded to v's dtype.

    Args:
        q, k: [B, T, Hk, Dk], not normalized.
        v: [B, T, Hv, Dv]; Hk divides Hv and value head h reads key head h // (Hv / Hk).
        log_decay: fp32 [B, T, Hv], at most 0.
        beta: fp32 [B, T, Hv].
        state: fp32 [B, Hv, Dv, Dk]; None is zeros.
        mask: bool [B, T]; a token where it is False neither decays nor writes the state. Its y is finite but
            otherwise unspecified, given finite q, k and v.

    Returns:
        y [B, T, Hv, Dv] in v's dtype, and the state after the last token, fp32 [B, Hv, Dv, Dk].

    Raises:
        ValueError: shapes do not fit together.
    """
    _check_rule_shapes(q, k, v, log_decay, beta, state)
    if takes_kernel("gated_delta_rule", prefill.unsupported(q, k, v, log_decay, beta, state)):
        return prefill.gated_delta_prefill(q, k, v, log_decay, beta, state, mask)
    return reference.gated_delta_rule(q, k, v, log_decay, beta, state, mask)


def kernel_or_chunks(
    q: mx.array, k: mx.array, v: mx.array, log_decay: mx.array, beta: mx.array, state: mx.array | None
) -> tuple[mx.array, mx.array]:
    """The rule over several tokens in fp32, gates masked already: what the mixer takes."""
    if takes_kernel("gated_delta_rule", prefill.unsupported(q, k, v, log_decay, beta, state)):
        return prefill.gated_delta_prefill(q, k, v, log_decay, beta, state)
    return chunked_gated_delta_rule(q, k, v, log_decay, beta, state)


def _check_rule_shapes(
    q: mx.array, k: mx.array, v: mx.array, log_decay: mx.array, beta: mx.array, state: mx.array | None
) -> None:
    B, T, Hk, Dk = q.shape
    Hv, Dv = v.shape[2:]
    expected = {
        "k": (k.shape, (B, T, Hk, Dk)),
        "v": (v.shape, (B, T, Hv, Dv)),
        "log_decay": (log_decay.shape, (B, T, Hv)),
        "beta": (beta.shape, (B, T, Hv)),
    }
    if state is not None:
        expected["state"] = (state.shape, (B, Hv, Dv, Dk))
    for name, (found, wanted) in expected.items():
        if found != wanted:
            raise ValueError(f"gated_delta_rule: {name} is {found}, expected {wanted} beside q {q.shape}, v {v.shape}")
    if Hv % Hk:
        raise ValueError(f"gated_delta_rule: {Hv} value heads cannot share {Hk} key heads evenly, see q and v")
