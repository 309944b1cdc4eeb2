"""The host's share of what the engine does for a token, beside mlx-lm's own loop, and of verifying drafts."""

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import mlx.core as mx

from mlx_qwen.bench.as_on_gpu import weightless
from mlx_qwen.bench.launches import forget_history
from mlx_qwen.bench.table import Table
from mlx_qwen.bench.timing import OURS, PEER
from mlx_qwen.engine.engine import Engine
from mlx_qwen.engine.prefix import PrefixIndex
from mlx_qwen.engine.sequence import Sequence
from mlx_qwen.model import Model
from mlx_qwen.model.mtp import MTP
from mlx_qwen.model.state import State, empty_state
from tools.benchmarks.launches import peer_as_on_gpu
from tools.benchmarks.peer import cache_arrays, random_pair
from tools.benchmarks.small_model import small_config
from tools.benchmarks.stepping import computed, drained, request, step_until, thread_seconds

_TOKENS = 16
_PROMPT = [1, 2, 3, 4, 5]
_DRAFTS = 3


def bench_engine_host(*, repeats: int = 9) -> Table:
    """Time of the computing thread for one token of an answer, and for a pass that verifies three drafts."""
    config = small_config(24, hidden_size=64, intermediate_size=64, heads=2, head_dim=32)
    ours, theirs = random_pair(config, bits=4)
    ours.mtp = MTP(config.text)
    mx.eval(ours.mtp.parameters())
    return computed(lambda: _measured(ours, theirs, repeats))


def _measured(ours: Model, theirs: Any, repeats: int) -> Table:
    engine = Engine(ours, prefixes=PrefixIndex(1 << 30))
    token, verify, answer = _Built(ours, 1), _Built(ours, _DRAFTS + 1), _Written(engine, 0)
    their_token, their_answer = _TheirsBuilt(theirs), _TheirsWritten(theirs)
    drafting = _Written(engine, _DRAFTS)
    turns: dict[str, Callable[[], float]] = {
        "graph": token.turn,
        "their graph": their_token.turn,
        "verify graph": verify.turn,
        "token": answer.turn,
        "their token": their_answer.turn,
        "drafting": drafting.turn,
    }
    times = _in_alternation(turns, repeats) | _as_on_gpu(repeats)
    rows = [
        ("a token's graph as on a GPU", *_compared(times["gpu graph"], times["their gpu graph"], PEER)),
        ("a verified graph of 4 as on a GPU", *_compared(times["gpu verify"], times["gpu graph"], "a token's graph")),
        ("a token's graph, MTP filled", *_compared(times["graph"], times["their graph"], PEER)),
        ("a verified graph of 4 tokens", *_compared(times["verify graph"], times["graph"], "a token's graph")),
        ("a token of an answer, everything on", *_compared(times["token"], times["their token"], PEER)),
        ("a pass with 3 drafts, all of it", *_compared(times["drafting"], times["token"], "a token of an answer")),
    ]
    note = (
        "Time of the thread that computes, without waiting: 24 layers of width 64 at 4 bits, an MTP layer that is "
        f"filled, prefixes kept, a rule; medians of {repeats} turns of {_TOKENS} passes in alternation. An answer's "
        f"token includes choosing it and starting the device; {PEER}'s is `generate_step`'s. The least turn of each "
        "says most on a machine that does something else, too."
    )
    return Table("Host time of the engine", note, ("", OURS, "beside", "its time", "ratio", "of the least"), rows)


