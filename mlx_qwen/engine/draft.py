"""Guessing tokens ahead, so that one pass of the model can verify several: with the model's own MTP layer.

What a draft proposes never changes an answer: the model's own choice decides at every place, and drafts only spare
passes where they guessed it. Source: DeepSeek-V3 (2024) for the MTP layer.
"""

from collections.abc import Sequence as Listed

import mlx.core as mx

from mlx_qwen.engine.depth import MOST_DRAFTS
from mlx_qwen.engine.sampling import Pick, guess_all
from mlx_qwen.engine.sequence import Sequence, Unread
from mlx_qwen.engine.vocabulary import head_share
from mlx_qwen.model import Model
from mlx_qwen.model.partial_head import Part
from mlx_qwen.model.state import State


class MTPDrafter:
    """Guesses with the model's own MTP layer, which goes on from the last hidden state."""

    name = "mtp"

    def __init__(self, model: Model) -> None:
        self._model = model
        held, read = model.lm_head or model.embed_tokens, model.mtp
        assert read is not None, "who has an MTP layer drafts with it"
        self.head_share = None if model.group is not None else head_share(held, read, model.config.text.moe)

    def room(self, state: State, row: Sequence) -> int:
        """See `Drafter.room`: any, once the steps before have filled the layer's keys and values."""
        ready = len(state.mtp) == len(state.chains) and state.last is not None
        return MOST_DRAFTS if ready else 0

    def propose(self, unread: Unread, serving: Listed[int], depth: int) -> mx.array:
        """See `Drafter.propose`; the keys and values that guessing leaves are forgotten with it."""
        state, tokens = unread.state, unread.tokens
        assert state.last is not None, "a prompt was read"
        memory, states, chained = self._model.mtp_memory(state), state.last, False
        guessed = Guesses(unread.rows, self.head_share)
        for _ in range(depth):
            draft = self._model.mtp_step(states, tokens[:, None], memory, chained=chained, part=guessed.part)
            tokens = guessed.take(draft.logits[:, -1])
            states, memory, chained = draft.normed, draft.memory, True
        made = guessed.made()
        return made if len(serving) == len(unread.rows) else made[mx.array(list(serving))]

    def kept(self, rows: Listed[Sequence], right: Listed[int]) -> None:
        """See `Drafter.kept`: what the layer remembers lies in the model's own state."""


class Guesses:
    """Guesses of rows, one at each place after the other, each drawn as its row draws its tokens."""

    def __init__(self, rows: Listed[Sequence], head_share: float | None = None) -> None:
        self._parts = [row.draft_part(head_share) for row in rows]
        self._samplers = [row.sampler for row in rows]
        self._histories = [row.history for row in rows if row.history is not None]
        self._made: list[mx.array] = []

    @property
    def part(self) -> Part | None:
        """The part of the vocabulary that all of them are chosen from; None for all of it."""
        parts = [part for part in self._parts if part is not None]
        return max(parts) if len(parts) == len(self._parts) else None

    def take(self, logits: mx.array) -> mx.array:
        """The next guess [B] of every row, from a drafter's logits [B, V] of the tokens of `part`."""
        picks = zip(self._samplers, self._histories, self._parts, strict=True)
        guesses = guess_all(logits, [Pick(*pick[:2], part=pick[2]) for pick in picks], self.part)
        self._histories = [
            sampler.saw(history, guesses, i)
            for i, (sampler, history) in enumerate(zip(self._samplers, self._histories, strict=True))
        ]
        self._made.append(guesses)
        return guesses

    def made(self) -> mx.array:
        """All of them, [B, depth]."""
        return mx.stack(self._made, axis=1)
