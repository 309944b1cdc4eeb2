"""What the MTP layer of a checkpoint that does not say so was trained to read: what makes its drafts likelier."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import mlx.core as mx
import numpy as np

from mlx_qwen.checkpoint import mtp_reads
from mlx_qwen.checkpoint.mtp_reads import MTPReads
from mlx_qwen.model.qwen import Model

# Logits of a large vocabulary: 64 rows of 248,320 take 32 MB.
_ROWS = 64


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids of a prompt without images, `prompt` of them, and of what the model wrote after it."""

    ids: list[int]
    prompt: int

    @property
    def drafted(self) -> int:
        """How many of its last tokens a first draft is made for: what was written but for its first token."""
        return max(0, len(self.ids) - max(self.prompt, 1) - 1)


@dataclass(frozen=True, slots=True)
class Likelihoods:
    """Mean log-likelihood, in nats a token, that first drafts give to `tokens` tokens, by the states that they read."""

    normed: float
    residual: float
    tokens: int

    @property
    def better(self) -> MTPReads:
        """The likelier one; "normed", which released heads read, where there is no difference."""
        return "residual" if self.residual > self.normed else "normed"


def mtp_likelihoods(model: Model, texts: Sequence[Text]) -> Likelihoods:
    """Both likelihoods of what the model wrote, which costs a forward pass over each text.

    Args:
        model: with an MTP layer.
        texts: a few hundred tokens that the model wrote itself: of others' words no draft knows much.

    Raises:
        ValueError: the model has no MTP layer, or nothing was written that a draft could have foreseen.
    """
    counted = [text for text in texts if text.drafted]
    if not counted:
        raise ValueError("no text has two tokens behind its prompt, expected some hundred: write longer answers")
    sums = dict.fromkeys(get_args(MTPReads), 0.0)
    for text in counted:
        tokens = mx.array([text.ids])
        hidden = model.hidden_states(tokens[:, :-2])
        states = {"normed": model.norm(hidden, model.dtype), "residual": hidden}
        for reads in sums:
            sums[reads] += _log_likelihood(model, states[reads], tokens, text.drafted)
    count = sum(text.drafted for text in counted)
    return Likelihoods(tokens=count, **{reads: total / count for reads, total in sums.items()})


def settle_mtp_reads(model: Model, texts: Sequence[Text]) -> Likelihoods | None:
    """Find out what the MTP layer reads and remember it; None, at no cost, where it is known or there is no layer.

    Arguments and errors as of `mtp_likelihoods`. The next `load` of the same checkpoint knows it.
    """
    if model.mtp is None or model.mtp_unsettled is None:
        return None
    found = mtp_likelihoods(model, texts)
    mtp_reads.keep(
        model.mtp_unsettled, found.better, {"normed": found.normed, "residual": found.residual, "tokens": found.tokens}
    )
    model.mtp_reads, model.mtp_unsettled = found.better, None
    return found


def _log_likelihood(model: Model, states: mx.array, tokens: mx.array, counted: int) -> float:
    """The summed log-likelihood of the last `counted` of tokens [1, T], by drafts on states [1, T - 2, hidden]."""
    memory, total, end = model.mtp_memory(), 0.0, states.shape[1]
    start = end - counted
    # As in a chain, the states are taken as they stand. Drafts that nobody looks at are never computed.
    if start:
        memory = model.mtp_step(states[:, :start], tokens[:, 1 : start + 1], memory, chained=True).memory
    for first in range(start, end, _ROWS):
        last = min(first + _ROWS, end)
        draft = model.mtp_step(states[:, first:last], tokens[:, first + 1 : last + 1], memory, chained=True)
        memory, logits = draft.memory, draft.logits.astype(mx.float32)
        chosen = mx.take_along_axis(logits, tokens[:, first + 2 : last + 2, None], axis=-1)[..., 0]
        total += float(np.array((chosen - mx.logsumexp(logits, axis=-1)).sum()))
    return total
