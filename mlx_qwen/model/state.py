"""What sequences remember, as values: a step takes a state and returns the next one, and the one of before stays true.

The linear layers' memory has a fixed size, and each step makes it anew; keys and values only grow, in chains.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import mlx.core as mx

from metal_kernels.gated_delta import Tape as LayerTape
from metal_kernels.gated_delta import roll_back
from mlx_qwen.config import TextConfig
from mlx_qwen.model.chain import Chain, Packing

MOST_TAPED_TOKENS = 8


class LinearState(NamedTuple):
    """The fixed-size memory of one Gated DeltaNet layer.

    `conv_state` [B, W - 1, C] are the last inputs of the convolution, `state` fp32 [B, Hv, Dv, Dk] is the memory.
    """

    conv_state: mx.array
    state: mx.array


class StateKind(NamedTuple):
    """What states must have in common for one to go on where another would.

    `packing` is that of keys and values, `mtp` whether those of the MTP layer are there.
    """

    packing: Packing | None = None
    mtp: bool = False

    def serves(self, wanted: "StateKind") -> bool:
        """Whether a state of this kind may be used where one of the `wanted` kind is asked for."""
        return self.packing == wanted.packing and (self.mtp or not wanted.mtp)


@dataclass(frozen=True, slots=True)
class State:
    """What B sequences remember.

    Attributes:
        chains: keys and values: one chain a sequence, or a single one that all share.
        linear: one entry a Gated DeltaNet layer; none before the first token.
        rope_delta: how far each sequence's next position is ahead of its count of tokens; None before the first image,
            which takes fewer positions than tokens.
        padding: int [B], how many of the tokens were left padding; None when none were.
        last: fp32 [B, 1, hidden], what the last layer left for the last token, before the final norm.
        mtp: the MTP layer's keys and values, each chain a token shorter than its sequence; none where nobody drafts.
    """

    chains: tuple[Chain, ...]
    linear: tuple[LinearState, ...] = ()
    rope_delta: tuple[int, ...] | None = None
    padding: mx.array | None = None
    last: mx.array | None = None
    mtp: tuple[Chain, ...] = ()

    @property
    def offset(self) -> int:
        """How many tokens the first sequence has seen, padding included."""
        return self.chains[0].length

    @property
    def kind(self) -> StateKind:
        """How its keys and values are held."""
        return StateKind(self.chains[0].packing, bool(self.mtp))

    def positions(self) -> mx.array:
        """The position of the next token: int [], or [B] where the sequences' own may differ."""
        if len(self.chains) == 1 and self.rope_delta is None:
            return mx.array(self.offset)
        deltas = self.rope_delta or (0,) * len(self.chains)
        lengths = [chain.length for chain in self.chains] if len(self.chains) > 1 else [self.offset] * len(deltas)
        return mx.array([length + delta for length, delta in zip(lengths, deltas, strict=True)])

    def row(self, index: int) -> "State":
        """One of the sequences, which must have a chain of its own, in arrays of its own."""
        if len(self.chains) == 1:
            return self
        linear = tuple(LinearState(*(mx.contiguous(x[index : index + 1]) for x in entry)) for entry in self.linear)
        delta = None if self.rope_delta is None else self.rope_delta[index : index + 1]
        last = None if self.last is None else mx.contiguous(self.last[index : index + 1])
        return State(self.chains[index : index + 1], linear, delta, None, last, self.mtp[index : index + 1])

    @classmethod
    def joined(cls, states: Sequence["State"]) -> "State":
        """The sequences of all states, each with at least one token and without padding, as one batch.

        Where one of them lacks the MTP layer's keys and values, the batch has none.
        """
        if len(states) == 1:
            return states[0]
        linear = tuple(
            LinearState(*(mx.concatenate(list(parts)) for parts in zip(*entries, strict=True)))
            for entries in zip(*(state.linear for state in states), strict=True)
        )
        deltas = [state.rope_delta or (0,) * len(state.chains) for state in states]
        has_media = any(state.rope_delta is not None for state in states)
        return cls(
            tuple(chain for state in states for chain in state.chains),
            linear,
            tuple(delta for row in deltas for delta in row) if has_media else None,
            None,
            mx.concatenate([state.last for state in states if state.last is not None]),
            tuple(chain for state in states for chain in state.mtp) if all(state.mtp for state in states) else (),
        )

    def padded(self, mask: mx.array) -> "State":
        """The state once it is known how many tokens of `mask` [B, T] (False = padding) are left padding."""
        padding = (~mask).sum(axis=-1)
        return replace(self, padding=padding if self.padding is None else self.padding + padding)

    def mapped(self, change: Callable[[mx.array], mx.array]) -> "State":
        """The state with each of its arrays replaced by what `change` makes of it, of the same shape."""
        return State(
            tuple(chain.mapped(change) for chain in self.chains),
            tuple(LinearState(*map(change, entry)) for entry in self.linear),
            self.rope_delta,
            self.padding,
            None if self.last is None else change(self.last),
            tuple(chain.mapped(change) for chain in self.mtp),
        )

    def arrays(self) -> list[mx.array]:
        """Every array, for `mx.eval`."""
        held = [part for chain in (*self.chains, *self.mtp) for part in chain.buffers()]
        held += [part for entry in self.linear for part in entry]
        return held if self.last is None else [*held, self.last]

    @property
    def linear_nbytes(self) -> int:
        """Bytes of what does not grow: what holding this state costs beside its keys and values."""
        last = 0 if self.last is None else self.last.nbytes
        return last + sum(part.nbytes for entry in self.linear for part in entry)

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays hold now, of keys and values the whole buffers."""
        return sum(array.nbytes for array in self.arrays())


RollBack = Callable[[Sequence[LayerTape], Sequence[int], Sequence[LinearState]], tuple[LinearState, ...]]


def rolled_back(
    tapes: Sequence[LayerTape], kept: Sequence[int], before: Sequence[LinearState]
) -> tuple[LinearState, ...]:
    """The linear layers' memory after the first `kept[i]` tokens of a taped step in sequence i."""
    counts = kept[0] if len(set(kept)) == 1 else mx.array(list(kept))
    return tuple(LinearState(*roll_back(tape, counts, *entry)) for tape, entry in zip(tapes, before, strict=True))


