"""Nothing is believed that this machine has not shown: each kernel beside its reference and its own variants, once.

A kernel that cannot be built or launched, computes something else, or is slower than plain MLX is left out, alone.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import mlx.core as mx

from metal_kernels._backend import Backend
from metal_kernels._choices import MOST_EXPERT_ROWS, MOST_MLP_ROWS, NEVER, Choices, choices, chosen
from metal_kernels.calls import Call
from metal_kernels.gated_delta.rule.prefill import WIDEST_CHUNKED_KEY, PrefillForm
from metal_kernels.parity import Arrays, difference, forced
from metal_kernels.tuning_cases import Case, ModelSizes, cases, context_case, expert_case, mlp_case, rule_case

Implementation = Literal["kernel", "reference"]
# A label such as "rms_norm, 512 threads", who runs it, and the call; gives seconds.
Clock = Callable[[str, Implementation, Call], float]
Report = Callable[[int, int], None]

# What MLX raises when it builds, loads or launches a kernel.
FAILURES = (RuntimeError, ValueError)
# Medians of a few runs differ by less from one time to the next.
_SLOWER = 1.1
_REPEATS, _AT_ONCE = 5, 4
_THREADS = (512, 256, 128)
_PREFILLS = (32, 64, 128, 256, 1024)
LONG_CONTEXT, _CONTEXT_GROUPS = 16384, (16, 32, 64, 128, 256)
_MLP_ROWS = (1, 2, 4, MOST_MLP_ROWS)
_EXPERT_ROWS = (1, 2, 4, 8, 16, 32, 64, MOST_EXPERT_ROWS)


@dataclass(frozen=True, slots=True)
class Row:
    """What was found out about one kernel: the variant that runs, or why none does; milliseconds of it and of MLX."""

    kernel: str
    variant: str = ""
    left_out: str | None = None
    error: float | None = None
    kernel_ms: float | None = None
    reference_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Tuned:
    """The choices for a model's sizes, and what they rest on."""

    choices: Choices
    rows: tuple[Row, ...]


