"""How far two models' next-token distributions are apart, from logits that are never whole in memory."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_qwen.model.layers import AnyLinear

from ..layerwise import LayerwiseModel

_TOKENS = 512
VOCABULARY_BLOCK = 8192


@dataclass(frozen=True, slots=True)
class Predictions:
    """One value a token: the surprise (negative log probability, nats) of what came next in each model, the divergence
    KL(a ‖ b) in nats, and whether both find the same token most likely."""

    surprise_a: npt.NDArray[np.float32]
    surprise_b: npt.NDArray[np.float32]
    divergence: npt.NDArray[np.float32]
    agreement: npt.NDArray[np.bool_]


def predictions(
    a: LayerwiseModel, b: LayerwiseModel, normed_a: mx.array, normed_b: mx.array, next_ids: mx.array
) -> Predictions:
    """Compare the distributions that the heads of `a` and `b` make of `normed_a` and `normed_b`.

    The vocabulary is gone through once, some thousand tokens of it at a time; sums of exponentials are kept relative to
    the largest logit so far, as in Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).

    Args:
        a, b: of one vocabulary.
        normed_a, normed_b: [N, hidden_size], from `LayerwiseModel.normed`.
        next_ids: int [N], the token that followed each.
    """
    N = next_ids.size
    spans = [(start, min(start + _TOKENS, N)) for start in range(0, N, _TOKENS)]
    sums = [_Sums(next_ids[start:stop]) for start, stop in spans]
    first_row = 0
    for head_a, head_b in zip(a.head(VOCABULARY_BLOCK), b.head(VOCABULARY_BLOCK), strict=True):
        for (start, stop), part in zip(spans, sums, strict=True):
            part.add(first_row, _logits(head_a, normed_a[start:stop]), _logits(head_b, normed_b[start:stop]))
        first_row += VOCABULARY_BLOCK
    parts = [part.result() for part in sums]
    return Predictions(
        np.concatenate([part.surprise_a for part in parts]),
        np.concatenate([part.surprise_b for part in parts]),
        np.concatenate([part.divergence for part in parts]),
        np.concatenate([part.agreement for part in parts]),
    )


def _logits(head: AnyLinear, normed: mx.array) -> mx.array:
    logits: mx.array = head(normed)
    return logits.astype(mx.float32)


class _Softmax:
    """What is known of one model's softmax over the part of the vocabulary seen so far, for n tokens."""

    def __init__(self, next_ids: mx.array) -> None:
        self.largest = mx.full(next_ids.shape, -mx.inf)
        self.best = mx.zeros_like(next_ids)
        self.total = mx.zeros(next_ids.shape)
        self.chosen = mx.zeros(next_ids.shape)

    def add(self, first_row: int, logits: mx.array, next_ids: mx.array) -> tuple[mx.array, mx.array]:
        """Take in logits [n, V']; returns their exponentials, and what earlier sums must be multiplied by [n]."""
        largest = mx.maximum(self.largest, logits.max(axis=-1))
        shrink = mx.exp(self.largest - largest)
        exponentials = mx.exp(logits - largest[:, None])
        self.best = mx.where(largest > self.largest, first_row + logits.argmax(axis=-1), self.best)
        self.total = self.total * shrink + exponentials.sum(axis=-1)
        self.largest = largest
        here = next_ids - first_row
        inside = (here >= 0) & (here < logits.shape[-1])
        found = mx.take_along_axis(logits, mx.where(inside, here, 0)[:, None], axis=-1)[:, 0]
        self.chosen = mx.where(inside, found, self.chosen)
        return exponentials, shrink

    @property
    def normalizer(self) -> mx.array:
        """log Σ exp(logit), [n]."""
        return self.largest + mx.log(self.total)


class _Sums:
    """The running sums of n tokens."""

    def __init__(self, next_ids: mx.array) -> None:
        self.next_ids = next_ids
        self.a, self.b = _Softmax(next_ids), _Softmax(next_ids)
        self.weighted_gap = mx.zeros(next_ids.shape)

    def add(self, first_row: int, logits_a: mx.array, logits_b: mx.array) -> None:
        exponentials, shrink = self.a.add(first_row, logits_a, self.next_ids)
        self.b.add(first_row, logits_b, self.next_ids)
        gap = (exponentials * (logits_a - logits_b)).sum(axis=-1)
        self.weighted_gap = self.weighted_gap * shrink + gap
        held = [self.weighted_gap]
        for softmax in (self.a, self.b):
            held += [softmax.largest, softmax.best, softmax.total, softmax.chosen]
        mx.eval(held)

    def result(self) -> Predictions:
        # KL(a ‖ b) = E_a[a − b] − (log Σ exp a − log Σ exp b), which rounding may bring below 0.
        divergence = self.weighted_gap / self.a.total - self.a.normalizer + self.b.normalizer
        return Predictions(
            np.array(self.a.normalizer - self.a.chosen),
            np.array(self.b.normalizer - self.b.chosen),
            np.array(mx.maximum(divergence, 0)),
            np.array(self.a.best == self.b.best),
        )