@dataclass(frozen=True, slots=True)
class Tape:
    """A step of up to 8 tokens that can be taken back in part: the states around it, and what each linear layer did.

    `hidden` fp32 [B, T, hidden] is what the last layer left for each of the tokens; `roll_back` does what `rolled_back`
    does.
    """

    before: State
    after: State
    layers: tuple[LayerTape, ...]
    hidden: mx.array
    roll_back: RollBack = rolled_back

    def keep(self, kept: Sequence[int]) -> State:
        """The state after the first `kept[i]` tokens of the step in sequence i, 0 to all of them.

        It differs from that of a step with only the kept tokens by less than 2e-6 of the largest value.
        """
        step = self.hidden.shape[1]
        if all(count == step for count in kept):
            return self.after
        linear = self.roll_back(self.layers, kept, self.before.linear)
        chains, mtp = (
            tuple(chain.cut(chain.length - step + count) for chain, count in zip(grown, kept, strict=bool(grown)))
            for grown in (self.after.chains, self.after.mtp)
        )
        assert self.before.last is not None, "a taped step comes after at least one token"
        rows = [
            self.hidden[i : i + 1, count - 1 : count] if count else self.before.last[i : i + 1]
            for i, count in enumerate(kept)
        ]
        last = rows[0] if len(rows) == 1 else mx.concatenate(rows)
        return State(chains, linear, self.before.rope_delta, None, last, mtp)


def empty_state(text: TextConfig, packing: Packing | None = None, *, mtp: bool = False) -> State:
    """The state of one sequence before the first token; with `mtp` its steps fill the MTP layer's keys and values."""
    chain = Chain.empty(text.layer_types.count("full_attention"), packing)
    return State((chain,), mtp=(Chain.empty(1, packing),) if mtp else ())


def state_nbytes(text: TextConfig, tokens: int, *, item_size: int = 2) -> int:
    """Bytes of the unpacked state of one sequence of `tokens` tokens; `item_size` is that of keys and values."""
    linear = text.layer_types.count("linear_attention")
    state = 4 * prod((text.linear_num_value_heads, text.linear_value_head_dim, text.linear_key_head_dim))
    conv = item_size * (text.linear_conv_kernel_dim - 1) * text.linear_conv_dim
    return token_nbytes(text, item_size=item_size) * tokens + linear * (state + conv)


def token_nbytes(text: TextConfig, packing: Packing | None = None, *, item_size: int = 2, beside: int = 0) -> int:
    """Bytes of the keys and values of a token, in the attention layers and in `beside` more of the same size."""
    layers = text.layer_types.count("full_attention") + beside
    values = 2 * text.num_key_value_heads * text.head_dim * layers
    if packing is None:
        return values * item_size
    return values * packing.bits // 8 + 2 * item_size * values // packing.group_size
