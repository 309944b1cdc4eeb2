"""Parity probes: every kernel on a small input of real head sizes, beside its reference, on the machine at hand."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from metal_kernels import attention, gated_delta, moe_dispatch, norm
from metal_kernels._backend import ENVIRONMENT_VARIABLE, Backend
from metal_kernels.attention import Rotary
from metal_kernels.gated_delta.prefill import PrefillForm, gated_delta_prefill
from metal_kernels.moe_dispatch import ExpertWeights, SparseWeights

Arrays = Sequence[mx.array]
_HK, _HV, _D, _HIDDEN, _WIDTH = 2, 4, 128, 256, 1024
_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Probe:
    """One kernel's call; `run` gives the same arrays on either backend, to `tolerance` of the largest value."""

    kernel: str
    run: Callable[[], Arrays]
    tolerance: float = 1e-5


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What a probe saw: largest difference over largest value, and medians in milliseconds on both backends.

    `failure` is what Metal said when the kernel could not be built or run; `error` and the times are then None.
    """

    kernel: str
    tolerance: float
    error: float | None = None
    kernel_ms: float | None = None
    reference_ms: float | None = None
    failure: str | None = None

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.tolerance


def run_probe(probe: Probe, *, repeats: int = 5) -> ProbeResult:
    """Run one probe as kernel and as reference; a kernel that cannot be built is a result, not an exception."""
    expected, reference_ms = _timed(probe.run, Backend.REFERENCE, repeats)
    try:
        found, kernel_ms = _timed(probe.run, Backend.METAL, repeats)
    except (RuntimeError, ValueError) as failure:
        return ProbeResult(probe.kernel, probe.tolerance, failure=str(failure))
    error = max(_error(a, b) for a, b in zip(found, expected, strict=True))
    return ProbeResult(probe.kernel, probe.tolerance, error, kernel_ms, reference_ms)


def probes() -> list[Probe]:
    """Every kernel once, in fp32 at head sizes of 128; inputs are fixed."""
    return [*_gated_delta_probes(), *_moe_probes(), *_stream_probes()]


@contextmanager
def forced(choice: Backend) -> Iterator[None]:
    """Run with MLX_QWEN_KERNELS set to `choice`."""
    before = os.environ.get(ENVIRONMENT_VARIABLE)
    os.environ[ENVIRONMENT_VARIABLE] = choice.value
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENVIRONMENT_VARIABLE]
        else:
            os.environ[ENVIRONMENT_VARIABLE] = before


def _timed(run: Callable[[], Arrays], choice: Backend, repeats: int) -> tuple[Arrays, float]:
    with forced(choice):
        outputs, times = run(), []
        mx.eval(outputs)
        for _ in range(repeats):
            started = time.perf_counter()
            mx.eval(run())
            times.append(time.perf_counter() - started)
    return outputs, 1e3 * sorted(times)[len(times) // 2]


def _error(found: mx.array, expected: mx.array) -> float:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    a, b = found.astype(mx.float32), expected.astype(mx.float32)
    largest = mx.maximum(mx.abs(b).max(), 1e-30)
    difference = mx.nan_to_num(mx.abs(a - b).max() / largest, nan=float("inf")).item()
    assert isinstance(difference, float), "a ratio of two fp32 numbers"
    return difference


def _normal(seed: int, *shape: int, scale: float = 1.0) -> mx.array:
    return scale * mx.random.normal(shape, key=mx.random.key(seed))


def _gated_delta_probes() -> list[Probe]:
    T, channels = 3, 2 * _HK * _D + _HV * _D
    rows, x = _normal(5, 1, T, channels + _HV * _D), _normal(6, 1, T, _HIDDEN)
    ba_weight = _normal(7, 2 * _HV, _HIDDEN, scale=_HIDDEN**-0.5)
    conv_state, state = _normal(8, 1, 3, channels), _normal(9, 1, _HV, _D, _D, scale=0.1)

    def decode(*, tape: bool) -> gated_delta.DecodeResult:
        return gated_delta.gated_delta_decode(
            rows,
            x,
            ba_weight,
            conv_weight=_normal(1, channels, 4, 1, scale=0.5),
            A_log=_normal(2, _HV),
            dt_bias=_normal(3, _HV),
            norm_weight=1 + _normal(4, _D, scale=0.1),
            eps=_EPS,
            num_key_heads=_HK,
            key_head_dim=_D,
            num_value_heads=_HV,
            value_head_dim=_D,
            conv_state=conv_state,
            state=state,
            tape=tape,
        )

    def verify() -> Arrays:
        result = decode(tape=True)
        assert result.tape is not None, "a tape was asked for"
        return gated_delta.roll_back(result.tape, 2, conv_state, state)

    return [
        Probe("gated_delta_decode", lambda: decode(tape=False)[:3]),
        Probe("gated_delta_replay", verify),
        Probe("gated_delta_prefill_sequential", lambda: _prefill("sequential")),
        Probe("gated_delta_prefill_chunked", lambda: _prefill("chunked")),
    ]


def _prefill(form: PrefillForm) -> Arrays:
    T = 70
    q, k, v = (_normal(10 + i, 1, T, heads, _D) for i, heads in enumerate((_HK, _HK, _HV)))
    log_decay, beta = -mx.abs(_normal(13, 1, T, _HV, scale=0.1)), mx.sigmoid(_normal(14, 1, T, _HV))
    if os.environ.get(ENVIRONMENT_VARIABLE) == Backend.METAL.value:
        return gated_delta_prefill(q, k, v, log_decay, beta, form=form)
    return gated_delta.gated_delta_rule(q, k, v, log_decay, beta)


def _moe_probes() -> list[Probe]:
    E, k, inner = 16, 4, 128
    x, many = _normal(20, 2, _HIDDEN), _normal(21, 24, _HIDDEN)
    logits, many_logits = _normal(22, 2, E + 1), _normal(23, 24, E + 1)
    matrices = [
        _normal(24, E, 2 * inner, _HIDDEN, scale=_HIDDEN**-0.5),
        _normal(25, E, _HIDDEN, inner, scale=inner**-0.5),
        _normal(26, 2 * inner, _HIDDEN, scale=_HIDDEN**-0.5),
        _normal(27, _HIDDEN, inner, scale=inner**-0.5),
    ]
    gate_up, down, shared_gate_up, shared_down = (ExpertWeights(*mx.quantize(matrix)) for matrix in matrices)
    weights = SparseWeights(gate_up, down, (shared_gate_up,), shared_down)

    def layer(rows: mx.array, scores: mx.array) -> Arrays:
        return [moe_dispatch.sparse_mlp(rows, moe_dispatch.route(scores, k), weights)]

    return [
        Probe("route", lambda: list(moe_dispatch.route(logits, k))),
        Probe("expert_gate_up, expert_down_combine", lambda: layer(x, logits)),
        Probe("sort_by_expert, combine, swiglu", lambda: layer(many, many_logits)),
    ]


def _stream_probes() -> list[Probe]:
    stream, branch, weight = _normal(30, 2, _WIDTH), _normal(31, 2, _WIDTH), 1 + _normal(32, _WIDTH, scale=0.1)
    H, Hkv, D, T = 4, 2, 64, 3
    rows, factor = _normal(33, 1, T, 2 * (H + Hkv) * D), 1 + _normal(34, D, scale=0.1)
    attended, rotary = _normal(35, 1, H, T, D), Rotary(dims=16, theta=1e7)

    def prologue() -> Arrays:
        offset = mx.array(1000)
        return attention.attention_prologue(
            rows, factor, factor, offset, rotary=rotary, num_heads=H, num_kv_heads=Hkv, eps=_EPS
        )

    return [
        Probe("rms_norm", lambda: [norm.rms_norm(stream, weight, _EPS)]),
        Probe("add_rms_norm", lambda: norm.add_rms_norm(stream, branch, weight, _EPS)),
        Probe("attention_prologue", prologue, tolerance=1e-4),
        Probe("attention_epilogue", lambda: [attention.attention_epilogue(attended, rows[..., : H * D])]),
    ]
