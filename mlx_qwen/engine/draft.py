"""Guessing tokens ahead, so that one pass of the model can verify several: with the model's own MTP layer.

What a draft proposes never changes an answer: the model's own choice decides at every place, and drafts only spare
passes where they guessed it. Source: DeepSeek-V3 (2024) for the MTP layer.
"""

from collections.abc import Sequence as Listed

import mlx.core as mx

from mlx_qwen.engine.depth import MOST_DRAFTS
from mlx_qwen.engine.sampling import Pick, guess_all
from mlx_qwen.engine.sequence import Sequence, Unread
from mlx_qwen.model import Model
from mlx_qwen.model.state import State


class MTPDrafter:
    """Guesses with the model's own MTP layer, which goes on from the last hidden state."""

    name = "mtp"

    def __init__(self, model: Model) -> None:
        self._model = model

    def room(self, state: State, row: Sequence) -> int:
        """See `Drafter.room`: any, once the steps before have filled the layer's keys and values."""
        ready = len(state.mtp) == len(state.chains) and state.last is not None
        return MOST_DRAFTS if ready else 0

    def propose(self, unread: Unread, serving: Listed[int], depth: int) -> mx.array:
        """See `Drafter.propose`; the keys and values that guessing leaves are forgotten with it."""
        state, tokens = unread.state, unread.tokens
        assert state.last is not None, "a prompt was read"
        memory, states, chained, guessed = self._model.mtp_memory(state), state.last, False, Guesses(unread.rows)
        for _ in range(depth):
            draft = self._model.mtp_step(states, tokens[:, None], memory, chained=chained)
            tokens = guessed.take(draft.logits[:, -1])
            states, memory, chained = draft.normed, draft.memory, True
        made = guessed.made()
        return made if len(serving) == len(unread.rows) else made[mx.array(list(serving))]

    def kept(self, rows: Listed[Sequence], right: Listed[int]) -> None:
        """See `Drafter.kept`: what the layer remembers lies in the model's own state."""


class Guesses:
    """Guesses of rows, one at each place after the other, each drawn as its row draws its tokens."""

    def __init__(self, rows: Listed[Sequence]) -> None:
        self._samplers = [row.sampler for row in rows]
        self._histories = [row.history for row in rows if row.history is not None]
        self._made: list[mx.array] = []

    def take(self, logits: mx.array) -> mx.array:
        """The next guess [B] of every row, from a drafter's logits [B, V]."""
        guesses = guess_all(logits, [Pick(*pick) for pick in zip(self._samplers, self._histories, strict=True)])
        self._histories = [
            sampler.saw(history, guesses, i)
            for i, (sampler, history) in enumerate(zip(self._samplers, self._histories, strict=True))
        ]
        self._made.append(guesses)
        return guesses

    def made(self) -> mx.array:
        """All of them, [B, depth]."""
        return mx.stack(self._made, axis=1)
