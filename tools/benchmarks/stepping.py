"""An engine driven step by step by whoever measures it, in the thread that computes."""

import time
from collections.abc import Callable
from collections.abc import Sequence as Listed
from queue import SimpleQueue
from typing import TypeVar

import mlx.core as mx

from mlx_qwen.engine.depth import Drafts
from mlx_qwen.engine.emission import Emission, Endless
from mlx_qwen.engine.engine import Engine
from mlx_qwen.engine.prefix import prefix_key
from mlx_qwen.engine.rules import Rules
from mlx_qwen.engine.sampling import TokenSampler
from mlx_qwen.engine.sequence import Sequence
from mlx_qwen.engine.thinking import Thinking
from mlx_qwen.engine.thread import wake
from mlx_qwen.model import Model
from mlx_qwen.recommended import SamplingParameters

T = TypeVar("T")


class _Once:
    """Work of a single step."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run

    def step(self) -> bool:
        """Do it."""
        self._run()
        return False


def computed(run: Callable[[], T]) -> T:
    """What `run` returns, run in the computing thread: no engine steps by itself meanwhile."""
    done: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def task() -> None:
        try:
            done.put((run(), None))
        except BaseException as error:
            done.put((None, error))

    wake(_Once(task))
    result, error = done.get()
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def request(
    model: Model,
    ids: Listed[int],
    *,
    max_tokens: int,
    drafts: int | None = 0,
    sampling: SamplingParameters | None = None,
    seed: int | None = 0,
) -> Sequence:
    """A sequence as a server makes it, but without text: a rule counts its reasoning, and prefixes are kept."""
    sampler = TokenSampler(
        sampling or SamplingParameters(temperature=0),
        prompt=mx.array(list(ids)),
        vocab_size=model.config.text.vocab_size,
        seed=seed,
    )
    mx.eval(sampler.prompt)
    budget = Thinking(1 << 30, thinking=(1, 2), closing=[2], inside=True)
    return Sequence(
        list(ids),
        sampler,
        Rules([budget]),
        Endless(),
        max_tokens,
        Drafts(drafts),
        key=prefix_key(ids),
        anchors=[len(ids)],
        answer_from=len(ids),
    )


def drained(sequence: Sequence) -> int:
    """How many tokens came that were not read yet; an error that came is raised."""
    tokens = 0
    while not sequence.unread.empty():
        item = sequence.unread.get()
        if isinstance(item, BaseException):
            raise item
        tokens += isinstance(item, Emission)
    return tokens


def thread_seconds(run: Callable[[], object]) -> float:
    """Seconds that this thread computed for `run`: neither what others do nor waiting for the device counts."""
    started = time.thread_time()
    run()
    return time.thread_time() - started


def step_until(engine: Engine, is_done: Callable[[], bool]) -> None:
    """Step in the computing thread until `is_done`."""
    while not is_done():
        engine.step()
