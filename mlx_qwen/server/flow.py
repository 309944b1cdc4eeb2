"""The way of one request: a place in the queue, and its answer as one object or as a stream."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from math import ceil
from time import perf_counter

from mlx_qwen.server.exchange import Exchange, Reader
from mlx_qwen.server.guard import error_for
from mlx_qwen.server.metrics import Metrics
from mlx_qwen.server.reading import Reading
from mlx_qwen.server.record import LEFT, LOG, Record, told
from mlx_qwen.server.refusals import Body, Refusal
from mlx_qwen.server.settings import ServerSettings
from mlx_qwen.server.wire import Gone, Receive, Scope, Send, parse_object, read_body, send_json, send_part, send_start
from mlx_qwen.server.work import Backend, Piece, Prepared

_STREAM = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}
# How many pieces of an answer wait for a client that reads slowly, before the engine waits.
_AHEAD = 16


class Flow:
    """Runs requests: as many as the engine writes at once and some that wait; more are refused for now."""

    def __init__(self, backend: Backend, settings: ServerSettings, metrics: Metrics) -> None:
        self._backend, self._settings, self._metrics = backend, settings, metrics
        self._running: set[asyncio.Task[object]] = set()
        self._seconds = 1.0
        self._closing = False

    @property
    def running(self) -> int:
        """Requests that are answered or wait."""
        return len(self._running)

    def close(self) -> None:
        """End every answer; requests that come now are refused."""
        self._closing = True
        for task in self._running:
            task.cancel()

    async def __call__(self, reader: Reader, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        record = Record(scope["path"])
        out = _Out(send)
        try:
            exchange = reader(*await self.read(scope, receive))
            record.asks(exchange.ask, log_prompt=self._settings.log_prompts)
            with self._place():
                await _unless_gone(receive, self._answer(exchange, record, out))
            record.end(200, self._metrics)
        except Gone:
            record.end(LEFT, self._metrics, "the client left")
        except Exception as error:
            refusal = told(error, record.path)
            # What was wrong may quote the prompt.
            quotes = refusal.status == 400 and not self._settings.log_prompts
            record.end(refusal.status, self._metrics, str(refusal.param) if quotes else refusal.message)
            await out.refuse(refusal, scope)

    async def read(self, scope: Scope, receive: Receive) -> tuple[Body, Reading]:
        """A request's body, and what reading it takes; raises Refusal, or Gone."""
        body, notes = parse_object(await read_body(scope, receive, self._settings.max_body << 20))
        reading = Reading(
            self._settings.allow_url, self._settings.max_images, round(self._settings.max_image_pixels * 1e6)
        )
        reading.notes += notes
        return body, reading

    @contextmanager
    def _place(self) -> Iterator[None]:
        """A place among those that are answered or wait; raises Refusal with 429 where there is none."""
        if self._closing:
            raise Refusal(503, "The server is shutting down.")
        most, began = self._settings.max_batch + self._settings.max_queue, perf_counter()
        if len(self._running) >= most:
            wait = ceil(self._seconds * (1 + self._settings.max_queue / self._settings.max_batch))
            raise Refusal(
                429,
                f"{most} requests are being answered or wait already (--max-batch, --max-queue). Try again in {wait} "
                "seconds.",
                code="rate_limit_exceeded",
                retry_after=min(wait, 60),
            )
        task = asyncio.current_task()
        assert task is not None, "requests run in tasks"
        self._running.add(task)
        try:
            yield
            self._seconds += 0.2 * (perf_counter() - began - self._seconds)
        except asyncio.CancelledError as error:
            if not self._closing:
                raise
            raise Refusal(503, "The server is shutting down.") from error
        finally:
            self._running.discard(task)

    async def _answer(self, exchange: Exchange, record: Record, out: "_Out") -> None:
        stream = exchange.ask.stream
        preparing = asyncio.ensure_future(self._backend.prepare(exchange.ask, record.progress))
        try:
            while stream and not (await asyncio.wait({preparing}, timeout=self._settings.heartbeat))[0]:
                await out.stream(exchange, exchange.ping())
            prepared = await preparing
        finally:
            preparing.cancel()
        async with aclosing(prepared):
            record.prepared(prepared)
            part = exchange.begin(prepared)
            if stream:
                await out.stream(exchange, part)
            async with aclosing(_written(prepared, exchange.ask.count, self._settings.heartbeat)) as pieces:
                async for index, piece in pieces:
                    if piece is not None:
                        record.saw(index, piece)
                        part = exchange.add(index, piece)
                    elif stream:
                        part = exchange.ping()
                    if stream and part:
                        await out.stream(exchange, part)
        part = exchange.end()
        if self._settings.log_prompts:
            LOG.info("%s answer: %r", record.path, exchange.body())
        await (out.stream(exchange, part, more=False) if stream else out.whole(exchange.body()))


class _Out:
    """What goes to the client, and in which form it can still be told of an error."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._stream: Exchange | None = None
        self._begun = False

    async def stream(self, exchange: Exchange, part: bytes, *, more: bool = True) -> None:
        """A part of a stream, behind its headers."""
        if not self._begun:
            self._begun, self._stream = True, exchange
            await send_start(self._send, 200, _STREAM)
        await send_part(self._send, part, more=more)
        self._stream = exchange if more else None

    async def whole(self, body: Body) -> None:
        """The answer as one object."""
        self._begun = True
        await send_json(self._send, 200, body)

    async def refuse(self, refusal: Refusal, scope: Scope) -> None:
        """The error: as the whole response, or as the last part of a stream."""
        try:
            if not self._begun:
                await send_json(self._send, refusal.status, error_for(scope, refusal), refusal.headers)
            elif self._stream is not None:
                await send_part(self._send, self._stream.failed(refusal), more=False)
        except Gone:
            pass


async def _unless_gone(receive: Receive, work: Coroutine[object, object, None]) -> None:
    """Does the work, or stops it as soon as the client leaves, which raises Gone."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _written(prepared: Prepared, count: int, heartbeat: float) -> AsyncGenerator[tuple[int, Piece | None], None]:
    """Pieces of all answers as they come, those of one joined that came together; None after each silence.

    All answers but the first begin when its first piece is there: then their prompt has been read.
    """
    queue: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue(_AHEAD)
    begun = asyncio.Event()

    async def pump(index: int) -> None:
        try:
            if index:
                await begun.wait()
            async with aclosing(prepared.pieces(index)) as pieces:
                async for piece in pieces:
                    begun.set()
                    await queue.put((index, piece))
            await queue.put((index, None))
        except Exception as error:
            await queue.put((index, error))

    pumps = [asyncio.ensure_future(pump(index)) for index in range(count)]
    left = count
    try:
        while left:
            try:
                async with asyncio.timeout(heartbeat):
                    came = [await queue.get()]
            except TimeoutError:
                yield 0, None
                continue
            while not queue.empty():
                came.append(queue.get_nowait())
            joined: dict[int, Piece] = {}
            for index, item in came:
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    left -= 1
                else:
                    joined[index] = joined[index] + item if index in joined else item
            for index, piece in joined.items():
                yield index, piece
    finally:
        for each in pumps:
            each.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
