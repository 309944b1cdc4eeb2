"""How much memory answers may take: what a sequence needs, what there is, and how much of a prompt is read at once."""

from typing import NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_qwen.config import TextConfig
from mlx_qwen.engine.sequence import Sequence
from mlx_qwen.errors import PromptError
from mlx_qwen.model import Model
from mlx_qwen.model.cache import KV_BITS, kv_packing
from mlx_qwen.model.memory import prefill_bytes, usable_bytes
from mlx_qwen.model.state import state_nbytes, token_nbytes

_STEP = 256
_LEAST_PIECE = 32
# Of the memory that is left beside the weights, the part in which a piece of a prompt is read: an eighth.
_PIECE_SHARE = 8
# However large the weights are, answers get this part of the memory: a sixteenth.
_LEAST_SHARE = 16
# Of the room for what was read before, the part that a draft model's states get: a quarter.
DRAFT_SHARE = 4


class Budget(NamedTuple):
    """Bytes for the states of all answers together, and for what is alive while a piece of a prompt is read."""

    states: int
    piece: int


def budget_of(model: Model, draft_model: Model | None = None) -> Budget:
    """What this machine has for a model's answers: its usable memory less the weights, or a sixteenth of it."""
    usable = usable_bytes()
    weights = sum(_weight_bytes(each) for each in (model, draft_model) if each is not None)
    left = max(usable - weights, usable // _LEAST_SHARE)
    return Budget(left - left // _PIECE_SHARE, left // _PIECE_SHARE)


class MemoryPlan:
    """What a model's answers may take, and what each of them will; None takes what the machine has for it."""

    def __init__(self, model: Model, state_bytes: int | None = None, piece_bytes: int | None = None) -> None:
        self._model, self._text = model, model.share.text
        self._given, self._is_agreed = (state_bytes, piece_bytes), False
        self.make_room_beside(None)

    def agree(self, text: TextConfig, state_bytes: int, piece_bytes: int) -> None:
        """Plan as other ranks do, whatever is loaded beside: for the states of a model of the sizes `text`."""
        self._text, self._is_agreed = text, True
        self.state_bytes, self.piece_bytes = state_bytes, piece_bytes

    def make_room_beside(self, draft_model: Model | None) -> None:
        """Plan with what the weights of the model leave, and those of a draft model that is loaded beside it."""
        if self._is_agreed:
            return
        beside = None if draft_model is self._model else draft_model
        budget, (states, piece) = budget_of(self._model, beside), self._given
        self.state_bytes = budget.states if states is None else states
        self.piece_bytes = budget.piece if piece is None else piece

    def needs(self, sequence: Sequence) -> int:
        """Bytes of a sequence's state at its end."""
        return self._asked(sequence).needed()

    def check(self, sequence: Sequence) -> None:
        """Raises PromptError for an answer whose state can never fit."""
        check_room(self._asked(sequence), self.state_bytes)

    def piece(self, sequence: Sequence) -> int:
        """How many tokens of a prompt to read at once now."""
        assert sequence.state is not None, "it has begun"
        text, size, bits = self._text, self._model.dtype.size, sequence.kv_bits
        read = sequence.state.offset
        return piece_tokens(text, sequence.step_size, read, self.piece_bytes, item_size=size, kv_bits=bits)

    def _asked(self, sequence: Sequence) -> "Asked":
        seen = 0 if sequence.prompt_cache is None else sequence.prompt_cache.offset
        text, size = self._text, self._model.dtype.size
        prompt = seen + len(sequence.ids)
        whole = self._model.config.text
        mtp = 0 if self._model.mtp is None else whole.num_key_value_heads // text.num_key_value_heads
        draft = None
        if sequence.draft_model is not None:
            beside = sequence.draft_model.model
            draft = Asked(beside.share.text, prompt, sequence.max_tokens, beside.dtype.size)
        return Asked(text, prompt, sequence.max_tokens, size, sequence.kv_bits, mtp, draft)


def sequence_bytes(
    text: TextConfig, tokens: int, *, item_size: int = 2, kv_bits: int | None = None, mtp: int = 0
) -> int:
    """What the state of one sequence of `tokens` tokens takes; `item_size` is that of unpacked keys and values.

    Keys and values, packed to `kv_bits` if given, lie in buffers that grow by 256 tokens; those of the
    MTP layer take as much as `mtp` of the other layers'.
    """
    room = -(-tokens // _STEP) * _STEP
    kv = room * token_nbytes(text, kv_packing(text, kv_bits), item_size=item_size, beside=mtp)
    return kv + state_nbytes(text, 0, item_size=item_size) + 4 * text.hidden_size


def piece_tokens(
    text: TextConfig, wanted: int, read: int, most_bytes: int, *, item_size: int = 2, kv_bits: int | None = None
) -> int:
    """How many tokens to read at once behind `read`: `wanted`, or half as often as it takes to fit `most_bytes`."""
    tokens = wanted
    while tokens > _LEAST_PIECE:
        if prefill_bytes(text, tokens, read + tokens, kv_bits=kv_bits, item_size=item_size) <= most_bytes:
            break
        tokens = max(_LEAST_PIECE, tokens // 2)
    return tokens


class Asked(NamedTuple):
    """An answer that is asked for, in tokens, and how its state would be held; `draft` is that of its draft model."""

    text: TextConfig
    prompt: int
    answer: int
    item_size: int = 2
    kv_bits: int | None = None
    mtp: int = 0
    draft: "Asked | None" = None

    def needed(self, tokens: int | None = None) -> int:
        """Bytes of the state of so many tokens, or of all."""
        tokens = self.prompt + self.answer if tokens is None else tokens
        own = sequence_bytes(self.text, tokens, item_size=self.item_size, kv_bits=self.kv_bits, mtp=self.mtp)
        return own if self.draft is None else own + self.draft.needed(tokens)


def check_room(asked: Asked, most_bytes: int) -> None:
    """Raises PromptError for an answer whose state can never fit `most_bytes`."""
    if asked.needed() <= most_bytes:
        return
    fixed, prompt, answer = asked.needed(0), asked.prompt, asked.answer
    fits = max(0, most_bytes - fixed) // (asked.needed(_STEP) - fixed) * _STEP
    bits = [bits for bits in sorted(KV_BITS, reverse=True) if bits < (asked.kv_bits or 16)]
    packed = next((each for each in (asked._replace(kv_bits=b) for b in bits) if each.needed() <= most_bytes), None)
    advice = [] if packed is None else [f"use kv_bits={packed.kv_bits} ({_gib(packed.needed())})"]
    advice += [f"lower max_tokens to {fits - prompt:,}" if fits > prompt else "shorten the prompt"]
    raise PromptError(
        f"The state of {prompt + answer:,} tokens ({prompt:,} of the prompt, {answer:,} of max_tokens) takes "
        f"{_gib(asked.needed())}, but this machine has {_gib(most_bytes)} for it beside the weights, enough for "
        f"{fits:,} tokens: {', or '.join(advice)}."
    )


def _weight_bytes(model: Model) -> int:
    held: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    return sum(array.nbytes for _, array in held)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
