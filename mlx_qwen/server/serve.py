"""Listening: uvicorn around the application, from the line that says where to a clean end."""

import asyncio
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import uvicorn

from mlx_qwen.errors import PromptError
from mlx_qwen.options import GenerationOptions
from mlx_qwen.server.app import Server
from mlx_qwen.server.backend import EngineBackend
from mlx_qwen.server.connections import Connection, allow_files
from mlx_qwen.server.models import Loaded
from mlx_qwen.server.record import LOG
from mlx_qwen.server.settings import ServerSettings
from mlx_qwen.settings import EngineSettings

# Seconds for answers to end after a signal; then connections are cut.
_PATIENCE = 5
_MOST_HEADER_BYTES = 64 << 10
_BACKLOG = 512


def serve(
    sources: Sequence[str],
    settings: ServerSettings,
    options: GenerationOptions,
    engine: EngineSettings,
    *,
    say: Callable[[str], None] = print,
    ready: Loaded | None = None,
) -> None:
    """Answers requests until SIGINT or SIGTERM.

    Args:
        sources: folders and repositories of models; the bundled demo where there are none.
        settings: the server's.
        options: what holds for requests that say nothing.
        engine: how the engine works.
        say: gets the line that tells where the server listens.
        ready: the first model, where it is loaded already; it is never unloaded.

    Raises:
        PromptError: names do not fit together, or nothing can listen there.
    """
    backend = EngineBackend(sources, settings, options, engine, ready)
    bound = listening(settings)
    show_log()
    allow_files()
    try:
        asyncio.run(_run(backend, settings, bound, say))
    finally:
        backend.close()


async def _run(
    backend: EngineBackend, settings: ServerSettings, bound: socket.socket, say: Callable[[str], None]
) -> None:
    beside = [asyncio.ensure_future(work) for work in (backend.models.sweep(), backend.models.warm())]
    host, port = settings.host, bound.getsockname()[1]
    named = f"[{host}]" if ":" in host else host
    names = ", ".join(card.name for card in backend.cards())
    line = f"Listening at http://{named}:{port} with {names}; Ctrl-C ends it."
    listener = Listener(Server(backend, settings), when_up=partial(say, line))
    try:
        await listener.serve(sockets=[bound])
    finally:
        for each in beside:
            each.cancel()


class Listener(uvicorn.Server):
    """Ends on a signal: answers first, then connections. A second signal ends at once.

    `when_up` is called as soon as signals are heard.
    """

    def __init__(self, server: Server, *, when_up: Callable[[], None] = lambda: None) -> None:
        config = uvicorn.Config(
            server,
            lifespan="off",
            ws="none",
            http=Connection,
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_PATIENCE,
            h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
        )
        super().__init__(config)
        self._server, self._when_up = server, when_up

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets)
        self._when_up()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Uvicorn's own would raise the signal again at the end, which makes a failure of it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Let go of clients and end."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._server.flow.close()


def listening(settings: ServerSettings) -> socket.socket:
    """A socket that is bound; raises PromptError where that is not possible."""
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise PromptError(
            f"Nothing can listen at {settings.host}:{settings.port} ({error.strerror or error}). Choose another --port "
            "(0 takes a free one) or --host."
        ) from error
    bound.listen(_BACKLOG)  # whoever read where it listens can connect at once
    return bound


def show_log() -> None:
    """Lines of the log go to stderr, with the time."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
