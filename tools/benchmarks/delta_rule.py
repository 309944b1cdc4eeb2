"""Prefill of the gated delta rule beside the peers that are installed."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import mlx.core as mx

from metal_kernels.gated_delta import gated_delta_rule, log_decay_and_beta
from mlx_qwen.bench.table import Table

OURS = "mlx-qwen"


@dataclass(frozen=True)
class Row:
    """Time of one implementation for one length.

    Attributes:
        implementation: who computes the rule.
        tokens: T, the length of the prefilled sequence.
        milliseconds: median over the repeats; None when the implementation is not installed.
        speedup: its time over ours, in the same run; None when the implementation is not installed.
    """

    implementation: str
    tokens: int
    milliseconds: float | None
    speedup: float | None


@dataclass(frozen=True)
class Problem:
    """Inputs of one prefill: q, k [B, T, Hk, Dk], v [B, T, Hv, Dv], a, b [B, T, Hv], A_log, dt_bias [Hv]."""

    q: mx.array
    k: mx.array
    v: mx.array
    a: mx.array
    b: mx.array
    A_log: mx.array
    dt_bias: mx.array


Prefill = Callable[[Problem], Sequence[mx.array]]


def compare_prefill(lengths: Sequence[int], repeats: int = 5) -> list[Row]:
    """Time the prefill of one layer's rule (B 1, Hk 16, Hv 32, Dk = Dv = 128, fp32) by every implementation.

    From raw q, k, a and b to y and the last state, starting without a state. The implementations take turns, so that
    whatever else the machine does falls on all of them; one untimed turn comes first.

    Args:
        lengths: values of T.
        repeats: timed turns a length.

    Returns:
        for every length one row an implementation, ours first.
    """
    rows = []
    for tokens in lengths:
        problem = random_problem(tokens)
        times = _alternate({name: prefill for name, prefill in _implementations().items() if prefill}, problem, repeats)
        medians = {name: statistics.median(values) for name, values in times.items()}
        for name in _implementations():
            median = medians.get(name)
            speedup = None if median is None else median / medians[OURS]
            rows.append(Row(name, tokens, None if median is None else 1e3 * median, speedup))
    return rows


def bench_rule(*, repeats: int, lengths: Sequence[int] = (512, 2048)) -> Table:
    """The comparison of `compare_prefill` as a table."""
    rows = [
        (
            row.implementation,
            str(row.tokens),
            "not installed" if row.milliseconds is None else f"{row.milliseconds:,.0f} ms",
            "" if row.speedup is None else f"{row.speedup:.1f}×",
        )
        for row in compare_prefill(lengths, repeats)
    ]
    note = "One layer, Hk 16, Hv 32, Dk = Dv = 128, fp32; medians in alternation; how much faster ours is."
    return Table(
        "Prefill of the gated delta rule", note, ("implementation", "tokens", "time", "ours is faster by"), rows
    )


def random_problem(tokens: int, *, Hk: int = 16, Hv: int = 32, Dk: int = 128, Dv: int = 128) -> Problem:
    """Return fp32 inputs; decay is between 1e-4 and 0.2 a token, so that no implementation meets subnormal numbers."""
    keys = mx.random.split(mx.random.key(0), 5)
    q, k = (mx.random.normal((1, tokens, Hk, Dk), key=key) for key in keys[:2])
    v = mx.random.normal((1, tokens, Hv, Dv), key=keys[2])
    a, b = (mx.random.normal((1, tokens, Hv), key=key) for key in keys[3:])
    problem = Problem(q, k, v, a, b, A_log=mx.linspace(-4, 1, Hv), dt_bias=mx.full(Hv, -4.0))
    mx.eval(vars(problem))
    return problem


def _alternate(prefills: dict[str, Prefill], problem: Problem, repeats: int) -> dict[str, list[float]]:
    """Return seconds of every timed call, by implementation."""
    times: dict[str, list[float]] = {name: [] for name in prefills}
    for turn in range(repeats + 1):
        for name, prefill in prefills.items():
            start = time.perf_counter()
            mx.eval(prefill(problem))
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def _implementations() -> dict[str, Prefill | None]:
    """Return every implementation by name, None for those that are not installed."""
    return {
        OURS: _ours,
        "mlx-lm": _mlx_lm if find_spec("mlx_lm") else None,
        "mx.fast.gated_delta_update": _mx_fast if hasattr(mx.fast, "gated_delta_update") else None,
        "mlx-vlm": _mlx_vlm if find_spec("mlx_vlm") else None,
    }


def _ours(p: Problem) -> Sequence[mx.array]:
    return gated_delta_rule(p.q, p.k, p.v, *log_decay_and_beta(p.a, p.b, p.A_log, p.dt_bias))


def _mlx_lm(p: Problem) -> Sequence[mx.array]:
    from mlx_lm.models.gated_delta import gated_delta_update

    y, state = gated_delta_update(*_normalized(p), p.v, p.a, p.b, p.A_log, p.dt_bias)
    return y, state


def _mx_fast(p: Problem) -> Sequence[mx.array]:
    log_decay, beta = log_decay_and_beta(p.a, p.b, p.A_log, p.dt_bias)
    return mx.fast.gated_delta_update(*_normalized(p), p.v, mx.exp(log_decay), beta)


def _mlx_vlm(p: Problem) -> Sequence[mx.array]:
    from mlx_vlm.models.qwen3_5.gated_delta import gated_delta_update

    y, state = gated_delta_update(*_normalized(p), p.v, p.a, p.b, p.A_log, p.dt_bias)
    return y, state


def _normalized(p: Problem) -> tuple[mx.array, mx.array]:
    """Normalize q and k as the callers of the peers do."""
    scale = p.q.shape[-1] ** -0.5
    q, k = (mx.fast.rms_norm(x, None, 1e-6 * scale**2) for x in (p.q, p.k))
    return scale**2 * q, scale * k
