"""What was read before, found again by its tokens: states as checkpoints in a radix tree, within a budget of bytes.

A checkpoint is the fixed-size part of a state and a length of a chain: keys and values lie in the chain's buffers once,
however many checkpoints point into them. All calls come from the thread that owns the model.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import count
from typing import Literal, NamedTuple, TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_qwen.config import TextConfig
from mlx_qwen.engine.radix import Key, Node, RadixTree, forget
from mlx_qwen.model.chain import Chain
from mlx_qwen.model.state import State, StateKind, state_nbytes, token_nbytes

# A prompt's checkpoint, or one behind its last question: what an answer left, which the next prompt may not repeat.
Kind: TypeAlias = Literal["prompt", "answer"]


class Found(NamedTuple):
    """The state after the first `length` tokens of a key."""

    length: int
    state: State


class Counted(NamedTuple):
    """What ranks with unequal numbers of layers take states to hold, so that they count alike.

    It is a model of the sizes `text`, whose keys and values have items of `item_size` bytes; the MTP layer, which is
    whole on each rank, counts as what it is.
    """

    text: TextConfig
    item_size: int


@dataclass(slots=True)
class _Checkpoint:
    state: State
    kind: Kind
    used: int
    fixed_nbytes: int

    @property
    def chains(self) -> tuple[Chain, ...]:
        return (*self.state.chains, *self.state.mtp)


class PrefixIndex:
    """Checkpoints by the tokens that led to them; the least recently used are forgotten beyond `budget_bytes`.

    All states are of one model, each of one sequence, with its arrays evaluated. Those of each kind, packed or not,
    with or without the MTP layer's part, have a tree of their own; the budget is one for all.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.counted: Counted | None = None
        self._clock = count(1)
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._trees: dict[StateKind, RadixTree[_Checkpoint]] = {}

    def __len__(self) -> int:
        """How many checkpoints are held."""
        return len(self._checkpoints())

    @property
    def nbytes(self) -> int:
        """Bytes that are held: fixed-size parts, and each buffer once; of one in which others go on, the part held."""
        return self._nbytes(frozenset())

    def take(self, key: Key, kind: StateKind | None = None) -> Found | None:
        """The longest checkpoint whose tokens begin `key`, or are all of it; None where there is none.

        `kind` is what the state must serve for; None takes any.

        What an answer left behind it is dropped, unless a prompt's checkpoint lies there too: so the caller, who goes
        on in another way, takes the chain over instead of copying it.
        """
        ways = [tree.matched(key)[0] for held, tree in self._trees.items() if kind is None or held.serves(kind)]
        nodes = [node for way in ways for node in way if node.value is not None]
        longest = max(nodes, key=lambda node: node.length, default=None)
        if longest is None or longest.value is None:
            return None
        self._hand_over(longest, longest.value)
        longest.value.used = next(self._clock)
        return Found(longest.length, longest.value.state)

    def insert(self, key: Key, state: State, kind: Kind = "prompt") -> None:
        """Hold the state after all tokens of `key`; older ones go where the budget asks for it.

        One that is larger than the whole budget is not held. Raises ValueError where state and key do not match.
        """
        if len(state.chains) != 1 or state.padding is not None or not 0 < state.offset == len(key):
            raise ValueError(
                f"the state is of {len(state.chains)} sequences and {state.offset} tokens, expected one of {len(key)}"
            )
        new = _Checkpoint(state, kind, next(self._clock), self._fixed_nbytes(state))
        chains = sum(self._counted([chain], is_mtp=chain in state.mtp) for chain in new.chains)
        if new.fixed_nbytes + chains <= self.budget_bytes:
            node = self._trees.setdefault(state.kind, RadixTree()).placed(key)
            if node.value is not None and node.value.kind == "prompt":
                new.kind = "prompt"
            node.value = new
        self.shed(self.budget_bytes)

    def shed(self, nbytes: int, used: Iterable[Chain] = ()) -> None:
        """Forget until at most `nbytes` are held beside the buffers of the chains that others have in use.

        First go an answer's checkpoints that have a later one behind them, as the steps of a tool loop do; then all
        others. Each time the least recently used goes, and with the last one of a chain its keys and values.
        """
        others = frozenset(chain.place for chain in used)
        while self._nbytes(others) > nbytes and len(self):
            if not self._trim():
                forget(min(self._held(), key=lambda pair: (not _is_passed(*pair), pair[1].used))[0])

    def longest_common(self, key: Key) -> int:
        """How many of the first tokens of `key` some held key begins with, whether or not a checkpoint is there."""
        return max((tree.matched(key)[1] for tree in self._trees.values()), default=0)

    def _nbytes(self, others: frozenset[int]) -> int:
        checkpoints = self._checkpoints()
        mtp = {chain.place for each in checkpoints for chain in each.state.mtp}
        held = [
            self._counted(chains, is_mtp=buffer in mtp)
            for buffer, chains in self._by_buffer().items()
            if buffer not in others
        ]
        return sum(each.fixed_nbytes for each in checkpoints) + sum(held)

    def _counted(self, chains: list[Chain], *, is_mtp: bool) -> int:
        longest = _longest(chains)
        tokens = longest.length if longest.is_shared else longest.capacity
        if is_mtp or self.counted is None:
            return sum(part.nbytes // part.shape[-2] * tokens for part in longest.buffers())
        return token_nbytes(self.counted.text, longest.packing, item_size=self.counted.item_size) * tokens

    def _fixed_nbytes(self, state: State) -> int:
        if self.counted is None:
            return state.linear_nbytes
        last = 0 if state.last is None else state.last.nbytes
        return last + state_nbytes(self.counted.text, 0, item_size=self.counted.item_size)

    def _held(self) -> Iterator[tuple[Node[_Checkpoint], _Checkpoint]]:
        for tree in self._trees.values():
            yield from tree.root.below()

    def _checkpoints(self) -> list[_Checkpoint]:
        return [checkpoint for _, checkpoint in self._held()]

    def _hand_over(self, node: Node[_Checkpoint], taken: _Checkpoint) -> None:
        buffer = taken.state.chains[0].place
        longer = [pair for pair in node.below() if pair[1].state.chains[0].place == buffer]
        if all(checkpoint.kind == "answer" for _, checkpoint in longer):
            for each, _ in longer:
                forget(each)

    def _by_buffer(self) -> dict[int, list[Chain]]:
        """The chains that are held in each buffer."""
        chains: dict[int, list[Chain]] = {}
        for checkpoint in self._checkpoints():
            for chain in checkpoint.chains:
                chains.setdefault(chain.place, []).append(chain)
        return chains

    def _trim(self) -> bool:
        """Copy what is held of a buffer that is less than half used, and that nobody else goes on in."""
        for chains in self._by_buffer().values():
            longest = _longest(chains)
            if longest.capacity >= 2 * longest.length + 512 and not longest.is_shared:
                copy = _copied(longest)
                self._move({id(chain): copy.cut(chain.length) for chain in chains})
                return True
        return False

    def _move(self, moved: dict[int, Chain]) -> None:
        for each in self._checkpoints():
            chains, mtp = (
                tuple(moved.get(id(chain), chain) for chain in held) for held in (each.state.chains, each.state.mtp)
            )
            each.state = replace(each.state, chains=chains, mtp=mtp)


def prefix_key(ids: Sequence[int], media: Iterable[tuple[int, int, bytes]] = ()) -> npt.NDArray[np.int64]:
    """The key of a prompt: one number a token, int64 [N].

    It is the token's id, or, for the tokens of an image or video, below zero and made of its content, the place in it
    and the id. `media` are (start, length, digest of the content), a video's timestamps being part of its length.
    """
    key = np.array(ids, np.int64)
    for start, length, digest in media:
        first, step = np.frombuffer(blake2b(digest, digest_size=16).digest(), np.uint64)
        place = np.arange(length, dtype=np.uint64)
        mixed = (first + place * (step | np.uint64(1))) ^ key[start : start + length].astype(np.uint64)
        key[start : start + length] = -1 - (mixed >> np.uint64(1)).astype(np.int64)
    return key


def _is_passed(node: Node[_Checkpoint], checkpoint: _Checkpoint) -> bool:
    return checkpoint.kind == "answer" and any(later.kind == "answer" for _, later in node.below(first=True))


def _longest(chains: list[Chain]) -> Chain:
    return max(chains, key=lambda chain: chain.length)


def _copied(chain: Chain) -> Chain:
    """The chain in buffers of its own."""
    layers = len(chain.buffers()) // (3 if chain.packing else 1)
    copy = Chain.holding([chain.read(layer) for layer in range(layers)], chain.length, chain.packing)
    mx.eval(copy.buffers())
    return copy