def _in_alternation(turns: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each of `repeats` turns of all, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    for turn in range(repeats + 1):
        for name, run in turns.items():
            seconds = run()
            if turn:
                times[name].append(seconds)
    return times


def _as_on_gpu(repeats: int) -> dict[str, list[float]]:
    config = small_config(24, hidden_size=64, intermediate_size=64, heads=2, head_dim=128)
    ours, theirs = random_pair(config, bits=4)
    ours.mtp = MTP(config.text)
    mx.eval(ours.mtp.parameters())
    with peer_as_on_gpu():
        turns = {
            "gpu graph": _BuiltAsOnGPU(ours, 1).turn,
            "their gpu graph": _TheirsBuiltAsOnGPU(theirs).turn,
            "gpu verify": _BuiltAsOnGPU(ours, _DRAFTS + 1).turn,
        }
        return _in_alternation(turns, repeats)


class _Built:
    """Graphs of steps of `count` tokens, taped if there are several, each step after the same state."""

    def __init__(self, model: Model, count: int) -> None:
        self._model, self._ids, self._taped = model, mx.array([[6] * count]), count > 1
        self._state: State = model.step(mx.array([_PROMPT]), empty_state(model.config.text, mtp=True)).state
        self._finish([*self._state.arrays(), self._ids])

    def turn(self) -> float:
        """Seconds a step."""
        total = 0.0
        for _ in range(_TOKENS):
            built: list[mx.array] = []

            def build(built: list[mx.array] = built) -> None:
                stepped = self._model.step(self._ids, self._state, tape=self._taped)
                built += [self._model.logits(stepped.hidden), *stepped.state.arrays()]
                self._next = stepped.state

            total += thread_seconds(build)
            self._state = self._next
            self._finish(built)
        return total / _TOKENS

    def _finish(self, built: list[mx.array]) -> None:
        mx.eval(built)


class _BuiltAsOnGPU(_Built):
    """The same, each step after a state that seems to be there."""

    def _finish(self, built: list[mx.array]) -> None:
        self._state = self._state.mapped(lambda array: weightless(array.shape, array.dtype))


class _TheirsBuilt:
    """Graphs of mlx-lm's steps."""

    def __init__(self, model: Any) -> None:
        self._model, self._cache = model, model.make_cache()
        self._finish([model(mx.array([_PROMPT]), cache=self._cache)])

    def turn(self) -> float:
        """Seconds a token."""
        total = 0.0
        for _ in range(_TOKENS):
            built: list[mx.array] = []

            def build(built: list[mx.array] = built) -> None:
                built.append(self._model(mx.array([[6]]), cache=self._cache)[:, -1])

            total += thread_seconds(build)
            self._finish(built)
        return total / _TOKENS

    def _finish(self, built: list[mx.array]) -> None:
        mx.eval(built, cache_arrays(self._cache))


class _TheirsBuiltAsOnGPU(_TheirsBuilt):
    """The same, each step after a cache that seems to be there."""

    def _finish(self, built: list[mx.array]) -> None:
        forget_history(self._cache)


class _Written:
    """An answer without end in an engine, `drafts` of its tokens guessed at a time."""

    def __init__(self, engine: Engine, drafts: int) -> None:
        self._engine, self._drafts = engine, drafts

    def turn(self) -> float:
        """Seconds a pass; random drafts are hardly ever right, so that all passes are alike."""
        sequence: Sequence = request(self._engine.model, _PROMPT, max_tokens=1 << 12, drafts=self._drafts)
        self._engine.submit(sequence)
        step_until(self._engine, lambda: drained(sequence) > 0)
        total = sum(self._timed(sequence) for _ in range(_TOKENS))
        self._engine.cancel(sequence)
        self._engine.step()
        return total / _TOKENS

    def _timed(self, sequence: Sequence) -> float:
        seconds = thread_seconds(self._engine.step)
        drained(sequence)
        return seconds


class _TheirsWritten:
    """An answer of mlx-lm's generator."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def turn(self) -> float:
        """Seconds a token."""
        from mlx_lm.generate import generate_step

        steps = generate_step(mx.array(_PROMPT), self._model, max_tokens=1 << 12)
        next(steps), next(steps)
        total = sum(thread_seconds(lambda: next(steps)) for _ in range(_TOKENS))
        steps.close()
        return total / _TOKENS


def _compared(seconds: list[float], beside: list[float], name: str) -> tuple[str, ...]:
    own, its = median(seconds), median(beside)
    return f"{1e3 * own:.2f} ms", name, f"{1e3 * its:.2f} ms", f"{own / its:.2f}", f"{min(seconds) / min(beside):.2f}"
