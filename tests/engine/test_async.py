"""Answers in asyncio programs: the loop goes on, answers are the same, and whoever leaves frees the engine at once."""

import asyncio
import gc
import os
import threading
import time
from collections.abc import Awaitable, Callable

import mlx.core as mx
import pytest

from mlx_qwen.async_generation import generate_async, prepare_async, responses_async, stream_generate_async
from mlx_qwen.engine.engine import Engine, Limits, engine_of
from mlx_qwen.engine.lasting import in_thread
from mlx_qwen.engine.prefix import PrefixIndex
from mlx_qwen.engine.sequence import MOST_UNREAD
from mlx_qwen.errors import MLXQwenError, PromptError
from mlx_qwen.generation import generate, stream_generate
from mlx_qwen.options import GenerationOptions
from mlx_qwen.requests import Request
from mlx_qwen.settings import EngineSettings
from tests.engine.conftest import Loaded

ASKED = {"temperature": 0, "max_tokens": 12}
LONG = GenerationOptions(temperature=0, max_tokens=4000)

HELD: list[object] = []


async def started(loaded: Loaded) -> Request:
    return await prepare_async(loaded.model, loaded.processor, [5, 6, 7], LONG, EngineSettings())


async def freed(request: Request) -> bool:
    """Whether the engine lets go of an answer soon."""
    return await asyncio.to_thread(request.sequence.ended.wait, 20)


def test_the_responses_are_those_of_stream_generate(loaded: Loaded) -> None:
    async def run() -> list[object]:
        stream = stream_generate_async(*loaded[:2], [5, 6, 7], **ASKED)
        return [(r.token, r.text, r.finish_reason, r.generation_tokens) async for r in stream]

    expected = stream_generate(*loaded[:2], [5, 6, 7], **ASKED)
    assert asyncio.run(run()) == [(r.token, r.text, r.finish_reason, r.generation_tokens) for r in expected]


def test_threads_that_prepared_prompts_outlive_their_loops(loaded: Loaded) -> None:
    # MLX's random state of a thread aborts a process whose interpreter has ended before the thread has.
    threads = set()

    def worker() -> int:
        threads.add(threading.current_thread())
        return 7

    async def run() -> None:
        await generate_async(*loaded[:2], [5, 6, 7], temperature=1, max_tokens=2)
        assert await asyncio.gather(*(in_thread(worker) for _ in range(20))) == [7] * 20

    for _ in range(3):
        asyncio.run(run())
    assert all(thread.is_alive() for thread in threads)
    assert len([one for one in threading.enumerate() if one.name == "mlx-qwen helper"]) <= (os.cpu_count() or 1) + 4


def test_what_a_thread_raises_is_raised_where_it_is_awaited() -> None:
    async def run() -> None:
        with pytest.raises(ValueError, match="no"):
            await in_thread(int, "no")
        assert await in_thread(int, "a", base=16) == 10

    asyncio.run(run())


def test_many_answers_are_written_together_and_each_is_its_own(loaded: Loaded) -> None:
    prompts = [[5 + i, 6, 7] for i in range(6)]

    async def run() -> list[str]:
        return await asyncio.gather(*(generate_async(*loaded[:2], prompt, **ASKED) for prompt in prompts))

    assert asyncio.run(run()) == [generate(*loaded[:2], prompt, **ASKED) for prompt in prompts]
    assert asyncio.run(run()) == asyncio.run(run())


def test_the_event_loop_goes_on_while_an_answer_is_written(loaded: Loaded) -> None:
    async def run() -> tuple[float, float]:
        worst, over = 0.0, False

        async def ticking() -> None:
            nonlocal worst
            while not over:
                before = time.perf_counter()
                await asyncio.sleep(0.001)
                worst = max(worst, time.perf_counter() - before)

        ticks = asyncio.create_task(ticking())
        begun = time.perf_counter()
        await generate_async(*loaded[:2], list(range(5, 205)) * 10, max_tokens=60, temperature=0)
        over = True
        await ticks
        return worst, time.perf_counter() - begun

    worst, took = asyncio.run(run())
    assert worst < took / 2


async def _while_it_waits_for_a_token(loaded: Loaded, request: Request) -> None:
    async for _ in responses_async(loaded.model, request):
        pass


async def _while_it_does_other_things(loaded: Loaded, request: Request) -> None:
    stream = responses_async(loaded.model, request)
    async for _ in stream:
        await asyncio.sleep(1000)


async def _between_two_of_its_reads(loaded: Loaded, request: Request) -> None:
    stream = responses_async(loaded.model, request)
    HELD.append(stream)
    await anext(stream)
    await asyncio.sleep(1000)


