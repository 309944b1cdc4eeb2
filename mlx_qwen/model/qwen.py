"""The whole model: embeddings, decoder layers, final norm and head, with the MTP layer beside them."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from metal_kernels import backend
from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import PromptError
from mlx_qwen.model.decoder import DecoderLayer, Masks, Residual
from mlx_qwen.model.features import FeatureCache
from mlx_qwen.model.layers import AnyEmbedding, AnyLinear, RMSNorm
from mlx_qwen.model.mtp import MTP, Draft, MTPReads
from mlx_qwen.model.multimodal import Embedded, Pixels, merge_features, pixels_of, positions, token_kinds
from mlx_qwen.model.replay import DecodeStep, can_compile
from mlx_qwen.model.rope import Positions
from mlx_qwen.model.state import HybridCache, KVCache, make_cache
from mlx_qwen.model.vision import VisionTower

NO_VISION = (
    "This checkpoint has no vision tower, so that it cannot see images or videos. Use a checkpoint that was converted "
    "with its vision weights, or describe the image in words."
)


class Model(nn.Module):
    """A Qwen3.5, Qwen3.6, Qwen3.8 or Qwen3-Next model.

    `mtp` is None when the checkpoint has no MTP layer, `vision` when it has no vision tower. Decoding replays graphs
    whose constants the weights are: change weights by `update` (as `load_weights` does), which has them traced anew.
    """

    def __init__(self, config: ModelConfig, *, with_mtp: bool = True, with_vision: bool = False) -> None:
        super().__init__()
        text = config.text
        self.config = config
        self.embed_tokens: AnyEmbedding = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = [
            DecoderLayer(text, linear=kind == "linear_attention", sparse=sparse)
            for kind, sparse in zip(text.layer_types, text.sparse_layers, strict=True)
        ]
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.lm_head: AnyLinear | None = None
        if not text.tie_word_embeddings:
            self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self._step: DecodeStep | None = None
        self._dtype: mx.Dtype | None = None
        self._features: FeatureCache | None = None
        self.mtp = MTP(text) if with_mtp and text.mtp_num_hidden_layers else None
        self.mtp_reads: MTPReads = "normed"
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
        """Logits [B, T, vocab_size] in the model's dtype; arguments as in `hidden_states` and `embed`."""
        cache = self.make_cache() if cache is None else cache
        pixels = pixels_of(pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
        embedded = self.embed(input_ids, pixels, cache, mask=mask) if pixels else None
        return self.logits(self.hidden_states(input_ids, cache, mask=mask, embedded=embedded))

    def embed(
        self, input_ids: mx.array, pixels: Sequence[Pixels], cache: HybridCache, *, mask: mx.array | None = None
    ) -> Embedded:
        """Run the vision tower and give every token its embedding and its place after those in `cache`.

        Args:
            input_ids: int [B, T], with as many placeholders as the pixels become features.
            pixels: images and videos, in the order of their placeholders, row after row.
            cache: as it is before these tokens; not changed.
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
        return Embedded(embeddings, positions(kinds, grids, merge, cache, real))

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
        if input_ids.ndim != 2 or input_ids.size == 0:
            raise ValueError(f"input_ids has shape {input_ids.shape}, expected [B, T] with at least one token a row")
        cache = self.make_cache() if cache is None else cache
        T = input_ids.shape[1]
        if mask is not None:
            mask = mask.astype(mx.bool_)
            cache.note_padding(mask)
        masks = _masks(cache, mask, T)
        x = self._decode(input_ids, cache, masks) if T == 1 and embedded is None else None
        if x is None:
            axes = None if embedded is None else mx.array(embedded.axes)
            place = Positions(cache.next_position(), axes)
            residual = Residual(self.embed_tokens(input_ids) if embedded is None else embedded.embeddings)
            for layer, layer_cache in zip(self.layers, cache, strict=True):
                residual = layer(residual, place, layer_cache, masks)
            x = residual.sum()
        cache.offset += T
        if embedded is not None:
            cache.rope_delta = embedded.rope_delta(cache.offset)
        return x

    def _decode(self, input_ids: mx.array, cache: HybridCache, masks: Masks | None) -> mx.array | None:
        """The states of one token a sequence by a replayed graph, or None where that does not apply."""
        first_token = cache.offset == 0
        padding = masks is not None and masks.real is not None
        if first_token or padding or cache.recording or not can_compile():
            return None
        if self._step is None or self._step.backend is not backend():
            self._step = DecodeStep(self.embed_tokens, self.layers)
        return self._step(input_ids, cache, masks and masks.attention)

    def logits(self, hidden: mx.array) -> mx.array:
        """Final norm and head: fp32 [B, T, hidden_size] to [B, T, vocab_size] in the model's dtype."""
        return self._head(self.norm(hidden, self.dtype))

    def update(self, parameters: dict[str, Any], strict: bool = True) -> "Model":  # type: ignore[override]
        """Replace the given parameters, as `mlx.nn.Module.update` does."""
        self._step, self._dtype, self._features = None, None, None
        super().update(parameters, strict)
        return self

    @property
    def dtype(self) -> mx.Dtype:
        """Of embeddings, activations between the norms, and logits."""
        if self._dtype is None:
            self._dtype = self.embed_tokens(mx.array([0])).dtype
        return self._dtype

    def mtp_logits(
        self,
        hidden: mx.array,
        next_ids: mx.array,
        cache: KVCache | None = None,
        *,
        rope_delta: mx.array | None = None,
        embedded: Embedded | None = None,
    ) -> mx.array:
        """The logits of `mtp_step`, [B, T, vocab_size]; arguments and errors as there."""
        return self.mtp_step(hidden, next_ids, cache, rope_delta=rope_delta, embedded=embedded).logits

    def mtp_step(
        self,
        hidden: mx.array,
        next_ids: mx.array,
        cache: KVCache | None = None,
        *,
        chained: bool = False,
        rope_delta: mx.array | None = None,
        embedded: Embedded | None = None,
    ) -> Draft:
        """The MTP layer's drafts of the tokens after `next_ids`, and what the next step of the chain reads.

            draft = model.mtp_step(hidden, ids, cache)
            draft = model.mtp_step(draft.normed, mx.argmax(draft.logits, axis=-1), cache, chained=True)

        Args:
            hidden: fp32 [B, T, hidden_size], from `hidden_states`; with `chained` the last step's `normed`.
            next_ids: int [B, T], the token that follows each of them.
            cache: keys and values of the MTP layer alone, to which those of this step are appended: `trim` them once
                the true states are known, and `mtp_fill` those.
            chained: whether `hidden` comes from the step before.
            rope_delta: int [B], that of the model's cache once its tokens hold images or videos.
            embedded: from `embed`, of the tokens that `hidden` belongs to where they hold images or videos, and of one
                token more unless the last of `next_ids` is text.

        Raises:
            ValueError: the model has no MTP layer.
        """
        mtp = self._mtp()
        states = hidden if chained else self._mtp_states(hidden)
        normed = mtp(states, *self._mtp_inputs(next_ids, cache, rope_delta, embedded), cache)
        return Draft(self._head(normed), normed)

    def mtp_fill(
        self,
        hidden: mx.array,
        next_ids: mx.array,
        cache: KVCache,
        *,
        rope_delta: mx.array | None = None,
        embedded: Embedded | None = None,
    ) -> None:
        """Append the MTP layer's keys and values over a span to `cache`; computes no drafts, nor what only they need.

        Arguments and errors as of `mtp_step`, of first steps.
        """
        mtp = self._mtp()
        mtp.fill(self._mtp_states(hidden), *self._mtp_inputs(next_ids, cache, rope_delta, embedded), cache)

    def _mtp(self) -> MTP:
        if self.mtp is None:
            raise ValueError("this model has no MTP layer; convert it again from a source that has mtp.* tensors")
        return self.mtp

    def _mtp_states(self, hidden: mx.array) -> mx.array:
        return self.norm(hidden, self.dtype) if self.mtp_reads == "normed" else hidden

    def _mtp_inputs(
        self, next_ids: mx.array, cache: KVCache | None, rope_delta: mx.array | None, embedded: Embedded | None
    ) -> tuple[mx.array, Positions]:
        """Embeddings of the tokens that follow, and where those before them stand."""
        offset = mx.array(0 if cache is None else cache.offset)
        embeddings = self.embed_tokens(next_ids)
        if embedded is None:
            return embeddings, Positions(offset if rope_delta is None else offset + rope_delta)
        T = next_ids.shape[1]
        embeddings = mx.concatenate([embedded.embeddings[:, 1:], embeddings[:, -1:]], axis=1)[:, :T]
        return embeddings, Positions(offset, mx.array(embedded.axes[:, :, :T]))

    def make_cache(self, *, kv_bits: int | None = None, kv_group_size: int = 64) -> HybridCache:
        """An empty cache; `kv_bits` 4 or 8 packs the attention layers' keys and values."""
        return make_cache(self.config.text, kv_bits=kv_bits, kv_group_size=kv_group_size)

    def _head(self, normed: mx.array) -> mx.array:
        logits: mx.array = self.embed_tokens.as_linear(normed) if self.lm_head is None else self.lm_head(normed)
        return logits


def _masks(cache: HybridCache, mask: mx.array | None, T: int) -> Masks | None:
    if cache.padding is None:
        return None
    seen = mx.arange(cache.offset + T)
    new = seen[cache.offset :]
    padding = cache.padding[:, None]
    causal = seen[None] <= new[:, None]
    # A padding row attends to itself, so that its softmax has something to sum.
    own = seen[None] == new[:, None]
    return Masks(mask, ((causal[None] & (seen >= padding)[:, None]) | own[None])[:, None])
