"""The half of a model that its MTP layer is: filling the layer's keys and values, and steps that draft."""

import mlx.core as mx
import numpy as np

from mlx_qwen.checkpoint.mtp_reads import MTPReads
from mlx_qwen.config import ModelConfig
from mlx_qwen.model.attention import KeyValues
from mlx_qwen.model.chain import Chain
from mlx_qwen.model.changes import ChangingWeights
from mlx_qwen.model.collectives import SlicedEmbedding, SlicedHead
from mlx_qwen.model.layers import AnyEmbedding, AnyLinear, RMSNorm
from mlx_qwen.model.mtp import MTP, Draft
from mlx_qwen.model.multimodal import Embedded
from mlx_qwen.model.partial_head import Part, PartialHead
from mlx_qwen.model.pipeline import Stages
from mlx_qwen.model.replay import (
    MOST_REPLAYED_TOKENS,
    Embed,
    ReplayedDraft,
    ReplayedFill,
    Replays,
    can_compile,
    made_with,
)
from mlx_qwen.model.rope import Positions
from mlx_qwen.model.state import State


class MTPSteps(ChangingWeights):
    """What a model does with its MTP layer, which shares the model's embeddings, final norm and head.

    `mtp` is None when the checkpoint has no such layer.
    """

    embed_tokens: AnyEmbedding | SlicedEmbedding
    norm: RMSNorm
    lm_head: AnyLinear | SlicedHead | None
    mtp: MTP | None
    config: ModelConfig
    stages: Stages | None
    mtp_reads: MTPReads
    _current: Replays | None
    _partial_head: PartialHead | None
    _dtype: mx.Dtype | None

    @property
    def dtype(self) -> mx.Dtype:
        """Of embeddings, activations between the norms, and logits."""
        if self._dtype is None:
            held = self.embed_tokens
            self._dtype = (held.rows if isinstance(held, SlicedEmbedding) else held)(mx.array([0])).dtype
        return self._dtype

    def mtp_logits(
        self, hidden: mx.array, next_ids: mx.array, memory: State | None = None, *, embedded: Embedded | None = None
    ) -> mx.array:
        """The logits of `mtp_step`, [B, T, vocab_size]; arguments and errors as there."""
        return self.mtp_step(hidden, next_ids, memory, embedded=embedded).logits

    def mtp_step(
        self,
        hidden: mx.array,
        next_ids: mx.array,
        memory: State | None = None,
        *,
        chained: bool = False,
        embedded: Embedded | None = None,
        part: Part | None = None,
    ) -> Draft:
        """The MTP layer's drafts of the tokens after `next_ids`, and what the next step of the chain reads.

            draft = model.mtp_step(hidden, ids, memory)
            draft = model.mtp_step(draft.normed, mx.argmax(draft.logits, axis=-1), draft.memory, chained=True)

        Args:
            hidden: fp32 [B, T, hidden_size], from `hidden_states`; with `chained` the last step's `normed`.
            next_ids: int [B, T], the token that follows each of them.
            memory: the MTP layer's own keys and values, from `mtp_memory`; None for whole sequences.
            chained: whether `hidden` comes from the step before.
            embedded: from `embed`, of the tokens that `hidden` belongs to where they hold images or videos; the last of
                `next_ids` is text then.
            part: of the vocabulary, whose logits alone are computed; None for all, as where ranks divide the head.

        Raises:
            ValueError: the model has no MTP layer.
        """
        mtp = self._mtp()
        memory = self.mtp_memory() if memory is None else memory
        T = next_ids.shape[1]
        chains = tuple(chain.grown(T) for chain in memory.chains)
        if embedded is None and T <= MOST_REPLAYED_TOKENS and self.stages is None and can_compile():
            replays = self._replays()
            replays.draft = replays.draft or ReplayedDraft(self.embed_tokens, self.norm, mtp, self.mtp_reads)
            normed = replays.draft(hidden, next_ids, memory.positions(), chains, chained=chained)
            return Draft(self._head(normed, part), normed, State(chains, rope_delta=memory.rope_delta))
        embeddings, axes, delta = self.embed_tokens(next_ids), None, memory.rope_delta
        if embedded is not None:
            embeddings = mx.concatenate([embedded.embeddings[:, 1:], embeddings[:, -1:]], axis=1)
            axes, delta = mx.array(embedded.axes), embedded.rope_delta(memory.offset + T)
        states = hidden if chained else self._mtp_states(hidden)
        normed = mtp(states, embeddings, Positions(memory.positions(), axes), KeyValues(chains, 0))
        return Draft(self._head(normed, part), normed, State(chains, rope_delta=delta))

    def mtp_memory(self, state: State | None = None) -> State:
        """What the MTP layer remembers of the sequences of `state`, or of none."""
        if state is None or not state.mtp:
            return State((Chain.empty(1),))
        return State(state.mtp, rope_delta=state.rope_delta)

    def _mtp(self) -> MTP:
        if self.mtp is None:
            raise ValueError("this model has no MTP layer; convert it again from a source that has mtp.* tensors")
        return self.mtp

    def _mtp_states(self, hidden: mx.array) -> mx.array:
        return self.norm(hidden, self.dtype) if self.mtp_reads == "normed" else hidden

    def _filled(
        self, hidden: mx.array, input_ids: mx.array, state: State, embedded: Embedded | None
    ) -> tuple[Chain, ...]:
        """The MTP layer's keys and values of all tokens but the last, each made of a state and the token after it."""
        if embedded is None and state.last is not None and hidden.shape[1] <= MOST_REPLAYED_TOKENS and can_compile():
            replays = self._replays()
            replays.fill = replays.fill or ReplayedFill(self.embed_tokens, self.norm, self._mtp(), self.mtp_reads)
            kv = replays.fill(state.last, hidden, input_ids, state.positions())
        elif state.last is None and hidden.shape[1] == 1:
            return state.mtp
        else:
            kv = self._pairs(hidden, input_ids, state, embedded)
        chains = tuple(chain.grown(kv.shape[3]) for chain in state.mtp)
        for i, chain in enumerate(chains):
            chain.write(0, kv if len(chains) == 1 else kv[:, i : i + 1])
        return chains

    def _pairs(self, hidden: mx.array, input_ids: mx.array, state: State, embedded: Embedded | None) -> mx.array:
        embeddings = self.embed_tokens(input_ids) if embedded is None else embedded.embeddings
        axes = None if embedded is None else embedded.axes[:, :, :-1]
        if state.last is None:
            states, embeddings, offset = hidden[:, :-1], embeddings[:, 1:], mx.array(0)
        else:
            states, offset = mx.concatenate([state.last, hidden[:, :-1]], axis=1), state.positions() - 1
            if embedded is not None and axes is not None:
                before = embedded.before
                if before is None:
                    before = np.broadcast_to(np.array(offset).reshape(1, -1, 1), (3, axes.shape[1], 1))
                axes = np.concatenate([before, axes], axis=-1)
        place = Positions(offset, None if axes is None else mx.array(axes))
        return self._mtp().keys_and_values(self._mtp_states(states), embeddings, place)

    def _replays(self) -> Replays:
        """The replayed graphs that go with the weights and the kernels as they are now."""
        made = (*made_with(), self.mtp_reads)
        if self._current is None or self._current.made_with != made:
            # What is traced while it lies on the disk would be read for the graph alone, and held twice.
            mx.eval(self._waiting(vision=False))
            self._current = Replays(made)
        return self._current

    @property
    def _output(self) -> Embed:
        head: Embed = self.embed_tokens.as_linear if self.lm_head is None else self.lm_head
        return head

    def _head(self, normed: mx.array, part: Part | None = None) -> mx.array:
        held = self.embed_tokens if self.lm_head is None else self.lm_head
        if part is not None:
            assert not isinstance(held, SlicedEmbedding | SlicedHead) and self.stages is None, "the head is whole here"
            if self._partial_head is None or not self._partial_head.holds(held):
                self._partial_head = PartialHead(held)
            return self._partial_head(normed, part)
        if self.stages is not None:
            return self.stages.from_last(normed, self._output, self.config.text.vocab_size)
        return self._output(normed)
