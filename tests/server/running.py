"""Servers that tests run, over the engine or over a script, at a free port of this machine."""

import asyncio
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from mlx_qwen.answer import AnswerDelta, ToolCallDelta
from mlx_qwen.options import GenerationOptions
from mlx_qwen.server.app import Server
from mlx_qwen.server.backend import EngineBackend
from mlx_qwen.server.refusals import Refusal
from mlx_qwen.server.serve import Listener, listening
from mlx_qwen.server.settings import ServerSettings
from mlx_qwen.server.work import Ask, Backend, ModelCard, Piece, Progress
from mlx_qwen.settings import EngineSettings

# A piece, seconds to wait before the next one, or an error.
Step = Piece | float | Exception
Script = Callable[[Ask, int], Sequence[Step]]


@dataclass
class Scripted:
    """A prepared request whose answers are steps of a script."""

    ask: Ask
    script: Script
    begun: list[int] = field(default_factory=list)
    left: list[int] = field(default_factory=list)
    closed: bool = False
    model: str = "scripted"
    prompt_tokens: int = 7

    async def pieces(self, index: int) -> AsyncGenerator[Piece, None]:
        self.begun.append(index)
        try:
            for step in self.script(self.ask, index):
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, Piece):
                    yield step
                else:
                    await asyncio.sleep(step)
        except (asyncio.CancelledError, GeneratorExit):
            self.left.append(index)
            raise

    async def aclose(self) -> None:
        self.closed = True


class ScriptedBackend:
    """Answers by a script; keeps what was asked."""

    def __init__(self, script: Script, *, preparing: float = 0.0) -> None:
        self.script, self.preparing = script, preparing
        self.asked: list[Scripted] = []

    def cards(self) -> list[ModelCard]:
        return [ModelCard("scripted", 4096, True)]

    def find(self, name: str | None) -> str:
        if name not in (None, "scripted"):
            raise Refusal(404, f"There is no model {name!r}.", param="model", code="model_not_found")
        return "scripted"

    async def prepare(self, ask: Ask, progress: Progress) -> Scripted:
        self.find(ask.model)
        await asyncio.sleep(self.preparing)
        self.asked.append(Scripted(ask, self.script))
        return self.asked[-1]


def words(*texts: str, finish: str = "stop", stopped_by: str | None = None) -> list[Step]:
    """Pieces that write texts, one token each."""
    steps: list[Step] = [
        Piece(AnswerDelta(text=text, content=text), tokens=count) for count, text in enumerate(texts, 1)
    ]
    return [*steps, Piece(AnswerDelta(), tokens=len(texts) + 1, finish=finish, stopped_by=stopped_by)]  # type: ignore[arg-type]


def calls(*made: tuple[str, Sequence[str]], finish: str = "tool_calls") -> list[Step]:
    """Pieces that call functions, their arguments in parts."""
    steps: list[Step] = []
    for index, (name, parts) in enumerate(made):
        steps.append(Piece(AnswerDelta(tool_calls=(ToolCallDelta(index, name),)), tokens=len(steps) + 1))
        steps += [
            Piece(AnswerDelta(tool_calls=(ToolCallDelta(index, None, part),)), tokens=len(steps) + 1) for part in parts
        ]
    return [*steps, Piece(AnswerDelta(), tokens=len(steps) + 1, finish=finish)]  # type: ignore[arg-type]


@contextmanager
def running(backend: Backend, **settings: object) -> Iterator[str]:
    """A server over `backend`: its address, without a path."""
    chosen = ServerSettings(port=0, **settings)  # type: ignore[arg-type]
    bound = listening(chosen)
    listener = Listener(Server(backend, chosen))
    thread = threading.Thread(target=lambda: asyncio.run(listener.serve(sockets=[bound])), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        listener.stop()
        thread.join(20)
        assert not thread.is_alive(), "the server ends when it is told to"


@contextmanager
def serving(*sources: str, options: GenerationOptions | None = None, **settings: object) -> Iterator[str]:
    """A server over the engine; greedy, the bundled demo, unless told otherwise."""
    chosen = ServerSettings(port=0, **settings)  # type: ignore[arg-type]
    options = options or GenerationOptions(temperature=0, max_tokens=200)
    with running(EngineBackend(sources, chosen, options, EngineSettings()), **settings) as url:
        yield url


@contextmanager
def command(*arguments: str) -> "Iterator[tuple[subprocess.Popen[str], str]]":
    """The command in a process of its own, once it listens: the process and its address."""
    environment = {key: value for key, value in os.environ.items() if key != "MLX_QWEN_API_KEY"}
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_qwen", "serve", "--port", "0", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    try:
        assert process.stderr is not None
        while "Listening" not in (line := process.stderr.readline()):
            assert line, "it ended before it listened"
        yield process, re.search(r"http://\S+", line)[0]
    finally:
        process.kill()
        process.wait()
