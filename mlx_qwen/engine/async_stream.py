"""The engine's answers in an asyncio program: tokens as they come, without blocking the event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from typing import Generic, Self, TypeVar

from mlx_qwen.engine.emission import Emission
from mlx_qwen.engine.engine import Engine
from mlx_qwen.engine.sequence import Sequence

T = TypeVar("T")


class AsyncStream(AsyncIterator[T], Generic[T]):
    """What `made` makes of a sequence's tokens, one by one; the sequence is submitted with the first that is asked for.

        async for response in AsyncStream(engine, sequence, made):
            await send(response)

    Cancelling the task that reads cancels the sequence at once, wherever the task is waiting; so do leaving the loop,
    `async with`, and `aclose`. `made` runs in the event loop's thread. Tokens that come faster than they are read wait,
    and then the engine waits, as with any reader. Raises what `Engine.stream` raises.
    """

    def __init__(self, engine: Engine, sequence: Sequence, made: Callable[[Emission], T]) -> None:
        self._engine, self._sequence, self._made = engine, sequence, made
        self._arrived: asyncio.Event | None = None
        self._task: asyncio.Task[object] | None = None
        self._task_ended: Callable[[asyncio.Task[object]], None] = partial(_ended, engine, sequence)
        self._over = False

    async def __anext__(self) -> T:
        if self._over:
            raise StopAsyncIteration
        arrived = self._arrived or self._begun()
        self._watch(asyncio.current_task())
        unread = self._sequence.unread
        try:
            while unread.empty():
                arrived.clear()
                if unread.empty():
                    await arrived.wait()
        except asyncio.CancelledError:
            self._end()
            raise
        was_full, item = self._sequence.waits_for_reader, unread.get_nowait()
        if was_full or unread.empty():
            self._engine.go_on()
        if isinstance(item, Emission):
            return self._made(item)
        self._finish()
        raise StopAsyncIteration if item is None else item

    async def aclose(self) -> None:
        """Read no more; an answer that is not finished is cancelled."""
        self._end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._end()

    def __del__(self) -> None:
        self._end()

    def _begun(self) -> asyncio.Event:
        loop, self._arrived = asyncio.get_running_loop(), asyncio.Event()
        sequence, tell = self._sequence, self._arrived.set

        def on_item() -> None:
            # A loop that is closed has no reader any more.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(tell)
                return
            sequence.cancelled = True

        sequence.on_item = on_item
        self._engine.submit(sequence)
        return self._arrived

    def _watch(self, task: "asyncio.Task[object] | None") -> None:
        """End with the task that reads, if it is cancelled while it does other things than wait for a token."""
        if task is not self._task:
            if self._task is not None:
                self._task.remove_done_callback(self._task_ended)
            if task is not None:
                task.add_done_callback(self._task_ended)
            self._task = task

    def _end(self) -> None:
        if self._arrived is not None and not self._over:
            _cancel(self._engine, self._sequence)
        self._finish()

    def _finish(self) -> None:
        self._over = True
        self._watch(None)


def _ended(engine: Engine, sequence: Sequence, task: "asyncio.Task[object]") -> None:
    if task.cancelled():
        _cancel(engine, sequence)


def _cancel(engine: Engine, sequence: Sequence) -> None:
    if sequence.finish_reason is None and not sequence.failed:
        engine.cancel(sequence)
