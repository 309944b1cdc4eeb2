"""Calls of every kernel on made-up inputs of given sizes: what probes compare and tuning times.

Inputs are made once, evaluated, and always the same; a call gives the same arrays on either backend.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from metal_kernels import attention, gated_delta, greedy, moe_dispatch, norm
from metal_kernels._backend import Backend, backend
from metal_kernels.attention import Rotary
from metal_kernels.gated_delta import Heads
from metal_kernels.gated_delta.rule.prefill import PrefillForm, gated_delta_prefill
from metal_kernels.moe_dispatch import ExpertWeights, SparseWeights
from metal_kernels.parity import Arrays, forced

EPS = 1e-6
KV_BITS = (4, 8)
Call = Callable[[], Arrays]


def normal(*shape: int, dtype: mx.Dtype = mx.float32, scale: float = 1.0) -> mx.array:
    """Evaluated, so that no call times how its inputs are made; the shape is the seed."""
    x = (scale * mx.random.normal(shape, key=mx.random.key(sum(shape)))).astype(dtype)
    mx.eval(x)
    return x


@dataclass(frozen=True, slots=True)
class AttentionSizes:
    """Heads H, key-value heads Hkv, their width D, and how many of its dimensions are turned."""

    heads: int
    kv_heads: int
    head_dim: int = 256
    turned: int = 64


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """Experts E, chosen k, intermediate sizes, and how `mx.quantize` packs the matrices; 0 bits are dense ones."""

    experts: int
    chosen: int
    inner: int
    shared_inner: int
    bits: int
    group_size: int = 64
    mode: str = "affine"


@dataclass(frozen=True, slots=True)
class MixerCalls:
    """A Gated DeltaNet layer's tokens: y and states, those with the tape, and the states of half of them."""

    plain: Call
    verified: Call
    taken_back: Call


