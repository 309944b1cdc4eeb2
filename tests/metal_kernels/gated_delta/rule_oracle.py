"""The gated delta rule, token by token in fp64 numpy, and random inputs for it."""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class RuleInputs:
    """Arguments of ``gated_delta_rule``."""

    q: mx.array
    k: mx.array
    v: mx.array
    log_decay: mx.array
    beta: mx.array
    state: mx.array | None = None
    mask: mx.array | None = None

    def tokens(self, start: int, stop: int, state: mx.array | None) -> "RuleInputs":
        """The same inputs for tokens start to stop, beginning with ``state``."""
        part = {name: getattr(self, name)[:, start:stop] for name in ("q", "k", "v", "log_decay", "beta")}
        mask = None if self.mask is None else self.mask[:, start:stop]
        return replace(self, **part, state=state, mask=mask)

    def call(self, rule):
        return rule(self.q, self.k, self.v, self.log_decay, self.beta, self.state, self.mask)


def random_inputs(T, *, B=1, Hk=2, Hv=4, Dk=16, Dv=8, state=True, dtype=mx.float32, decay=(-1.0, 0.0), seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return mx.array(rng.standard_normal(shape, dtype=np.float32))

    return RuleInputs(
        q=normal(B, T, Hk, Dk).astype(dtype),
        k=normal(B, T, Hk, Dk).astype(dtype),
        v=normal(B, T, Hv, Dv).astype(dtype),
        log_decay=mx.array(rng.uniform(*decay, (B, T, Hv)).astype(np.float32)),
        beta=mx.array(rng.uniform(0, 1, (B, T, Hv)).astype(np.float32)),
        state=normal(B, Hv, Dv, Dk) if state else None,
    )


def exact_rule(inputs: RuleInputs) -> tuple[np.ndarray, np.ndarray]:
    """Return y and the last state in fp64."""
    q, k, v, log_decay, beta = (as_numpy(x) for x in (inputs.q, inputs.k, inputs.v, inputs.log_decay, inputs.beta))
    B, T, Hk, Dk = q.shape
    Hv, Dv = v.shape[2:]
    q, k = (np.repeat(x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6), Hv // Hk, axis=2) for x in (q, k))
    S = np.zeros((B, Hv, Dv, Dk)) if inputs.state is None else as_numpy(inputs.state)
    y = np.zeros((B, T, Hv, Dv))
    for t in range(T):
        decayed = S * np.exp(log_decay[:, t])[..., None, None]
        delta = (v[:, t] - np.einsum("bhvk,bhk->bhv", decayed, k[:, t])) * beta[:, t][..., None]
        written = decayed + delta[..., None] * k[:, t][:, :, None, :]
        real = np.ones(B, bool) if inputs.mask is None else np.array(inputs.mask[:, t])
        S = np.where(real[:, None, None, None], written, S)
        y[:, t] = np.einsum("bhvk,bhk->bhv", S, q[:, t]) * Dk**-0.5
    return y, S


def as_numpy(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def relative_error(found: mx.array, expected: np.ndarray) -> float:
    """Largest absolute difference over the largest expected magnitude; nan when anything found is not finite."""
    return float(np.abs(as_numpy(found) - expected).max() / np.abs(expected).max())
