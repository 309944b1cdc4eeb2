"""What the parity probes call: every kernel in fp32, and those of a decoded token in bf16 and fp16 at real sizes."""

from collections.abc import Callable

import mlx.core as mx

from metal_kernels import attention, gated_delta, moe_dispatch, norm
from metal_kernels._backend import Backend, backend
from metal_kernels.attention import Rotary
from metal_kernels.gated_delta.rule.prefill import PrefillForm, gated_delta_prefill
from metal_kernels.moe_dispatch import ExpertWeights, SparseWeights
from metal_kernels.parity import Arrays, Probe

_D, _HIDDEN, _EPS = 128, 256, 1e-6
_SHORT = (mx.bfloat16, mx.float16)
_TOLERANCES = {mx.float32: 1e-5, mx.bfloat16: 4e-2, mx.float16: 8e-3}


def probes() -> list[Probe]:
    """Every kernel; the inputs are made once, here, and always the same."""
    calls = [
        *_rule_probes(),
        _mixer_probe(2, 4, 3, mx.float32),
        _verify_probe(),
        *_moe_probes(bits=4, dtype=mx.float32),
        *_stream_probes(mx.float32, heads=4, kv_heads=2),
    ]
    for dtype in _SHORT:
        calls += [_mixer_probe(16, 32, 1, dtype), *_moe_probes(bits=8, dtype=dtype)]
        calls += _stream_probes(dtype, heads=32, kv_heads=2)
    return [*calls, _mixer_probe(16, 48, 8, mx.bfloat16)]


def _probe(kernel: str, dtype: mx.Dtype, run: Callable[[], Arrays], what: str = "") -> Probe:
    name = str(dtype).removeprefix("mlx.core.")
    return Probe(f"{kernel}, {what + ', ' if what else ''}{name}", run, _TOLERANCES[dtype])


def _normal(*shape: int, dtype: mx.Dtype = mx.float32, scale: float = 1.0) -> mx.array:
    """Evaluated, so that no probe times how its inputs are made; the shape is the seed."""
    x = (scale * mx.random.normal(shape, key=mx.random.key(sum(shape)))).astype(dtype)
    mx.eval(x)
    return x


def _mixer(Hk: int, Hv: int, T: int, dtype: mx.Dtype) -> Callable[[bool], gated_delta.MixerResult]:
    channels = 2 * Hk * _D + Hv * _D
    rows, x = _normal(1, T, channels + Hv * _D, dtype=dtype), _normal(1, T, _HIDDEN, dtype=dtype)
    ba_weight = _normal(2 * Hv, _HIDDEN, dtype=dtype, scale=_HIDDEN**-0.5)
    heads = gated_delta.Heads(Hk, _D, Hv, _D)
    conv_weight, norm_weight = _normal(channels, 4, 1, dtype=dtype, scale=0.5), _normal(_D) + 2
    layer = gated_delta.Mixer(conv_weight, _normal(Hv), _normal(Hv, scale=0.5), norm_weight, _EPS, heads)
    conv_state, state = _normal(1, 3, channels, dtype=dtype), _normal(1, Hv, _D, _D, scale=0.1)

    def call(tape: bool) -> gated_delta.MixerResult:
        return gated_delta.gated_delta_mixer(rows, x, ba_weight, layer, conv_state=conv_state, state=state, tape=tape)

    return call


def _mixer_probe(Hk: int, Hv: int, T: int, dtype: mx.Dtype) -> Probe:
    call = _mixer(Hk, Hv, T, dtype)
    return _probe("gated_delta_mixer", dtype, lambda: call(False)[:3], f"{Hv} heads, {T} tokens")


def _verify_probe() -> Probe:
    Hk, Hv, T = 2, 4, 5
    call, channels = _mixer(Hk, Hv, T, mx.float32), (2 * Hk + Hv) * _D
    before = _normal(1, 3, channels), _normal(1, Hv, _D, _D, scale=0.1)

    def run() -> Arrays:
        tape = call(True).tape
        assert tape is not None, "a tape was asked for"
        return gated_delta.roll_back(tape, 2, *before)

    return _probe("gated_delta_replay", mx.float32, run)


def _rule_probes() -> list[Probe]:
    T, Hk, Hv = 70, 2, 4
    q, k, v = (scale * _normal(1, T, heads, _D) for scale, heads in ((1, Hk), (2, Hk), (1, Hv)))
    log_decay, beta = -mx.abs(_normal(1, T, Hv, scale=0.1)), mx.sigmoid(_normal(1, T, Hv))
    mx.eval(q, k, v, log_decay, beta)

    def rule(form: PrefillForm) -> Arrays:
        if backend() is Backend.METAL:
            return gated_delta_prefill(q, k, v, log_decay, beta, form=form)
        return gated_delta.gated_delta_rule(q, k, v, log_decay, beta)

    return [
        _probe("gated_delta_prefill_sequential", mx.float32, lambda: rule("sequential")),
        _probe("gated_delta_prefill_chunked", mx.float32, lambda: rule("chunked")),
    ]


def _moe_probes(*, bits: int, dtype: mx.Dtype) -> list[Probe]:
    E, k, inner = 16, 4, 128

    def packed(*shape: int) -> ExpertWeights:
        matrix = mx.quantize(_normal(*shape, dtype=dtype, scale=shape[-1] ** -0.5), 64, bits)
        mx.eval(matrix)
        return ExpertWeights(*matrix, 64, bits)

    weights = SparseWeights(
        packed(E, 2 * inner, _HIDDEN), packed(E, _HIDDEN, inner), (packed(2 * inner, _HIDDEN),), packed(_HIDDEN, inner)
    )

    def layer(tokens: int) -> Callable[[], Arrays]:
        x, logits = _normal(tokens, _HIDDEN, dtype=dtype), _normal(tokens, E + 1, dtype=dtype)
        return lambda: [moe_dispatch.sparse_mlp(x, moe_dispatch.route(logits, k), weights)]

    logits = _normal(2, E + 1, dtype=dtype)
    scores = Probe(f"route, {str(dtype).removeprefix('mlx.core.')}", lambda: list(moe_dispatch.route(logits, k)))
    return [
        scores,
        _probe("expert_gate_up, expert_down_combine", dtype, layer(2), f"{bits} bits"),
        _probe("sort_by_expert, combine, swiglu", dtype, layer(24), f"{bits} bits"),
    ]


def _stream_probes(dtype: mx.Dtype, *, heads: int, kv_heads: int) -> list[Probe]:
    T, D, width = 3, 256, 2048
    stream, branch, weight = _normal(2, width), _normal(2, width, dtype=dtype), _normal(width, scale=0.1) + 1
    rows, factor = _normal(1, T, 2 * (heads + kv_heads) * D, dtype=dtype), _normal(D, scale=0.1) + 1
    attended, gate = _normal(1, heads, T, D, dtype=dtype), rows[..., : heads * D]
    offset, rotary = mx.array(1000), Rotary(dims=64, theta=1e7)

    def prologue() -> Arrays:
        return attention.attention_prologue(
            rows, factor, factor, offset, rotary=rotary, num_heads=heads, num_kv_heads=kv_heads, eps=_EPS
        )

    what = f"{heads} heads"
    return [
        _probe("rms_norm", dtype, lambda: [norm.rms_norm(stream, weight, _EPS, dtype)]),
        _probe("add_rms_norm", dtype, lambda: norm.add_rms_norm(stream, branch, weight, _EPS)),
        _probe("attention_prologue", dtype, prologue, what),
        _probe("attention_epilogue", dtype, lambda: [attention.attention_epilogue(attended, gate)], what),
    ]
