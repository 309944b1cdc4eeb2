"""How much memory a conversion takes: pieces at work, and where the model runs, a layer of it and what enters it."""

from collections import Counter
from collections.abc import Iterable
from math import prod

import mlx.core as mx

from mlx_qwen.checkpoint.layout import Quantization
from mlx_qwen.checkpoint.names import decoder_layer
from mlx_qwen.config import TextConfig

from .arrays import FLOATS
from .comparison.distributions import VOCABULARY_BLOCK
from .comparison.texts import TOKENS, WINDOW
from .layerwise.batching import BATCH_TOKENS
from .outputs import Output, Outputs
from .quantize.correction import MOST_COLUMNS
from .quantize.inputs import REMEMBERED
from .work.pieces import cut
from .workers import piece_count

# A piece is there as read, in fp32, in the output's dtype, packed, and as bytes.
_COPIES = 6
_KEPT_BYTES = 64 << 20
_FP32 = 4
# Corrections that are remembered, and one that is being made in fp64.
_CORRECTIONS = REMEMBERED + 3 * 2


def packing_bytes(outputs: Outputs) -> int:
    """Pieces of the source at work, the largest there is, and freed buffers that are kept for the next."""
    largest = max(piece.nbytes for output in outputs.all for piece in cut(output))
    return piece_count() * _COPIES * largest + _KEPT_BYTES


def memory_needed(text: TextConfig, outputs: Outputs, tokens: int, *, verify: bool) -> int:
    """An upper estimate of what a conversion takes above the bare process, in bytes.

    `tokens` are those of the calibration text, 0 without one; with `verify` the output is compared with the source.
    """
    writing = packing_bytes(outputs) + (calibration_bytes(text, outputs, tokens) if tokens else 0)
    return max(writing, verifying_bytes(text, outputs)) if verify else writing


def calibration_bytes(text: TextConfig, outputs: Outputs, tokens: int) -> int:
    """What a calibration on `tokens` tokens takes beside `packing_bytes`.

    That is the states of all tokens before a layer and after it, a layer that runs, the second moments of what enters
    its matrices and corrections made of them, and for experts the rows that were sent to them.
    """
    item = FLOATS[outputs.dtype].itemsize if mx.default_device() == mx.gpu else _FP32
    states = 2 * tokens * text.hidden_size * (_FP32 + item)
    widths = _input_widths(text)
    largest = _FP32 * min(max(widths), MOST_COLUMNS) ** 2
    moments = sum(_FP32 * width * min(width, MOST_COLUMNS) for width in widths) + _CORRECTIONS * largest
    layer = _largest_layer((output, output.target.quantization) for output in outputs.main)
    return states + layer * item // _FP32 + _running(text, item) + moments + _routed_bytes(text, tokens, item)


def verifying_bytes(text: TextConfig, outputs: Outputs) -> int:
    """What comparing source and output takes: the states of both, a layer of each, and blocks of both heads."""
    states = 2 * 2 * TOKENS * text.hidden_size * 2 * _FP32
    head = 2 * min(VOCABULARY_BLOCK, text.vocab_size) * (2 * text.hidden_size + 4 * WINDOW) * _FP32
    before = _largest_layer((output, output.target.quantization) for output in outputs.main)
    after = _largest_layer((output, output.quantization) for output in outputs.main)
    return states + before + after + max(_running(text, _FP32), head) + _KEPT_BYTES


def _largest_layer(stored: Iterable[tuple[Output, Quantization | None]]) -> int:
    """Bytes of the largest decoder layer in fp32, packed matrices as they are stored, and of a matrix being joined."""
    layers: Counter[int | None] = Counter()
    largest = 0
    for output, quantization in stored:
        count = prod(output.target.spec.shape)
        nbytes = _FP32 * count
        if quantization is not None:
            nbytes = count * quantization.bits // 8 + 2 * _FP32 * count // quantization.group_size
        layer = decoder_layer(output.name)
        layers[layer] += nbytes
        largest = largest if layer is None else max(largest, nbytes)
    del layers[None]
    return max(layers.values()) + largest


def _input_widths(text: TextConfig) -> tuple[int, ...]:
    """How many columns the matrices of a layer have, once for each group of them that reads the same rows."""
    mixed = max(text.num_attention_heads * text.head_dim, text.linear_value_dim)
    inner = text.intermediate_size if text.moe is None else text.moe.shared_expert_intermediate_size
    return text.hidden_size, mixed, text.hidden_size, inner


def _routed_bytes(text: TextConfig, tokens: int, item: int) -> int:
    """Rows that enter the experts, which are kept for each of them."""
    if text.moe is None:
        return 0
    return tokens * text.moe.num_experts_per_tok * (text.hidden_size + text.moe.moe_intermediate_size) * item


def _running(text: TextConfig, item: int) -> int:
    """The widest part of a layer at work on a batch of windows."""
    rows = BATCH_TOKENS
    q, kv = text.num_attention_heads * text.head_dim, 2 * text.num_key_value_heads * text.head_dim
    attention = item * (5 * q + 2 * kv) + 2 * _FP32 * text.num_attention_heads * WINDOW
    conv, value = text.linear_conv_dim, text.linear_value_dim
    linear = (item + _FP32) * (2 * conv + 2 * value)
    feed = 3 * item * text.intermediate_size
    if text.moe is not None:
        chosen = text.moe.num_experts_per_tok * (3 * text.hidden_size + 4 * text.moe.moe_intermediate_size)
        feed = item * (chosen + 3 * text.moe.shared_expert_intermediate_size)
    return rows * (4 * _FP32 * text.hidden_size + max(attention, linear, feed))
