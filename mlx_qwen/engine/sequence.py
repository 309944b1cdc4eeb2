"""One answer in the making: what it reads, what chooses its tokens, and where they go."""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Listed
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from queue import SimpleQueue
from threading import Event
from typing import TYPE_CHECKING, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from mlx_qwen.answer import FinishReason
from mlx_qwen.engine.choice import Choice
from mlx_qwen.engine.depth import DRAFT_COST, Drafts
from mlx_qwen.engine.emission import Emission, Follower
from mlx_qwen.engine.lookup import Lookup
from mlx_qwen.engine.rules import Rules
from mlx_qwen.engine.sampling import History, TokenSampler
from mlx_qwen.engine.vocabulary import WINDOW, DraftVocabulary
from mlx_qwen.model import Model
from mlx_qwen.model.cache import HybridCache
from mlx_qwen.model.multimodal import Embedded, Pixels
from mlx_qwen.model.partial_head import Part
from mlx_qwen.model.state import State

if TYPE_CHECKING:
    from mlx_qwen.engine.prefix_files import PrefixFiles
    from mlx_qwen.settings import Progress

# How far an answer may run ahead of whoever reads it.
MOST_UNREAD = 32
# After how many tokens it is asked anew which part of the vocabulary they are of.
_ASKED_EVERY = 16
_numbers = count()


class Medium(NamedTuple):
    """An image or video of the prompt, whose placeholders begin at token `start`."""

    start: int
    pixels: Pixels


class Unread(NamedTuple):
    """A batch before a pass: its rows, whose histories include `tokens` [B], the ones chosen last.

    `state` is the model's and has not read `tokens`.
    """

    state: State
    rows: Listed["Sequence"]
    tokens: mx.array


class Drafter(Protocol):
    """Guesses the next tokens of rows of a batch."""

    # By what its costs are remembered.
    name: str
    # What its head takes of the bytes that a guess reads; None where it always reads the whole head.
    head_share: float | None

    def room(self, state: State, row: "Sequence") -> int:
        """How many tokens of `row` it can guess from what was read; `state` is the batch's."""

    def propose(self, unread: Unread, serving: Listed[int], depth: int) -> mx.array:
        """Guesses int [S, depth] at what follows the tokens of the rows with the numbers `serving`, S of them."""

    def kept(self, rows: Listed["Sequence"], right: Listed[int]) -> None:
        """Note how many of the guesses that were just made are right, for each row that was served."""


class ReadingDrafter(Drafter, Protocol):
    """One that reads for itself what the model reads, and keeps it in the row's `draft_state`."""

    model: Model

    def read(self, row: "Sequence", end: int) -> None:
        """Read the row's prompt up to its token `end`."""

    def remember(self, row: "Sequence") -> None:
        """Keep what was read of a row for whoever goes on from it."""

    def forget(self) -> None:
        """Drop all that was kept."""

    def shed(self, nbytes: int) -> int:
        """Drop of what was kept until it takes no more than `nbytes`; returns what it takes then."""