@pytest.mark.parametrize("reads", [_while_it_waits_for_a_token, _while_it_does_other_things, _between_two_of_its_reads])
def test_cancelling_the_task_cancels_the_answer(
    loaded: Loaded, reads: Callable[[Loaded, Request], Awaitable[None]]
) -> None:
    async def run() -> tuple[bool, int]:
        request = await started(loaded)
        task = asyncio.ensure_future(reads(loaded, request))
        while not request.sequence.written:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await freed(request), len(request.sequence.written)

    was_freed, written = asyncio.run(run())
    HELD.clear()
    assert was_freed
    assert written < 2000


def test_leaving_the_loop_closing_or_forgetting_the_stream_cancels_the_answer(loaded: Loaded) -> None:
    async def left(request: Request) -> None:
        async for _ in responses_async(loaded.model, request):
            break

    async def closed(request: Request) -> None:
        stream = responses_async(loaded.model, request)
        await anext(stream)
        await stream.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    async def within(request: Request) -> None:
        async with responses_async(loaded.model, request) as stream:
            await anext(stream)

    async def run() -> list[bool]:
        found = []
        for way in (left, closed, within):
            request = await started(loaded)
            await way(request)
            gc.collect()
            found.append(await freed(request))
        return found

    assert asyncio.run(run()) == [True] * 3


def test_an_answer_may_go_on_in_another_task_than_the_one_that_began_it(loaded: Loaded) -> None:
    async def run() -> str:
        request = await prepare_async(*loaded[:2], [5, 6, 7], GenerationOptions(**ASKED), EngineSettings())
        stream = responses_async(loaded.model, request)
        first = await asyncio.create_task(anext(stream))  # type: ignore[arg-type]
        return first.text + "".join([response.text async for response in stream])

    assert asyncio.run(run()) == generate(*loaded[:2], [5, 6, 7], **ASKED)


def test_a_loop_that_ends_takes_its_answers_with_it(loaded: Loaded) -> None:
    async def run() -> tuple[Request, object]:
        request = await started(loaded)
        stream = responses_async(loaded.model, request)
        await anext(stream)
        return request, stream

    request, stream = asyncio.run(run())
    assert request.sequence.ended.wait(20)
    assert len(request.sequence.written) <= 2 * MOST_UNREAD
    del stream
    assert generate(*loaded[:2], [5, 6, 7], **ASKED)


def test_a_task_that_reads_many_answers_remembers_none_of_them(loaded: Loaded) -> None:
    async def run() -> int:
        for _ in range(5):
            await generate_async(*loaded[:2], [5, 6, 7], temperature=0, max_tokens=2)
        task = asyncio.current_task()
        assert task is not None
        return len(task._callbacks or ())  # type: ignore[attr-defined]

    async def reads_nothing() -> int:
        task = asyncio.current_task()
        return len(task._callbacks or ())  # type: ignore[union-attr]

    assert asyncio.run(run()) == asyncio.run(reads_nothing())


def test_who_reads_slowly_lets_the_answer_run_ahead_only_so_far(loaded: Loaded) -> None:
    async def run() -> int:
        request = await started(loaded)
        async with responses_async(loaded.model, request) as stream:
            await anext(stream)
            await generate_async(*loaded[:2], [8, 9], temperature=0, max_tokens=100)
            return len(request.sequence.written)

    assert asyncio.run(run()) <= MOST_UNREAD + 9


def test_errors_reach_whoever_awaits(loaded: Loaded) -> None:
    with pytest.raises(PromptError, match="There is no option 'temprature'"):
        stream_generate_async(*loaded[:2], [5], temprature=1)  # type: ignore[call-arg]
    with pytest.raises(PromptError, match="prompt"):
        asyncio.run(generate_async(*loaded[:2], []))
    with pytest.raises(MLXQwenError, match="sampler returned"):
        asyncio.run(generate_async(*loaded[:2], [5], sampler=lambda _: mx.array([10**6]), max_tokens=4))


def test_what_waits_for_its_turn_is_cancelled_too(loaded: Loaded) -> None:
    loaded.model.engine = Engine(loaded.model, Limits(most_rows=1), prefixes=PrefixIndex(1 << 20))

    async def run() -> bool:
        first, second = await started(loaded), await started(loaded)
        async with responses_async(loaded.model, first) as stream:
            await anext(stream)
            waiting = asyncio.ensure_future(_while_it_waits_for_a_token(loaded, second))
            await asyncio.sleep(0.01)
            waiting.cancel()
            return await freed(second) and not second.sequence.written

    assert asyncio.run(run())
    assert engine_of(loaded.model).limits.most_rows == 1
