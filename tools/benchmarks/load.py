"""Many clients at once for minutes: they ask, leave, read slowly, send rubbish; every answer equals its solo run."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from itertools import cycle

import httpx

from mlx_qwen.bench.table import Table
from mlx_qwen.bench.timing import OURS
from mlx_qwen.demo import demo_folder
from tools.benchmarks.servers import Running, gauge, serving

_LINES = 6
_CLIENTS = 32
_QUESTIONS = (
    "Hello",
    "Who are you?",
    "What can you do?",
    "How are you?",
    "Thank you",
    "Bye",
    *(f"What is {a}+{b}?" for a, b in ((37, 58), (12, 30), (401, 77), (9, 9))),
    *(f"{a}+{b}" for a, b in ((137, 58), (2, 3), (90, 17))),
)
_BROKEN = (
    b"",
    b"{",
    b"[]",
    b'{"messages": 5}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": "hot"}',
    b'{"messages": ' + b"[" * 5000,
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}]}',
)
# How each protocol is asked, and where a whole answer and an event hold its text.
_CHAT, _RESPONSES, _MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"


@dataclass
class _Load:
    """What the clients share: the solo answers, and what happened."""

    server: Running
    solo: dict[str, str] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)


def bench_load(minutes: float) -> Table:
    """A server of the bundled model under load; raises nothing: wrong answers are counted in the table."""
    rows = []
    with serving(OURS, demo_folder(), "--temp", "0", "--max-tokens", "200", "--max-queue", "12") as server:
        load = _Load(server)
        asyncio.run(_solo(load))
        started = time.monotonic()
        for line in range(_LINES + 1):
            asyncio.run(_together(load, started + 60 * minutes * line / _LINES))
            time.sleep(2)  # the engine's next step frees what was cancelled
            counted = [load.seen[name] for name in ("right", "WRONG", "left", "refused", "later", "UNTOLD")]
            held = (server.resident() >> 20, gauge(server, "memory_active_bytes") >> 20)
            rows.append(
                (
                    f"{(time.monotonic() - started) / 60:.1f} min",
                    *map(str, (*counted, *held, server.files(), server.threads())),
                )
            )
    note = (
        f"{_CLIENTS} clients of the bundled model, 16 answers at once and 12 that wait: a quarter leaves, reads slowly "
        "or sends rubbish. Right and wrong answers are those equal and not equal to the same question's alone; later: "
        "429 with a time. Memory in MiB, while nobody asks."
    )
    header = ("after", "right", "WRONG", "left", "refused", "later", "UNTOLD", "resident", "arrays", "files", "threads")
    return Table("A server under load", note, header, rows)


async def _solo(load: _Load) -> None:
    async with httpx.AsyncClient(base_url=load.server.url, timeout=120) as client:
        for question in _QUESTIONS:
            load.solo[question] = await _whole(client, _CHAT, question)


async def _together(load: _Load, until: float) -> None:
    await asyncio.gather(*(_client(load, number, until) for number in range(_CLIENTS)))


async def _client(load: _Load, number: int, until: float) -> None:
    """Ask one random thing after the other."""
    rng = random.Random(f"{number} {until}")
    protocols = cycle((_CHAT, _RESPONSES, _MESSAGES))
    async with httpx.AsyncClient(base_url=load.server.url, timeout=300) as client:
        while time.monotonic() < until:
            question, path = rng.choice(_QUESTIONS), next(protocols)
            kind = rng.random()
            try:
                if kind < 0.08:
                    await _broken(load, client, path, rng.choice(_BROKEN))
                elif kind < 0.16:
                    await _leaves(load, client, path, question, seconds=rng.uniform(0.01, 0.8))
                else:
                    slow = rng.uniform(0.01, 0.05) if kind < 0.24 else 0.0
                    ask = _streamed(client, path, question, slow) if kind < 0.7 else _whole(client, path, question)
                    load.seen["right" if await ask == load.solo[question] else "WRONG"] += 1
            except _Refused as refused:
                load.seen["later" if refused.told else "UNTOLD"] += 1
                await asyncio.sleep(rng.uniform(0.1, 0.5))


class _Refused(Exception):  # noqa: N818, what happened
    """429, or anything else that is no answer. `told`: it says when to come again."""

    def __init__(self, answer: httpx.Response) -> None:
        super().__init__(answer.status_code)
        self.told = answer.status_code == 429 and "retry-after" in answer.headers


async def _broken(load: _Load, client: httpx.AsyncClient, path: str, body: bytes) -> None:
    answer = await client.post(path, content=body)
    told = answer.status_code == 400 and bool(answer.json()["error"]["message"])
    load.seen["refused" if told else "UNTOLD"] += 1


async def _leaves(load: _Load, client: httpx.AsyncClient, path: str, question: str, *, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await _streamed(client, path, question, 0.02)
    except (TimeoutError, httpx.TransportError):
        load.seen["left"] += 1


def _body(path: str, question: str) -> dict[str, object]:
    if path == _RESPONSES:
        return {"input": question, "store": False}
    messages = [{"role": "user", "content": question}]
    return {"messages": messages, **({"max_tokens": 200} if path == _MESSAGES else {})}


async def _whole(client: httpx.AsyncClient, path: str, question: str) -> str:
    answer = await client.post(path, json=_body(path, question))
    if answer.status_code != 200:
        raise _Refused(answer)
    return _TEXTS[path](answer.json())


async def _streamed(client: httpx.AsyncClient, path: str, question: str, slow: float) -> str:
    async with client.stream("POST", path, json={**_body(path, question), "stream": True}) as answer:
        if answer.status_code != 200:
            await answer.aread()
            raise _Refused(answer)
        return "".join([_DELTAS[path](event) async for event in _events(answer, slow)])


async def _events(answer: httpx.Response, slow: float) -> "AsyncIterator[dict[str, object]]":
    async for line in answer.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))
            if slow:
                await asyncio.sleep(slow)


_TEXTS: dict[str, Callable[..., str]] = {
    _CHAT: lambda body: body["choices"][0]["message"]["content"],
    _RESPONSES: lambda body: "".join(part["text"] for item in body["output"] for part in item["content"]),
    _MESSAGES: lambda body: "".join(block["text"] for block in body["content"]),
}
_DELTAS: dict[str, Callable[..., str]] = {
    _CHAT: lambda event: event["choices"][0]["delta"].get("content") or "",
    _RESPONSES: lambda event: event["delta"] if event["type"] == "response.output_text.delta" else "",
    _MESSAGES: lambda event: event.get("delta", {}).get("text", "") if "block" in event["type"] else "",
}