def mixer(heads: Heads, hidden: int, T: int, dtype: mx.Dtype, *, taps: int = 4) -> MixerCalls:
    """The calls for T tokens."""
    _, Dk, Hv, Dv = heads
    rows, x = normal(1, T, heads.channels + Hv * Dv, dtype=dtype), normal(1, T, hidden, dtype=dtype)
    ba_weight = normal(2 * Hv, hidden, dtype=dtype, scale=hidden**-0.5)
    conv_weight, norm_weight = normal(heads.channels, taps, 1, dtype=dtype, scale=0.5), normal(Dv) + 2
    layer = gated_delta.Mixer(conv_weight, normal(Hv), normal(Hv, scale=0.5), norm_weight, EPS, heads)
    conv_state, state = normal(1, taps - 1, heads.channels, dtype=dtype), normal(1, Hv, Dv, Dk, scale=0.1)
    mx.eval(norm_weight)

    def call(*, tape: bool) -> gated_delta.MixerResult:
        return gated_delta.gated_delta_mixer(rows, x, ba_weight, layer, conv_state=conv_state, state=state, tape=tape)

    def verified() -> Arrays:
        *mixed, tape = call(tape=True)
        return [*mixed, *(tape or ())]

    with forced(Backend.REFERENCE):
        tape = call(tape=True).tape
    assert tape is not None, "a tape was asked for"
    mx.eval(tape)
    return MixerCalls(
        lambda: call(tape=False)[:3], verified, lambda: gated_delta.roll_back(tape, T // 2, conv_state, state)
    )


def rule(heads: Heads, T: int, dtype: mx.Dtype) -> Callable[[PrefillForm], Arrays]:
    """T tokens of the gated delta rule, in a form that the reference does not know."""
    Hk, Dk, Hv, Dv = heads
    q, k = (scale * normal(1, T, Hk, Dk, dtype=dtype) for scale in (1, 2))
    v, state = normal(1, T, Hv, Dv, dtype=dtype), normal(1, Hv, Dv, Dk, scale=0.1)
    log_decay, beta = -mx.abs(normal(1, T, Hv, scale=0.1)), mx.sigmoid(normal(1, T, Hv))
    mx.eval(q, k, log_decay, beta)

    def call(form: PrefillForm) -> Arrays:
        if backend() is Backend.METAL:
            return gated_delta_prefill(q, k, v, log_decay, beta, state, form=form)
        return gated_delta.gated_delta_rule(q, k, v, log_decay, beta, state)

    return call


def packed(*shape: int, dtype: mx.Dtype, bits: int, group_size: int, mode: str = "affine") -> ExpertWeights:
    """A matrix, or one an expert; dense for 0 bits."""
    dense = normal(*shape, dtype=dtype, scale=shape[-1] ** -0.5)
    if not bits:
        return ExpertWeights(dense)
    weight, scales, *biases = mx.quantize(dense, group_size, bits, mode)
    mx.eval(weight, scales, *biases)
    return ExpertWeights(weight, scales, biases[0] if biases else None, group_size, bits, mode)


def sparse_weights(sizes: ExpertSizes, hidden: int, dtype: mx.Dtype) -> SparseWeights:
    """The matrices of a sparse layer."""
    E, inner, shared = sizes.experts, sizes.inner, sizes.shared_inner

    def matrix(*shape: int) -> ExpertWeights:
        return packed(*shape, dtype=dtype, bits=sizes.bits, group_size=sizes.group_size, mode=sizes.mode)

    return SparseWeights(
        matrix(E, 2 * inner, hidden),
        matrix(E, hidden, inner),
        (matrix(2 * shared, hidden),),
        matrix(hidden, shared),
    )


class SparseCalls:
    """The steps of a sparse layer for `tokens`, each alone and all together."""

    def __init__(self, sizes: ExpertSizes, hidden: int, tokens: int, dtype: mx.Dtype, weights: SparseWeights) -> None:
        self._sizes, self._weights = sizes, weights
        E, inner, shared = sizes.experts, sizes.inner, sizes.shared_inner
        self._x, self._logits = normal(tokens, hidden, dtype=dtype), normal(tokens, E + 1, dtype=dtype)
        with forced(Backend.REFERENCE):
            self._routing = moe_dispatch.route(self._logits, sizes.chosen)
        self._hidden = normal(tokens, sizes.chosen, inner, dtype=dtype)
        self._shared_hidden = normal(tokens, shared, dtype=dtype)
        self._outputs = normal(tokens * sizes.chosen, hidden, dtype=dtype)
        self._shared = normal(tokens, hidden, dtype=dtype)
        mx.eval(self._routing)

    def layer(self) -> Arrays:
        return [moe_dispatch.sparse_mlp(self._x, self._routing, self._weights)]

    def routed(self) -> Arrays:
        return [moe_dispatch.routed_mlp(self._x, self._logits, self._sizes.chosen, self._weights)]

    def routed_apart(self) -> Arrays:
        routing = moe_dispatch.route(self._logits, self._sizes.chosen)
        return [moe_dispatch.sparse_mlp(self._x, routing, self._weights)]

    def route(self) -> Arrays:
        return list(moe_dispatch.route(self._logits, self._sizes.chosen))

    def gate_up(self) -> Arrays:
        return moe_dispatch.expert_gate_up(self._x, self._routing.indices, self._weights)

    def down(self) -> Arrays:
        return [moe_dispatch.expert_down_combine(self._hidden, self._shared_hidden, self._routing, self._weights)]

    def sort(self) -> Arrays:
        return moe_dispatch.sort_by_expert(self._routing.indices, self._sizes.experts)

    def combine(self) -> Arrays:
        places = mx.arange(self._outputs.shape[0], dtype=mx.uint32)
        return [moe_dispatch.combine(self._outputs, places, self._routing, self._shared)]


def dense_mlp(packing: tuple[int, int, str], hidden: int, inner: int, tokens: int, dtype: mx.Dtype) -> Call:
    """A dense MLP up to its activation, by bits, group size and mode of `packed`."""
    bits, group_size, mode = packing
    x = normal(tokens, hidden, dtype=dtype)
    matrix = packed(2 * inner, hidden, dtype=dtype, bits=bits, group_size=group_size, mode=mode)
    return lambda: [moe_dispatch.mlp_gate_up(x, matrix)]


def best_tokens(vocab_size: int, rows: int, dtype: mx.Dtype) -> Call:
    """The best tokens of rows of logits, bit by bit: another token is another bit, however near its id is."""
    logits = normal(rows, vocab_size, dtype=dtype, scale=4.0)

    def call() -> Arrays:
        tokens, logprobs, total = greedy.best_tokens(logits)
        return [_bits(tokens), logprobs, total]

    return call


def top_tokens(vocab_size: int, rows: int, k: int, dtype: mx.Dtype) -> Call:
    """The k best tokens of rows of logits, likewise."""
    logits = normal(rows, vocab_size, dtype=dtype, scale=4.0)

    def call() -> Arrays:
        tokens, scores, total = greedy.top_tokens(logits, k)
        return [_bits(tokens), scores, total]

    return call


def _bits(tokens: mx.array) -> mx.array:
    return tokens[..., None] >> mx.arange(32, dtype=mx.uint32) & 1


class StreamCalls:
    """What surrounds the layers, for `tokens` rows: norms, an MLP's activation, and both sides of an attention core."""

    def __init__(self, width: int, attention_sizes: AttentionSizes | None, tokens: int, dtype: mx.Dtype) -> None:
        self._stream, self._branch = normal(tokens, width), normal(tokens, width, dtype=dtype)
        self._weight, self._dtype = normal(width, scale=0.1) + 1, dtype
        if attention_sizes is not None:
            self._sizes, D, H = attention_sizes, attention_sizes.head_dim, attention_sizes.heads
            self._rows = normal(1, tokens, 2 * (H + attention_sizes.kv_heads) * D, dtype=dtype)
            self._factor, self._attended = normal(D, scale=0.1) + 1, normal(1, H, tokens, D, dtype=dtype)
            self._offset, self._rotary = mx.array(1000), Rotary(dims=attention_sizes.turned, theta=1e7)
            mx.eval(self._factor, self._offset)
        mx.eval(self._weight)

    def rms_norm(self) -> Arrays:
        return [norm.rms_norm(self._stream, self._weight, EPS, self._dtype)]

    def swiglu(self) -> Arrays:
        return [moe_dispatch.swiglu(self._branch)]

    def add_rms_norm(self) -> Arrays:
        return norm.add_rms_norm(self._stream, self._branch, self._weight, EPS)

    def prologue(self) -> Arrays:
        sizes = self._sizes
        return attention.attention_prologue(
            self._rows,
            self._factor,
            self._factor,
            self._offset,
            rotary=self._rotary,
            num_heads=sizes.heads,
            num_kv_heads=sizes.kv_heads,
            eps=EPS,
        )

    def epilogue(self) -> Arrays:
        gate = self._rows[..., : self._sizes.heads * self._sizes.head_dim]
        return [attention.attention_epilogue(self._attended, gate)]


class ContextCalls:
    """Attention of the last `tokens` tokens to a context of `context`, unpacked and packed in groups of 64 channels."""

    def __init__(self, sizes: AttentionSizes, tokens: int, context: int, dtype: mx.Dtype) -> None:
        D = sizes.head_dim
        self._q, self._scale = normal(1, sizes.heads, tokens, D, dtype=dtype), D**-0.5
        self._kv = [normal(1, sizes.kv_heads, context + i, D, dtype=dtype)[:, :, i:] for i in range(2)]
        self._group_size = 64 if D % 64 == 0 else 32
        self._packed = {bits: [mx.quantize(x, self._group_size, bits) for x in self._kv] for bits in KV_BITS}
        mx.eval(list(self._packed.values()))

    def plain(self) -> Arrays:
        return [attention.attention(self._q, *self._kv, scale=self._scale)]

    def packed(self) -> Arrays:
        return self._attended(self._q.dtype)

    def compared(self) -> Arrays:
        """As `packed`, but plain MLX computes in fp32: its own products in short types are off by up to a tenth."""
        dtype = self._q.dtype if backend() is Backend.METAL else mx.float32
        return [y.astype(self._q.dtype) for y in self._attended(dtype)]

    def _attended(self, dtype: mx.Dtype) -> Arrays:
        q, found = self._q.astype(dtype), []
        for bits, held in self._packed.items():
            keys, values = ((words, scales.astype(dtype), biases.astype(dtype)) for words, scales, biases in held)
            found.append(
                attention.packed_attention(q, keys, values, bits=bits, group_size=self._group_size, scale=self._scale)
            )
        return found
