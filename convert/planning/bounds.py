"""What no machine can exceed: decode and prefill rates that bandwidth and arithmetic allow, and launches a token."""

from dataclasses import dataclass

from mlx_qwen.config import TextConfig

from .chips import Chip
from .memory import kv_bytes, state_bytes
from .weight_sizes import Weights

# Launches of a decoded token at 4 bits, as `mlx-qwen bench --kernels` counts them.
_LAUNCHES = {"linear_attention": 4, "full_attention": 7}
_DENSE_LAUNCHES, _SPARSE_LAUNCHES, _END_LAUNCHES = 3, 4, 8


@dataclass(frozen=True, slots=True)
class Work:
    """What one sequence asks of a machine.

    Attributes:
        decode_bytes: that a decoded token at the end of the context reads and writes.
        decode_flops: arithmetic of that token.
        prefill_bytes: that reading a prompt as long as the context has to read.
        prefill_flops: arithmetic of that prompt.
        prompt: its tokens.
        launches: kernels of a decoded token.
    """

    decode_bytes: int
    decode_flops: int
    prefill_bytes: int
    prefill_flops: int
    prompt: int
    launches: int


@dataclass(frozen=True, slots=True)
class Bound:
    """Upper bounds for one chip, which real rates stay below; they are no measurements.

    Attributes:
        decode: tokens a second, by memory bandwidth and, where the chip's rate is published, arithmetic.
        prefill: tokens a second, by both; None where the arithmetic rate is not published.
        launch_budget: seconds. When launches take longer than this on average, they bound decoding, not bandwidth.
    """

    chip: Chip
    decode: float
    prefill: float | None
    launch_budget: float


def work_of(text: TextConfig, weights: Weights, context: int, *, step: int, kv_bits: int | None) -> Work:
    """The work of one sequence of `context` tokens, its prompt read `step` tokens at once."""
    head = text.hidden_size * text.vocab_size
    attention = text.layer_types.count("full_attention") * text.num_attention_heads * text.head_dim
    linear = text.layer_types.count("linear_attention") * text.linear_num_value_heads
    # Decay, read, write and output of each state, one multiplication or a multiplication and an addition each.
    recurrence = 7 * linear * text.linear_value_head_dim * text.linear_key_head_dim
    per_token = 2 * (weights.active - head) + recurrence
    return Work(
        decode_bytes=weights.per_token + kv_bytes(text, context, kv_bits=kv_bits) + 2 * state_bytes(text),
        decode_flops=per_token + 2 * head + 4 * attention * context,
        prefill_bytes=-(-context // step) * weights.per_token,
        prefill_flops=context * per_token + 2 * head + 2 * attention * context**2,
        prompt=context,
        launches=launches(text),
    )


def launches(text: TextConfig) -> int:
    """Kernels that a decoded token launches with a model packed to 4 bits."""
    mixers = sum(_LAUNCHES[kind] for kind in text.layer_types)
    feed_forward = sum(_SPARSE_LAUNCHES if sparse else _DENSE_LAUNCHES for sparse in text.sparse_layers)
    return mixers + feed_forward + _END_LAUNCHES


def bound(work: Work, chip: Chip) -> Bound:
    """The bounds of `work` on `chip`."""
    bandwidth = chip.bandwidth * 1e9
    decode_seconds = work.decode_bytes / bandwidth
    prefill = None
    if chip.tflops is not None:
        flops = chip.tflops * 1e12
        decode_seconds = max(decode_seconds, work.decode_flops / flops)
        prefill = work.prompt / max(work.prefill_bytes / bandwidth, work.prefill_flops / flops)
    return Bound(chip, 1 / decode_seconds, prefill, decode_seconds / work.launches)
