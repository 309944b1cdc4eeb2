"""What the parity probes call: every kernel in fp32, and those of a decoded token in bf16 and fp16 at real sizes."""

import mlx.core as mx

from metal_kernels.calls import (
    AttentionSizes,
    Call,
    ContextCalls,
    ExpertSizes,
    SparseCalls,
    StreamCalls,
    best_tokens,
    dense_mlp,
    mixer,
    rule,
    sparse_weights,
    top_tokens,
)
from metal_kernels.gated_delta import Heads
from metal_kernels.parity import Probe

_D, _HIDDEN = 128, 256
_SHORT = (mx.bfloat16, mx.float16)
_PACKINGS = (
    *(("affine", bits, 64) for bits in (2, 3, 5, 6)),
    *(("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)),
)
# Of log-probabilities near 0; MLX's CPU adds up a row's exponentials one after the other.
SUM_TOLERANCE = 1e-4
TOLERANCES = {mx.float32: 1e-5, mx.bfloat16: 4e-2, mx.float16: 8e-3}


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
    calls += [_expert_probe(*packing) for packing in _PACKINGS]
    return [*calls, _mixer_probe(16, 48, 8, mx.bfloat16)]


def _probe(kernel: str, dtype: mx.Dtype, run: Call, what: str = "") -> Probe:
    name = str(dtype).removeprefix("mlx.core.")
    return Probe(f"{kernel}, {what + ', ' if what else ''}{name}", run, TOLERANCES[dtype])


def _mixer_probe(Hk: int, Hv: int, T: int, dtype: mx.Dtype) -> Probe:
    calls = mixer(Heads(Hk, _D, Hv, _D), _HIDDEN, T, dtype)
    return _probe("gated_delta_mixer", dtype, calls.plain, f"{Hv} heads, {T} tokens")


def _verify_probe() -> Probe:
    calls = mixer(Heads(2, _D, 4, _D), _HIDDEN, 5, mx.float32)
    return _probe("gated_delta_replay", mx.float32, lambda: [*calls.verified(), *calls.taken_back()])


def _rule_probes() -> list[Probe]:
    call = rule(Heads(2, _D, 4, _D), 70, mx.float32)
    return [
        _probe("gated_delta_prefill_sequential", mx.float32, lambda: call("sequential")),
        _probe("gated_delta_prefill_chunked", mx.float32, lambda: call("chunked")),
    ]


def _moe_probes(*, bits: int, dtype: mx.Dtype) -> list[Probe]:
    sizes = ExpertSizes(experts=16, chosen=4, inner=128, shared_inner=128, bits=bits)
    weights = sparse_weights(sizes, _HIDDEN, dtype)
    few, many = (SparseCalls(sizes, _HIDDEN, tokens, dtype, weights) for tokens in (2, 24))
    # Few columns: MLX's CPU adds up short types in themselves, and its activation is a product of two such sums.
    dense = dense_mlp((bits, 64, "affine"), 64, 128, 2, dtype)
    return [
        Probe(f"route, {str(dtype).removeprefix('mlx.core.')}", few.route),
        _probe("expert_gate_up, expert_down_combine", dtype, few.layer, f"{bits} bits"),
        _probe("routed_gate_up", dtype, few.routed, f"{bits} bits"),
        _probe("mlp_gate_up", dtype, dense, f"{bits} bits"),
        _probe("sort_by_expert, combine, swiglu", dtype, many.layer, f"{bits} bits"),
    ]


def _expert_probe(mode: str, bits: int, group_size: int) -> Probe:
    """The experts' two kernels in a precision that the other probes have not."""
    sizes = ExpertSizes(4, 4, 128, 128, bits, group_size, mode)
    layer = SparseCalls(sizes, _HIDDEN, 1, mx.bfloat16, sparse_weights(sizes, _HIDDEN, mx.bfloat16)).layer
    what = f"{bits} bits" if mode == "affine" else mode
    return _probe("expert_gate_up, expert_down_combine", mx.bfloat16, layer, what)


def _stream_probes(dtype: mx.Dtype, *, heads: int, kv_heads: int) -> list[Probe]:
    calls, what = StreamCalls(2048, AttentionSizes(heads, kv_heads), 3, dtype), f"{heads} heads"
    name = str(dtype).removeprefix("mlx.core.")
    return [
        _probe("rms_norm", dtype, calls.rms_norm),
        _probe("add_rms_norm", dtype, calls.add_rms_norm),
        Probe(f"best_tokens, {name}", best_tokens(9000, 2, dtype), SUM_TOLERANCE),
        Probe(f"top_tokens, {name}", top_tokens(9000, 2, 20, dtype), SUM_TOLERANCE),
        _probe("attention_prologue", dtype, calls.prologue, what),
        _probe("attention_epilogue", dtype, calls.epilogue, what),
        *_context_probes(dtype, heads, kv_heads),
    ]


def _context_probes(dtype: mx.Dtype, heads: int, kv_heads: int) -> list[Probe]:
    """One token, whose context is split over threadgroups in fp32; in the short types as many as are verified."""
    tokens, context = (1, 300) if dtype == mx.float32 else (4, 100)
    calls = ContextCalls(AttentionSizes(heads, kv_heads), tokens, context, dtype)
    what = f"{heads} heads, {tokens} token{'s' * (tokens > 1)}"
    return [
        _probe("attention", dtype, calls.plain, what),
        _probe("packed_attention", dtype, calls.compared, what),
    ]