@dataclass(eq=False, slots=True)
class Sequence:
    """A prompt, and the answer to it as far as it is written.

    Attributes:
        ids: the prompt's tokens, behind those of `prompt_cache`, if there is one.
        key: one number a token for the prefix index; None where prefixes are neither looked up nor kept.
        media: images and videos of the prompt, in order.
        anchors: places of the prompt, ascending, at which states are kept for others.
        find_anchors: gives them, once it is known how many tokens need not be read.
        folder: where what was read before is looked up, and kept, beside memory.
        prefix_bytes: what may be held of it in memory from now on; None for as much as before.
        answer_from: from which place on what is kept belongs to the answer: another question need not repeat it.
        sampler, rules: what chooses the tokens.
        follower: turns them into text.
        max_tokens: most tokens to write.
        drafts: how many tokens to guess ahead, and how well that went.
        draft_model: guesses them in place of the model's own MTP layer.
        lookup: copies them from the text, wherever its end stood there before.
        vocabulary: which tokens drafts are chosen from; None for all.
        prompt_cache: read before the prompt, and kept up to date.
        earlier: the tokens of `prompt_cache`.
        step_size: most tokens of the prompt to read at once.
        kv_bits: 8 or 4 packs keys and values; None leaves them in the model's dtype.
        progress: called with the tokens read and those of the whole prompt, in the computing thread.
        ended: set once the engine has let go of it.
        asked: what it was made of, for who makes the same elsewhere.
        on_item: called whenever something new is in `unread`, in the computing thread.
        state: what is remembered of the `read` tokens.
        mark: of the model's weights, as it began.
        fault: what went wrong in its own rules, functions and text.
        draft_state: what the draft model remembers.
    """

    ids: list[int]
    sampler: TokenSampler
    rules: Rules
    follower: Follower
    max_tokens: int
    drafts: Drafts
    draft_model: "ReadingDrafter | None" = None
    lookup: Lookup | None = None
    vocabulary: DraftVocabulary | None = None
    key: np.ndarray | None = None
    media: Listed[Medium] = ()
    anchors: Listed[int] = ()
    find_anchors: Callable[[int], Listed[int]] | None = None
    folder: "PrefixFiles | None" = None
    prefix_bytes: int | None = None
    answer_from: int = 0
    prompt_cache: HybridCache | None = None
    earlier: Listed[int] = ()
    step_size: int = 2048
    kv_bits: int | None = None
    progress: "Progress | None" = None
    asked: object = None
    on_item: Callable[[], None] | None = None
    state: State | None = None
    mark: object = None
    fault: Exception | None = None
    draft_state: State | None = None
    read: int = 0
    pieces: int = 0
    cached: int = 0
    drafted_from: tuple[int, float, Part | None] | None = None
    embedded: Embedded | None = None
    embedded_from: int = 0
    history: History | None = None
    pending: Choice | None = None
    written: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    failed: bool = False
    cancelled: bool = False
    ended: Event = field(default_factory=Event)
    unread: SimpleQueue[Emission | BaseException | None] = field(default_factory=SimpleQueue)
    number: int = field(default_factory=lambda: next(_numbers))

    @property
    def is_one_by_one(self) -> bool:
        """Whether a token can be chosen only when all before it are known on the host."""
        return self.sampler.is_foreign or self.rules.constrain

    @property
    def waits_for_reader(self) -> bool:
        """Whether it has run as far ahead of its reader as it may."""
        return self.unread.qsize() >= MOST_UNREAD

    @property
    def failure(self) -> Exception | None:
        """Why it cannot go on; None as long as it can."""
        return self.fault or self.rules.failure

    @property
    def goes_on(self) -> bool:
        """Whether more is to be written."""
        return self.finish_reason is None and self.fault is None

    @contextmanager
    def own_fault(self) -> Iterator[None]:
        """What is raised in here ends this answer, and no other that shares its passes."""
        try:
            yield
        except Exception as error:
            self.fault = error

    @property
    def at_last_token(self) -> bool:
        """Whether the pending token is the last that may be written."""
        return len(self.written) + 1 >= self.max_tokens

    @property
    def length(self) -> int:
        """How many tokens its text has: earlier ones, the prompt, and what is written."""
        return len(self.earlier) + len(self.ids) + len(self.written)

    def text(self, start: int, end: int) -> list[int]:
        """The tokens from `start` to `end` of its text."""
        found: list[int] = []
        for part in (self.earlier, self.ids, self.written):
            found += part[max(start, 0) : max(end, 0)]
            start, end = start - len(part), end - len(part)
        return found

    def draft_part(self, head_share: float | None) -> Part | None:
        """The part of the vocabulary that its next drafts are chosen from; None for all of it.

        `head_share` is what the head takes of a guess's bytes; None where it cannot be divided.
        """
        if self.vocabulary is None or head_share is None:
            return None
        end = self.length - self.length % _ASKED_EVERY or self.length
        if self.drafted_from is None or self.drafted_from[:2] != (end, head_share):
            part = self.vocabulary.part(self.text(end - WINDOW, end), head_share)
            self.drafted_from = end, head_share, part
        return self.drafted_from[2]

    def draft_cost(self, head_share: float | None) -> float:
        """What one of its next drafts costs beside a decoded token."""
        if self.vocabulary is None or head_share is None:
            return DRAFT_COST
        return self.vocabulary.cost(self.draft_part(head_share), head_share)

    @property
    def to_read(self) -> list[int]:
        """What has to be read before the next token can be chosen: the prompt, and what was written before."""
        return self.ids + self.written if self.written else self.ids

    def begin_again(self) -> None:
        """Forget what is being computed, to read the prompt and what was written anew."""
        self.release()
        self.read = self.cached = self.pieces = 0
        self.fault = None
        if self.draft_model is not None:
            self.draft_model.forget()

    def release(self) -> None:
        """Hold nothing that was computed any more."""
        self.state = self.draft_state = self.embedded = self.history = self.pending = None

    def cut(self, tokens: int) -> int:
        """Where the next piece of the prompt ends: after so many tokens, or at an anchor before."""
        end = min(self.read + tokens, len(self.to_read))
        return min((anchor for anchor in self.anchors if self.read < anchor < end), default=end)

    def choose(self, logits: mx.array) -> Choice:
        """The token for `logits` [1, V], given all that was written; rules may replace it."""
        assert self.history is not None, "the prompt has been read"
        return self.replaced(self.sampler.choose(logits, self.history, self.rules.allowed()))

    def replaced(self, choice: Choice) -> Choice:
        """`choice`, or the token that a rule puts in its place."""
        forced = self.rules.forced()
        return choice if forced is None else choice.replaced_by(forced)

    def emit(self, token: int, choice: Choice, *, from_draft: bool) -> Emission:
        """Write one token more."""
        self.written.append(token)
        self.rules.saw(token)
        added = self.follower.push(token)
        self.finish_reason = self.follower.finish_reason
        if self.finish_reason is None and len(self.written) >= self.max_tokens:
            self.finish_reason = "length"
        thinking = self.rules.thinking
        spent, closed_by = (thinking.spent, thinking.closed_by) if thinking else (0, None)
        number = len(self.written)
        return Emission(token, choice, from_draft, added, self.finish_reason, number, spent, closed_by)

    def deliver(self, item: Emission | BaseException | None) -> None:
        """Hand the reader a token, an error, or the end (None)."""
        self.unread.put(item)
        if self.on_item is not None:
            self.on_item()
