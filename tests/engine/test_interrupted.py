"""An interrupted answer, as by the stop button of a notebook, leaves everything usable."""

import atexit
import signal
import subprocess
import sys
from collections.abc import Callable
from queue import SimpleQueue
from threading import current_thread

import mlx.core as mx
import pytest

from mlx_qwen.engine.engine import engine_of
from mlx_qwen.engine.lasting import LastingThread
from mlx_qwen.engine.thread import _Computing
from mlx_qwen.generation import generate, stream_generate
from tests.engine.conftest import Loaded

PROMPT = list(range(10, 60))


def interrupting(after: int) -> object:
    """A logits processor that interrupts the process when so many tokens were chosen."""
    calls: list[int] = []

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        calls.append(1)
        if len(calls) == after:
            signal.raise_signal(signal.SIGINT)
        return logits

    return process


@pytest.mark.parametrize("after", [1, 2, 5])
def test_an_answer_after_an_interrupted_one_is_as_before(loaded: Loaded, after: int) -> None:
    model, processor, _ = loaded
    before = generate(model, processor, PROMPT, temperature=0, max_tokens=12)
    with pytest.raises(KeyboardInterrupt):
        generate(
            model,
            processor,
            PROMPT,
            temperature=0,
            max_tokens=12,
            logits_processors=[interrupting(after)],  # type: ignore[list-item]
        )
    assert generate(model, processor, PROMPT, temperature=0, max_tokens=12) == before


def test_an_interrupted_stream_leaves_whole_tokens_in_its_cache(loaded: Loaded) -> None:
    model, processor, _ = loaded
    whole = [r.token for r in stream_generate(model, processor, PROMPT, temperature=0, max_tokens=12)]
    cache, written = model.make_cache(), []
    with pytest.raises(KeyboardInterrupt):
        for response in stream_generate(model, processor, PROMPT, temperature=0, max_tokens=12, prompt_cache=cache):
            written.append(response.token)
            if len(written) == 5:
                signal.raise_signal(signal.SIGINT)
    assert written == whole[:5]
    read = cache.offset - len(PROMPT)
    assert 5 <= read < 12
    following = model(mx.array([[whole[read]]]), cache)[:, -1]
    assert mx.argmax(following, axis=-1).item() == whole[read + 1]


def test_a_stream_that_is_dropped_half_way_disturbs_no_later_answer(loaded: Loaded) -> None:
    model, processor, _ = loaded
    before = generate(model, processor, PROMPT, temperature=0, max_tokens=8)
    for response in stream_generate(model, processor, PROMPT, temperature=0, max_tokens=8):
        if response.generation_tokens == 3:
            break
    assert generate(model, processor, PROMPT, temperature=0, max_tokens=8) == before


def interrupting_once(original: Callable[..., object]) -> Callable[..., object]:
    """What `original` does, with an interrupt behind its first call."""
    calls: list[int] = []

    def call(*given: object) -> object:
        calls.append(1)
        done = original(*given)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return done

    return call


def test_an_answer_that_is_interrupted_before_anybody_reads_it_is_let_go(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor, _ = loaded
    before = generate(model, processor, PROMPT, temperature=0, max_tokens=12)
    engine, asked = engine_of(model), []
    monkeypatch.setattr(engine, "arrive", interrupting_once(engine.arrive))
    monkeypatch.setattr(engine, "check", asked.append)
    with pytest.raises(KeyboardInterrupt):
        generate(model, processor, PROMPT, temperature=0, max_tokens=3000)
    assert generate(model, processor, PROMPT, temperature=0, max_tokens=12) == before
    assert asked[0].ended.wait(10)
    assert len(asked[0].written) < 3000


@pytest.mark.parametrize("when", ["start", "__init__"])
def test_an_interrupt_while_the_computing_thread_begins_leaves_one_that_computes(
    monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    stepped: SimpleQueue[str] = SimpleQueue()

    class Work:
        def step(self) -> bool:
            stepped.put(current_thread().name)
            return False

    computing = _Computing()
    monkeypatch.setattr(atexit, "register", lambda *_: None)
    monkeypatch.setattr(LastingThread, when, interrupting_once(getattr(LastingThread, when)))
    with pytest.raises(KeyboardInterrupt):
        computing.wake(Work())
    computing.wake(Work())
    assert stepped.get(timeout=10) == "mlx-qwen engine"


@pytest.mark.parametrize("taken", [0, 3, 12])
def test_a_program_that_leaves_an_answer_ends_well(taken: int) -> None:
    program = (
        "import sys, mlx_qwen; model, processor = mlx_qwen.load(); taken = int(sys.argv[1])\n"
        "stream = mlx_qwen.stream_generate(model, processor, 'Monday, Tuesday,', max_tokens=500, temperature=0)\n"
        "for response, _ in zip(stream, range(taken)): pass\n"
        "print('left')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(taken)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")


def test_a_program_that_ends_while_the_engine_wakes_ends_well() -> None:
    # The engine's thread, woken by what is left to do, gets its turn when the interpreter is half gone.
    program = (
        "import sys, time, mlx_qwen; from mlx_qwen.engine.engine import engine_of; model, processor = mlx_qwen.load()\n"
        "mlx_qwen.generate(model, processor, 'Monday, Tuesday,', max_tokens=8, temperature=0); time.sleep(0.2)\n"
        "sys.setswitchinterval(60); engine_of(model).go_on()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
