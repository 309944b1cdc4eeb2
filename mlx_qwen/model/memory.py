"""Bytes that keys and values of a prompt take, and what is alive while a piece of it is read."""

import mlx.core as mx

from mlx_qwen.config import TextConfig
from mlx_qwen.machine import machine_bytes
from mlx_qwen.model.attention import MOST_SCORE_BYTES
from mlx_qwen.model.cache import kv_packing
from mlx_qwen.model.state import token_nbytes

KV_GROUP_SIZE = 64
_STEP = 256
_ITEM, _FP32 = 2, 4
# Head sizes for which MLX attends to many queries without scores in memory, unless told otherwise.
_FUSED_HEAD_SIZES = (64, 80, 128)


def usable_bytes() -> int:
    """What a process may use: on a Mac what its GPU recommends, elsewhere nine tenths of the memory."""
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    return machine_bytes() * 9 // 10


def kv_bytes(text: TextConfig, tokens: int, *, kv_bits: int | None = None, item_size: int = _ITEM) -> int:
    """Keys and values of `tokens` tokens in all attention layers, of `item_size` bytes each or packed to `kv_bits`.

    Raises:
        PromptError: the model's heads cannot be packed so.
    """
    return tokens * token_nbytes(text, kv_packing(text, kv_bits), item_size=item_size)


def held_kv_bytes(text: TextConfig, tokens: int, *, kv_bits: int | None = None, item_size: int = _ITEM) -> int:
    """As `kv_bytes`, of the buffer that holds them, which grows by steps of 256 tokens."""
    return kv_bytes(text, -(-tokens // _STEP) * _STEP, kv_bits=kv_bits, item_size=item_size)


def prefill_bytes(
    text: TextConfig, tokens: int, context: int, *, kv_bits: int | None = None, item_size: int = _ITEM
) -> int:
    """An estimate of the arrays alive while `tokens` tokens are read at once at the end of `context` tokens.

    The residual stream and the widest block beside it, on a GPU, of `item_size` bytes a number. This family's attention
    heads have 256 channels, so that their scores are in memory.
    """
    stream = tokens * text.hidden_size * (2 * _FP32 + 2 * item_size)
    blocks = [_feed_forward(text, tokens, item_size, sparse=sparse) for sparse in set(text.sparse_layers)]
    if "linear_attention" in text.layer_types:
        blocks.append(_gated_delta(text, tokens, item_size))
    if "full_attention" in text.layer_types:
        scores = score_bytes(text, tokens, context, kv_bits=kv_bits, item_size=item_size)
        blocks.append(_attention(text, tokens, item_size) + scores)
    return stream + max(blocks)


def growth_bytes(text: TextConfig, context: int, *, kv_bits: int | None = None, item_size: int = _ITEM) -> int:
    """What is there twice while keys and values outgrow their room of `context` tokens: those of one layer.

    A prompt gets its room at once; answers that are longer than what is left of it, and later turns, grow.
    """
    held = held_kv_bytes(text, context, kv_bits=kv_bits, item_size=item_size)
    return held // max(1, text.layer_types.count("full_attention"))


def score_bytes(
    text: TextConfig, tokens: int, context: int, *, kv_bits: int | None = None, item_size: int = _ITEM
) -> int:
    """One layer's attention scores [heads, tokens, context] and the causal mask, a byte a pair that all heads share.

    Queries are attended to in blocks that bound the scores. None where MLX's fused kernel computes them.
    """
    if text.head_dim in _FUSED_HEAD_SIZES and kv_bits is None:
        return 0
    a_token = item_size * text.num_attention_heads * context
    at_once = min(tokens, max(1, MOST_SCORE_BYTES // a_token))
    return at_once * (a_token + context)


def _attention(text: TextConfig, tokens: int, item_size: int) -> int:
    """Projected rows, q, k and v turned to their positions, and the output before and after its gate."""
    q, kv = text.num_attention_heads * text.head_dim, 2 * text.num_key_value_heads * text.head_dim
    return item_size * tokens * ((2 * q + kv) + (q + kv) + 2 * q)


def _gated_delta(text: TextConfig, tokens: int, item_size: int) -> int:
    """Projected rows, what leaves the convolution and the rule in fp32, and the gated output."""
    conv, value = text.linear_conv_dim, text.linear_value_dim
    return tokens * (item_size * (conv + value) + _FP32 * (conv + value) + item_size * value)


def _feed_forward(text: TextConfig, tokens: int, item_size: int, *, sparse: bool) -> int:
    """Gate and up, their product, and for experts a row a choice before and after them, and the router's logits."""
    if not sparse or text.moe is None:
        return item_size * tokens * 3 * text.intermediate_size
    moe = text.moe
    chosen = moe.num_experts_per_tok * (2 * text.hidden_size + 3 * moe.moe_intermediate_size)
    return tokens * (item_size * (chosen + 3 * moe.shared_expert_intermediate_size) + _FP32 * moe.num_experts)
