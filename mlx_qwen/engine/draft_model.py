"""A smaller model that guesses for a larger one.

Source: Leviathan et al. (2023), "Fast inference from transformers via speculative decoding".
"""

from collections.abc import Sequence as Listed

import mlx.core as mx

from mlx_qwen.engine.draft import Guesses
from mlx_qwen.engine.memory import piece_tokens
from mlx_qwen.engine.prefix import PrefixIndex, prefix_key
from mlx_qwen.engine.sequence import Sequence, Unread
from mlx_qwen.engine.vocabulary import head_share
from mlx_qwen.model import Model
from mlx_qwen.model.state import State, empty_state

# A step of that many tokens or fewer is a replayed one.
_FEW = 8


class DraftModel:
    """Guesses with a model of the same vocabulary, which reads what the larger one reads, but for images.

    What it remembers of a row is the row's `draft_state`, and of prompts it keeps checkpoints of its own.
    """

    name = "draft model"

    def __init__(self, model: Model, prefixes: PrefixIndex, piece_bytes: int | None = None) -> None:
        self.model = model
        self.head_share: float | None = head_share(
            model.lm_head or model.embed_tokens, model.layers, model.config.text.moe
        )
        # What may be alive while a piece of a prompt is read; None for pieces as the row asks.
        self._piece_bytes = piece_bytes
        self._prefixes = prefixes
        self._most_tokens = model.config.text.max_position_embeddings
        self._after: list[State] = []
        self._mark = model.mark

    def read(self, row: Sequence, end: int) -> None:
        """See `ReadingDrafter.read`: from the longest beginning that is known."""
        if row.draft_state is None:
            if self._mark is not self.model.mark:
                self.forget()
            self._mark = self.model.mark
            found = None if row.key is None else self._prefixes.take(prefix_key(row.ids))
            row.draft_state = empty_state(self.model.config.text) if found is None else found.state
        self._catch_up(row, len(row.earlier) + end)
        if end in row.anchors or end == len(row.ids):
            self.remember(row)

    def remember(self, row: Sequence) -> None:
        """See `ReadingDrafter.remember`."""
        state = row.draft_state
        if row.key is None or state is None or not state.offset:
            return
        mx.eval(state.arrays())
        key = prefix_key(row.text(0, state.offset))
        self._prefixes.insert(key, state, "prompt" if state.offset <= row.answer_from else "answer")

    def forget(self) -> None:
        """See `ReadingDrafter.forget`."""
        self._prefixes.clear()

    def shed(self, nbytes: int) -> int:
        """See `ReadingDrafter.shed`."""
        self._prefixes.shed(max(0, nbytes))
        return self._prefixes.nbytes

    def room(self, state: State, row: Sequence) -> int:
        """See `Drafter.room`: as many as its context has places for."""
        return 0 if row.draft_state is None else self._most_tokens - row.length - 1

    def propose(self, unread: Unread, serving: Listed[int], depth: int) -> mx.array:
        """See `Drafter.propose`."""
        rows = [unread.rows[i] for i in serving]
        tokens = unread.tokens if len(rows) == len(unread.rows) else unread.tokens[mx.array(list(serving))]
        entering = tokens[:, None]
        missed = [row.text(_state(row).offset, row.length) for row in rows]
        if missed[0] and len({len(each) for each in missed}) == 1 and len(missed[0]) < _FEW:
            entering = mx.concatenate([mx.array(missed, tokens.dtype), entering], axis=1)
        else:
            for row in rows:
                self._catch_up(row, row.length)
        state, guessed, self._after = State.joined([_state(row) for row in rows]), Guesses(rows, self.head_share), []
        for _ in range(depth):
            hidden, state, _ = self.model.step(entering, state, last=True)
            self._after.append(state)
            entering = guessed.take(self.model.logits(hidden[:, -1:], guessed.part)[:, -1])[:, None]
        return guessed.made()

    def kept(self, rows: Listed[Sequence], right: Listed[int]) -> None:
        """See `Drafter.kept`: the state of each row is the one behind its last right guess that was read."""
        for i, (row, count) in enumerate(zip(rows, right, strict=True)):
            row.draft_state = self._after[min(count, len(self._after) - 1)].row(i)
        self._after = []

    def _catch_up(self, row: Sequence, end: int) -> None:
        """Read the row's text up to its token `end`."""
        state = _state(row)
        while state.offset < end:
            piece = row.text(state.offset, min(end, state.offset + self._piece(state, row.step_size)))
            state = row.draft_state = self.model.step(mx.array([piece]), state, last=True, room=end).state
            if len(piece) > _FEW:
                mx.eval(state.arrays())

    def _piece(self, state: State, wanted: int) -> int:
        if self._piece_bytes is None:
            return wanted
        text, size = self.model.share.text, self.model.dtype.size
        return piece_tokens(text, wanted, state.offset, self._piece_bytes, item_size=size)


def _state(row: Sequence) -> State:
    assert row.draft_state is not None, "the prompt has been read"
    return row.draft_state
