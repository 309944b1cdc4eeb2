"""The one-token step as replayed graphs.

Building a step's graph in Python costs more than many of its kernels. Between two attention layers every shape of a
one-token step is fixed, so these stretches are traced once by `mx.compile` and replayed; only the attention cores,
whose keys and values grow, are built anew for each token.
"""

import shutil
from collections.abc import Callable, Sequence
from functools import cache

import mlx.core as mx

from metal_kernels import backend
from mlx_qwen.model.attention import Heads
from mlx_qwen.model.decoder import DecoderLayer, Residual
from mlx_qwen.model.rope import Positions
from mlx_qwen.model.state import GatedDeltaCache, HybridCache, LayerCache

Arrays = Sequence[mx.array]
Embed = Callable[[mx.array], mx.array]


def can_compile() -> bool:
    """Whether `mx.compile` works here: on a GPU always, on a CPU where g++ can build what it fuses."""
    return mx.default_device().type == mx.DeviceType.gpu or _has_host_compiler()


@cache
def _has_host_compiler() -> bool:
    return shutil.which("g++") is not None


class DecodeStep:
    """A model's decoder for one new token a sequence: the same values as its layers one after the other.

    The weights and the backend are constants of the traced graphs: make a new step after changing them.
    """

    def __init__(self, embed: Embed, layers: Sequence[DecoderLayer]) -> None:
        self.backend = backend()
        attention = [i for i, layer in enumerate(layers) if not layer.is_linear]
        starts, ends = [0, *attention], [*attention, len(layers)]
        self._stretches = [
            _Stretch(embed if start == 0 else None, layers, start, end) for start, end in zip(starts, ends, strict=True)
        ]

    def __call__(self, input_ids: mx.array, caches: HybridCache, attention_mask: mx.array | None) -> mx.array:
        """Hidden states fp32 [B, 1, hidden] of `input_ids` [B, 1]; updates the entries of `caches`, not its own offset.

        Every Gated DeltaNet layer must have a state; `attention_mask` is bool [B, 1, 1, S], for padded batches.
        """
        position = caches.next_position()
        entering: Arrays = (input_ids,)
        for stretch in self._stretches[:-1]:
            x, *leaving = stretch(entering, position, caches)
            heads = Heads(*leaving)
            attended = stretch.next_attention(heads, caches, attention_mask)
            entering = (x, attended, heads.gate)
        return self._stretches[-1](entering, position, caches)[0]


class _Stretch:
    """What follows one attention core, the linear layers after it, and the projections of the next core."""

    def __init__(self, embed: Embed | None, layers: Sequence[DecoderLayer], start: int, end: int) -> None:
        self._embed = embed
        self._opening = None if embed is not None else layers[start]
        self._first_linear = start if embed is not None else start + 1
        self._linear = layers[self._first_linear : end]
        self._end = end
        self._closing = layers[end] if end < len(layers) else None
        self._replayed = mx.compile(self._run)

    def __call__(self, entering: Arrays, position: mx.array, caches: HybridCache) -> list[mx.array]:
        """Run on what the last core left; stores the new linear states and returns x and the next core's heads."""
        held = [_linear_entry(entry) for entry in caches[self._first_linear : self._end]]
        outputs: list[mx.array] = self._replayed(entering, position, [x for entry in held for x in entry.arrays()])
        for entry in reversed(held):
            entry.state, entry.conv_state = outputs.pop(), outputs.pop()
        return outputs

    def next_attention(self, heads: Heads, caches: HybridCache, mask: mx.array | None) -> mx.array:
        """The core that this stretch leads to."""
        entry = caches[self._end]
        assert self._closing is not None and not isinstance(entry, GatedDeltaCache), "the stretch ends in attention"
        return self._closing.self_attn.attend(heads, entry, mask)

    def _run(self, entering: Arrays, position: mx.array, states: Arrays) -> list[mx.array]:
        positions = Positions(position)
        if self._embed is not None:
            residual = Residual(self._embed(entering[0]))
        else:
            assert self._opening is not None, "a stretch opens with the embedding or behind an attention core"
            x, attended, gate = entering
            residual = self._opening.feed_forward(Residual(x, self._opening.self_attn.output(attended, gate)))
        new_states: list[mx.array] = []
        for i, layer in enumerate(self._linear):
            entry = GatedDeltaCache(states[2 * i], states[2 * i + 1])
            residual = layer(residual, positions, entry, None)
            new_states += entry.arrays()
        if self._closing is None:
            return [residual.sum(), *new_states]
        x, normed = residual.normed(self._closing.input_layernorm)
        return [x, *self._closing.self_attn.heads(normed, positions), *new_states]


def _linear_entry(entry: LayerCache) -> GatedDeltaCache:
    assert isinstance(entry, GatedDeltaCache), "caches are made in the layers' order"
    return entry