def seconds_of(label: str, by: Implementation, run: Call) -> float:
    """The median of a few runs on the device; several calls at once, so that waiting for it counts little."""
    del label, by
    mx.eval(run())
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        mx.eval([run() for _ in range(_AT_ONCE)])
        times.append((time.perf_counter() - started) / _AT_ONCE)
    return sorted(times)[_REPEATS // 2]


def tune(sizes: ModelSizes, *, clock: Clock = seconds_of, report: Report = lambda done, of: None) -> Tuned:
    """Build, compare and time every kernel that a model of these sizes uses.

    Args:
        clock: times a call; another one stands in for a device in tests.
        report: called with how many kernels are done, and of how many.
    """
    steps = ((_contexts, sizes.attention), (_prefill, sizes.heads), (_experts, sizes.experts), (_mlp, sizes.dense))
    single, more = cases(sizes), [step for step, part in steps if part is not None]
    made, rows = Choices(), []
    for done, case in enumerate(single):
        report(done, len(single) + len(more))
        made, row = _single(case, made, clock)
        rows.append(row)
    for done, step in enumerate(more, len(single)):
        report(done, len(single) + len(more))
        made, found = step(sizes, made, clock)
        rows += found
    report(len(single) + len(more), len(single) + len(more))
    return Tuned(made, tuple(rows))


def failing(sizes: ModelSizes) -> Mapping[str, str]:
    """Which of the kernels in use cannot be built or launched now, each with what MLX said."""
    found = {}
    for case in cases(sizes):
        if case.kernel not in choices().left_out and isinstance(failure := _tried(case.calls), str):
            found[case.kernel] = failure
    if sizes.heads is not None and "gated_delta_rule" not in choices().left_out:
        rule = rule_case(sizes, 70)
        for form in _forms(sizes):
            if isinstance(failure := _tried(partial(rule.run, form)), str):
                found[f"gated_delta_prefill_{form}"] = failure
    return found


def without(made: Choices, failed: Mapping[str, str], widest_key: int = WIDEST_CHUNKED_KEY) -> Choices:
    """`made` less kernels that failed, each with the reason."""
    left_out = {**made.left_out, **failed}
    out = [form for form in get_args(PrefillForm) if f"gated_delta_prefill_{form}" in left_out]
    if "sequential" in out and ("chunked" in out or widest_key > WIDEST_CHUNKED_KEY):
        left_out["gated_delta_rule"] = left_out["gated_delta_prefill_sequential"]
    crossing = NEVER if "chunked" in out else 0 if "sequential" in out else made.chunked_from
    return replace(made, left_out=left_out, chunked_from=crossing)


def _single(case: Case, made: Choices, clock: Clock) -> tuple[Choices, Row]:
    """The best threadgroup of one kernel, or none."""
    with forced(Backend.REFERENCE):
        expected = _computed(case.calls)
        reference = clock(case.kernel, "reference", case.run)
    best: tuple[float, float, int] | None = None
    why = ""
    for threads in (case.threads, *(each for each in _THREADS if each < case.threads)):
        with chosen(replace(made, most_threads={**made.most_threads, case.kernel: threads})):
            found = _tried(case.calls)
            error = None if isinstance(found, str) else difference(found, expected)
            if error is None or error > case.tolerance:
                why = why or (found if isinstance(found, str) else f"differs by {error:.1e} of the largest value")
                continue
            with forced(Backend.METAL):
                took = clock(f"{case.kernel}, {threads} threads", "kernel", case.run)
            if best is None or took < best[0]:
                best = took, error, threads
    if best is None:
        return _left_out(made, case.kernel, why), Row(case.kernel, left_out=why, reference_ms=1e3 * reference)
    took, error, threads = best
    row = Row(case.kernel, f"{threads} threads", None, error, 1e3 * took, 1e3 * reference)
    if took > _SLOWER * reference:
        why = f"slower: {1e3 * took:.3f} ms, plain MLX {1e3 * reference:.3f} ms"
        return _left_out(made, case.kernel, why), replace(row, left_out=why)
    if threads != case.threads:
        made = replace(made, most_threads={**made.most_threads, case.kernel: threads})
    return made, row


def _prefill(sizes: ModelSizes, made: Choices, clock: Clock) -> tuple[Choices, list[Row]]:
    """The forms of the gated delta rule that are right, the rows of a threadgroup, and where the forms cross."""
    right, case = {}, rule_case(sizes, 70)
    with forced(Backend.REFERENCE):
        expected = _computed(lambda: case.run("sequential"))
    rows: list[Row] = []
    for form in _forms(sizes):
        name, why, error = f"gated_delta_prefill_{form}", "", 0.0
        for height in (64, 32):
            with chosen(replace(made, prefill_rows=height)):
                found = _tried(partial(case.run, form))
            error = 0.0 if isinstance(found, str) else difference(found, expected)
            if isinstance(found, str) or error > case.tolerance:
                why = why or (found if isinstance(found, str) else f"differs by {error:.1e} of the largest value")
            else:
                right[form, height] = error
        if not any(kind == form for kind, _ in right):
            made = without(made, {name: why}, sizes.widest_key)
            rows.append(Row(name, left_out=why))
    if not right:
        return made, rows
    times = {T: _prefill_times(sizes, T, list(right), made, clock) for T in _PREFILLS}
    longest = times[_PREFILLS[-1]]
    height = min((64, 32), key=lambda each: min((t for (_, h), t in longest.items() if h == each), default=NEVER))
    made = replace(made, prefill_rows=height, chunked_from=_crossing(times, height))
    with forced(Backend.REFERENCE):
        last = rule_case(sizes, _PREFILLS[-1])
        reference = clock("gated_delta_rule", "reference", lambda: last.run("sequential"))
    took = min(t for (_, h), t in longest.items() if h == height)
    crossing = made.chunked_from
    variant = f"{height} rows, chunks " + ("never" if crossing == NEVER else f"from {crossing} tokens")
    error = max(right.values())
    row = Row("gated_delta_rule", variant, None, error, 1e3 * took, 1e3 * reference)
    if took > _SLOWER * reference:
        why = f"slower: {1e3 * took:.3f} ms, plain MLX {1e3 * reference:.3f} ms for {_PREFILLS[-1]} tokens"
        return _left_out(made, "gated_delta_rule", why), [*rows, replace(row, left_out=why)]
    return made, [*rows, row]


def _prefill_times(
    sizes: ModelSizes, T: int, variants: Sequence[tuple[PrefillForm, int]], made: Choices, clock: Clock
) -> dict[tuple[PrefillForm, int], float]:
    case, times = rule_case(sizes, T), {}
    for form, height in variants:
        with chosen(replace(made, prefill_rows=height)), forced(Backend.METAL):
            label = f"gated_delta_prefill_{form}, {height} rows, {T} tokens"
            times[form, height] = clock(label, "kernel", partial(case.run, form))
    return times


def _crossing(times: Mapping[int, Mapping[tuple[PrefillForm, int], float]], height: int) -> int:
    """From how many tokens on the chunked form is the quicker one, as far as was measured."""
    crossing = NEVER
    for T in sorted(times, reverse=True):
        sequential, chunked = (times[T].get((form, height), float("inf")) for form in get_args(PrefillForm))
        if chunked >= sequential:
            break
        crossing = T
    return 0 if crossing == min(times) else crossing


def _contexts(sizes: ModelSizes, made: Choices, clock: Clock) -> tuple[Choices, list[Row]]:
    """Over how many threadgroups attention to a long context is split."""
    if "attention" in made.left_out:
        return made, []
    call, times = context_case(sizes, LONG_CONTEXT), {}
    for groups in _CONTEXT_GROUPS:
        with chosen(replace(made, attention_groups=groups)), forced(Backend.METAL):
            times[groups] = clock(f"attention, {groups} threadgroups", "kernel", call)
    best = min(times, key=lambda groups: (times[groups], groups != made.attention_groups))
    row = Row("attention, a long context", f"{best} threadgroups", kernel_ms=1e3 * times[best])
    return replace(made, attention_groups=best), [row]


def _experts(sizes: ModelSizes, made: Choices, clock: Clock) -> tuple[Choices, list[Row]]:
    """Up to how many rows the two kernels of the experts beat sorting them, and whether the first one routes too."""
    if made.left_out.keys() & {"expert_gate_up", "expert_down_combine"}:
        return replace(made, expert_rows=0), []
    layer = expert_case(sizes)
    ways = {"kernels": replace(made, expert_rows=MOST_EXPERT_ROWS), "sorted": replace(made, expert_rows=0)}
    most = _most_rows("sparse_mlp", ways, _EXPERT_ROWS, lambda rows: layer(rows).layer, clock)
    made = replace(made, expert_rows=most)
    if most and "routed_gate_up" not in made.left_out:
        one = layer(1)
        with chosen(made):
            joined = _took("routed_gate_up, one row", one.routed, clock)
            apart = _took("route and expert_gate_up, one row", one.routed_apart, clock)
        if joined > apart:
            made = _left_out(made, "routed_gate_up", "slower than route and expert_gate_up one after the other")
    return made, [Row("sparse_mlp", f"sorted above {most} rows")]


def _mlp(sizes: ModelSizes, made: Choices, clock: Clock) -> tuple[Choices, list[Row]]:
    """Up to how many rows the kernel of a dense MLP's gate and up beats MLX's product and an activation behind it."""
    if "mlp_gate_up" in made.left_out:
        return made, []
    ways = {"kernel": replace(made, mlp_rows=MOST_MLP_ROWS), "product": replace(made, mlp_rows=0)}
    most = _most_rows("mlp_gate_up", ways, _MLP_ROWS, mlp_case(sizes), clock)
    return replace(made, mlp_rows=most), [Row("dense MLP", f"one kernel up to {most} rows")]


def _most_rows(
    operation: str, ways: Mapping[str, Choices], candidates: Sequence[int], call: Callable[[int], Call], clock: Clock
) -> int:
    """Up to how many rows of the ascending `candidates` the first of two ways is no slower than the second; or 0."""
    most = 0
    for rows in candidates:
        run, took = call(rows), []
        for name, made in ways.items():
            with chosen(made):
                took.append(_took(f"{operation}, {name}, {rows} rows", run, clock))
        if took[0] > took[1]:
            break
        most = rows
    return most


def _took(label: str, call: Call, clock: Clock) -> float:
    """Seconds that kernels take; infinity where one of them fails."""
    try:
        with forced(Backend.METAL):
            return clock(label, "kernel", call)
    except FAILURES:
        return float("inf")


def _forms(sizes: ModelSizes) -> list[PrefillForm]:
    return [form for form in get_args(PrefillForm) if form == "sequential" or sizes.widest_key <= WIDEST_CHUNKED_KEY]


def _left_out(made: Choices, kernel: str, why: str) -> Choices:
    return replace(made, left_out={**made.left_out, kernel: why})


def _computed(run: Call) -> Arrays:
    arrays = run()
    mx.eval(arrays)
    return arrays


def _tried(run: Call) -> Arrays | str:
    """What a kernel computes, or what MLX says where it cannot."""
    try:
        with forced(Backend.METAL):
            return _computed(run)
    except FAILURES as failure:
        return " ".join(str(failure).split())[:300] or type(failure).__name__
