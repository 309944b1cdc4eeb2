"""Guessing tokens ahead, so that one pass of the model can verify several: who guesses, and how many.

What a draft proposes never changes an answer: the model's own choice decides at every place, and drafts only spare
passes where they guessed it. Source: DeepSeek-V3 (2024) for the MTP layer; Leviathan et al. (2023) for the costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx

from mlx_qwen.engine.sampling import History, TokenSampler
from mlx_qwen.model import Model
from mlx_qwen.model.state import State

MOST_DRAFTS = 7
# What a decoded token costs: 1. One more verified row and one more draft, as public measurements on Apple GPUs have it.
ROW_COST, DRAFT_COST = 0.3, 0.15
# The chance of a first guess before any was tried and how many tries that is worth; how fast old tries are forgotten.
_FIRST_CHANCE, _UNKNOWN_WEIGHT = 0.8, 2.0
_MEMORY = 0.95
_PROBE_AFTER, _MOST_PROBE_AFTER = 16, 256


@dataclass(slots=True)
class Drafts:
    """How many tokens one answer guesses ahead: always `fixed`, or as many as pay by what was taken so far.

    The number depends on the answer alone, so that the same request is computed in the same steps.
    """

    fixed: int | None = 0
    taken: list[float] = field(default_factory=lambda: [0.0] * MOST_DRAFTS)
    tried: list[float] = field(default_factory=lambda: [0.0] * MOST_DRAFTS)
    all_taken: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTS)
    all_tried: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTS)
    passes: int = 0
    _idle: int = 0
    _probe_after: int = _PROBE_AFTER

    def depth(self, room: int) -> int:
        """How many to guess now, at most `room`."""
        if self.fixed is not None:
            return max(0, min(self.fixed, room))
        best = self._best()
        if best == 0:
            self._idle += 1
            if self._idle >= self._probe_after:
                self._idle, self._probe_after = 0, min(2 * self._probe_after, _MOST_PROBE_AFTER)
                best = 1
        else:
            self._idle, self._probe_after = 0, _PROBE_AFTER
        return max(0, min(best, room))

    def saw(self, tried: int, taken: int) -> None:
        """Note that of `tried` guesses the first `taken` were right; those behind the first wrong one say nothing."""
        self.passes += 1
        for i in range(min(taken + 1, tried)):
            right = i < taken
            self.taken[i] = _MEMORY * self.taken[i] + right
            self.tried[i] = _MEMORY * self.tried[i] + 1
            self.all_taken[i] += right
            self.all_tried[i] += 1

    def acceptance(self) -> list[float]:
        """How often the guess at each depth was right where all before it were, as far as any was tried."""
        return [taken / tried for taken, tried in zip(self.all_taken, self.all_tried, strict=True) if tried]

    def _best(self) -> int:
        best, gain, expected, right, chance = 0, 1.0, 1.0, 1.0, _FIRST_CHANCE
        for depth in range(1, MOST_DRAFTS + 1):
            # What is not known yet is taken to be as likely as at the depth before.
            taken, tried = self.taken[depth - 1], self.tried[depth - 1]
            chance = (taken + _UNKNOWN_WEIGHT * chance) / (tried + _UNKNOWN_WEIGHT)
            right *= chance
            expected += right
            rate = expected / (1 + depth * (ROW_COST + DRAFT_COST))
            if rate > gain:
                best, gain = depth, rate
        return best


class Drafter(Protocol):
    """Guesses the next tokens of a batch."""

    def is_ready(self, state: State) -> bool:
        """Whether it can go on from what `state` remembers."""

    def propose(
        self, state: State, tokens: mx.array, samplers: Sequence[tuple[TokenSampler, History]], depth: int
    ) -> mx.array:
        """Guesses int [B, depth] at what follows `tokens` [B], the ones chosen last, which `state` has not read.

        `samplers` choose each row's tokens; their histories include `tokens`.
        """


class MTPDrafter:
    """Guesses with the model's own MTP layer, which goes on from the last hidden state."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def is_ready(self, state: State) -> bool:
        """Whether the steps before have filled the layer's keys and values."""
        return len(state.mtp) == len(state.chains) and state.last is not None

    def propose(
        self, state: State, tokens: mx.array, samplers: Sequence[tuple[TokenSampler, History]], depth: int
    ) -> mx.array:
        """See `Drafter.propose`; the keys and values that guessing leaves are forgotten with it."""
        assert state.last is not None, "a prompt was read"
        memory, states, chained = self._model.mtp_memory(state), state.last, False
        histories = [history for _, history in samplers]
        guesses = []
        for _ in range(depth):
            draft = self._model.mtp_step(states, tokens[:, None], memory, chained=chained)
            rows = [sampler.draft(draft.logits[i, -1:], histories[i]) for i, (sampler, _) in enumerate(samplers)]
            tokens = rows[0] if len(rows) == 1 else mx.concatenate(rows)
            histories = [
                sampler.saw(history, row) for (sampler, _), history, row in zip(samplers, histories, rows, strict=True)
            ]
            guesses.append(tokens)
            states, memory, chained = draft.normed, draft.memory, True
        return mx.stack(guesses, axis=1)
