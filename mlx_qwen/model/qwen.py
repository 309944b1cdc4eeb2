"""The whole model: embeddings, decoder layers, final norm and head, with the MTP layer beside them."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from metal_kernels.gated_delta import Tape as LayerTape
from mlx_qwen.checkpoint.mtp_reads import MTPReads
from mlx_qwen.checkpoint.slices import Span
from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import PromptError
from mlx_qwen.model.attention import KeyValues
from mlx_qwen.model.cache import HybridCache, make_cache
from mlx_qwen.model.chain import Chain
from mlx_qwen.model.collectives import SlicedEmbedding, SlicedHead
from mlx_qwen.model.decoder import DecoderLayer, Masks, Residual
from mlx_qwen.model.features import FeatureCache
from mlx_qwen.model.layers import AnyEmbedding, AnyLinear, RMSNorm
from mlx_qwen.model.mtp import MTP
from mlx_qwen.model.mtp_steps import MTPSteps
from mlx_qwen.model.multimodal import Embedded, Pixels, merge_features, pixels_of, positions, token_kinds
from mlx_qwen.model.partial_head import Part
from mlx_qwen.model.pipeline import Stages
from mlx_qwen.model.replay import MOST_REPLAYED_TOKENS, ReplayedHead, ReplayedRollBack, ReplayedStep, can_compile
from mlx_qwen.model.rope import Positions
from mlx_qwen.model.sharding import Share
from mlx_qwen.model.state import MOST_TAPED_TOKENS, LinearState, RollBack, State, Tape, rolled_back
from mlx_qwen.model.vision import VisionTower

NO_VISION = (
    "This checkpoint has no vision tower, so that it cannot see images or videos. Use a checkpoint that was converted "
    "with its vision weights, or describe the image in words."
)


class Stepped(NamedTuple):
    """What a step leaves: hidden states fp32 [B, T, hidden_size], the state after it, and its tape if one was asked."""

    hidden: mx.array
    state: State
    tape: Tape | None


class Model(MTPSteps):
    """A Qwen3.5, Qwen3.6, Qwen3.8 or Qwen3-Next model.

    `mtp` is None when the checkpoint has no MTP layer, `vision` when it has no vision tower. Decoding replays graphs
    whose constants the weights are. A change by `update` (as `load_weights` does) has them traced anew at once, any
    other that replaces arrays or modules with the next prompt.

    `mtp_reads` says which states the MTP layer was trained on: "normed", behind the final norm, or "residual", before
    it. While nobody knows, it is "normed", and `mtp_unsettled` the checkpoint's identity: see `settle_mtp_reads`.

    With a `group` of several ranks each of them holds its `share`, and calls the model as all others do, with the same
    tokens: hidden states and logits are whole on every rank, states hold the keys, values and heads of its share. With
    `layers` its share are these decoder layers instead, and each rank sends what they give to the next.
    """

    _features: FeatureCache | None

    def __init__(
        self,
        config: ModelConfig,
        *,
        with_mtp: bool = True,
        with_vision: bool = False,
        group: mx.distributed.Group | None = None,
        layers: Span | None = None,
    ) -> None:
        super().__init__()
        text = config.text
        self.config, self.group = config, group
        self.share = Share(text) if group is None else Share(text, group.rank(), group.size(), layers)
        self.stages = None if layers is None or group is None or group.size() == 1 else Stages(group)
        apart = group if self.share.count > 1 and self.stages is None else None
        self.embed_tokens: AnyEmbedding | SlicedEmbedding = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = [
            DecoderLayer(self.share.text, linear=kind == "linear_attention", sparse=sparse, group=apart)
            for kind, sparse in zip(self.share.text.layer_types, self.share.text.sparse_layers, strict=True)
        ]
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.lm_head: AnyLinear | SlicedHead | None = None
        if not text.tie_word_embeddings:
            self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.engine: object | None = None
        self.led = False
        self._forget()
        self.mtp = MTP(text) if with_mtp and text.mtp_num_hidden_layers else None
        self.mtp_reads: MTPReads = "normed"
        self.mtp_unsettled: str | None = None
        self.vision = VisionTower(config.vision) if with_vision and config.vision is not None else None

    def __call__(
        self,
        input_ids: mx.array,
        cache: HybridCache | None = None,
        *,
        mask: mx.array | None = None,
        pixel_values: mx.array | None = None,
        image_grid_thw: mx.array | None = None,
        pixel_values_videos: mx.array | None = None,
        video_grid_thw: mx.array | None = None,
    ) -> mx.array:
        """Logits [B, T, vocab_size] in the model's dtype; arguments as in `hidden_states` and `embed`.

        Raises PromptError on rank 0 where the other ranks follow its engine: they would not take part.
        """
        if self.led:
            raise PromptError(
                "The other ranks take part in generate, batch_generate, stream_generate and Conversation, not in a "
                "call of the model. Use those, or load the model without group."
            )
        cache = self.make_cache() if cache is None else cache
        pixels = pixels_of(pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
        embedded = self.embed(input_ids, pixels, cache, mask=mask) if pixels else None
        return self.logits(self.hidden_states(input_ids, cache, mask=mask, embedded=embedded))

    def embed(
        self, input_ids: mx.array, pixels: Sequence[Pixels], cache: HybridCache | State, *, mask: mx.array | None = None
    ) -> Embedded:
        """Run the vision tower and give every token its embedding and its place after those in `cache`.

        Args:
            input_ids: int [B, T], with as many placeholders as the pixels become features.
            pixels: images and videos, in the order of their placeholders, row after row.
            cache: cache or state as it is before these tokens; not changed.
            mask: as in `hidden_states`.

        Raises:
            PromptError: the checkpoint has no vision tower, or placeholders and pixels do not match.
        """
        if self.vision is None:
            raise PromptError(NO_VISION)
        kinds = token_kinds(np.array(input_ids), self.config)
        if self._features is None:
            self._features = FeatureCache(self.vision)
        merge = self.vision.config.spatial_merge_size
        embeddings, grids = merge_features(self.embed_tokens(input_ids), kinds, pixels, self._features, merge)
        real = None if mask is None else np.array(mask.astype(mx.bool_))
        state = cache.state if isinstance(cache, HybridCache) else cache
        return Embedded(embeddings, positions(kinds, grids, merge, np.array(state.positions()), real))

    def hidden_states(
        self,
        input_ids: mx.array,
        cache: HybridCache | None = None,
        *,
        mask: mx.array | None = None,
        embedded: Embedded | None = None,
    ) -> mx.array:
        """Hidden states before the final norm, fp32 [B, T, hidden_size]; `cache` is updated in place.

        Args:
            input_ids: int [B, T], the tokens after those that `cache` has seen.
            cache: from `make_cache`; None reads the tokens as a whole sequence.
            mask: bool [B, T], False for left padding (before a row's first token only); None when there is none. The
                cache remembers it for later calls.
            embedded: from `embed`, of the same tokens where they hold images or videos.

        Raises:
            ValueError: `input_ids` is not [B, T] with at least one token.
        """
        cache = self.make_cache() if cache is None else cache
        stepped = self.step(input_ids, cache.state, mask=mask, embedded=embedded)
        cache.state = stepped.state
        return stepped.hidden

    def step(
        self,
        input_ids: mx.array,
        state: State,
        *,
        mask: mx.array | None = None,
        embedded: Embedded | None = None,
        tape: bool = False,
        last: bool = False,
        room: int = 0,
    ) -> Stepped:
        """Read the next tokens: hidden states, and the state after them. `state` stays what it is.

        Arguments and errors as of `hidden_states`, and:

        Args:
            state: what the sequences remember; `empty_state` before the first token.
            tape: record what taking tokens back needs, for up to 8 tokens after at least one.
            last: compute the last layer for the last token alone, `hidden` [B, 1, hidden_size]; not with `tape`, nor
                where the state fills the MTP layer's keys and values, which all of `hidden` enters.
            room: for how many tokens in all keys and values are made room.
        """
        if input_ids.ndim != 2 or input_ids.size == 0:
            raise ValueError(f"input_ids has shape {input_ids.shape}, expected [B, T] with at least one token a row")
        T = input_ids.shape[1]
        if tape and (T > MOST_TAPED_TOKENS or not state.offset):
            raise ValueError(f"a step of {T} tokens cannot be taped: expected 1 to {MOST_TAPED_TOKENS}, after a prompt")
        mask = None if mask is None else mask.astype(mx.bool_)
        state = state if mask is None else state.padded(mask)
        masks = _masks(state, mask, T)
        if not state.offset:
            self.notice_changes()
        chains = tuple(chain.grown(T, room) for chain in state.chains)
        roll_back: RollBack = rolled_back
        if self._can_replay(T, state, masks, embedded):
            replays = self._replays()
            replays.step = replays.step or ReplayedStep(self.embed_tokens, self.layers)
            roll_back = replays.roll_back = replays.roll_back or ReplayedRollBack()
            hidden, linear, tapes = replays.step(input_ids, state, chains, masks and masks.attention, tape=tape)
        else:
            alone = last and not state.mtp and self.config.text.layer_types[-1] == "full_attention"
            hidden, linear, tapes = self._layers(input_ids, state, chains, masks, embedded, tape=tape, alone=alone)
        delta = state.rope_delta if embedded is None else embedded.rope_delta(state.offset + T)
        mtp = self._filled(hidden, input_ids, state, embedded) if state.mtp else ()
        end = hidden if hidden.shape[1] == 1 else mx.contiguous(hidden[:, -1:])
        after = State(chains, linear, delta, state.padding, end, mtp)
        return Stepped(hidden, after, Tape(state, after, tapes, hidden, roll_back) if tape else None)

    def _layers(
        self,
        input_ids: mx.array,
        state: State,
        chains: Sequence[Chain],
        masks: Masks | None,
        embedded: Embedded | None,
        *,
        tape: bool,
        alone: bool,
    ) -> tuple[mx.array, tuple[LinearState, ...], tuple[LayerTape, ...]]:
        """The decoder layer by layer; with `alone` the last one for the last token only."""
        place = Positions(state.positions(), None if embedded is None else mx.array(embedded.axes))
        residual = Residual(self.embed_tokens(input_ids) if embedded is None else embedded.embeddings)
        is_last = self.stages is None or self.stages.is_last
        if self.stages is not None and not self.stages.is_first:
            entering = self.stages.entering(residual.stream)
            residual = Residual(entering, mx.zeros(entering.shape, self.dtype))
        linear: list[LinearState] = []
        tapes: list[LayerTape] = []
        for index, layer in enumerate(self.layers):
            memory = KeyValues(chains, index - len(linear))
            if layer.is_linear:
                held = state.linear[len(linear)] if state.linear else None
                residual, mixed = layer.mix(residual, held, masks, tape=tape)
                linear.append(mixed.memory)
                tapes += [mixed.tape] if mixed.tape else []
            elif alone and is_last and index == len(self.layers) - 1:
                residual = layer.last(residual, place, memory, masks)
            else:
                residual = layer(residual, place, memory, masks)
        hidden = residual.sum()
        if self.stages is not None:
            B, T, width = hidden.shape
            hidden = self.stages.leaving(hidden, (B, 1 if alone else T, width))
        return hidden, tuple(linear), tuple(tapes)

    def _can_replay(self, T: int, state: State, masks: Masks | None, embedded: Embedded | None) -> bool:
        """Whether a replayed graph does the step: a few tokens of text after others, none of them padding."""
        padding = (masks is not None and masks.real is not None) or self.stages is not None
        return T <= MOST_REPLAYED_TOKENS and state.offset > 0 and not padding and embedded is None and can_compile()

    def logits(self, hidden: mx.array, part: Part | None = None) -> mx.array:
        """Final norm and head: fp32 [B, T, hidden_size] to [B, T, vocab_size] in the model's dtype.

        With a `part` of the vocabulary, which no ranks may divide, [B, T, part.size].
        """
        whole = part is None and self.stages is None
        if not whole or hidden.shape[1] > MOST_REPLAYED_TOKENS or not can_compile():
            return self._head(self.norm(hidden, self.dtype), part)
        replays = self._replays()
        replays.head = replays.head or ReplayedHead(self.norm, self._output, self.dtype)
        return replays.head(hidden)

    def _forget(self) -> None:
        super()._forget()
        self._current, self._partial_head, self._dtype, self._features = None, None, None, None

    def make_cache(self, *, kv_bits: int | None = None, kv_group_size: int | None = None) -> HybridCache:
        """An empty cache; `kv_bits` 4 or 8 packs the attention layers' keys and values."""
        cache = make_cache(self.config.text, kv_bits=kv_bits, kv_group_size=kv_group_size)
        cache.identity = self.identity
        return cache


def _masks(state: State, mask: mx.array | None, T: int) -> Masks | None:
    if state.padding is None:
        return None
    seen = mx.arange(state.offset + T)
    new = seen[state.offset :]
    padding = state.padding[:, None]
    causal = seen[None] <= new[:, None]
    # A padding row attends to itself, so that its softmax has something to sum.
    own = seen[None] == new[:, None]
    return Masks(mask, ((causal[None] & (seen >= padding)[:, None]) | own[None])[:, None])
