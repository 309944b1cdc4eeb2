"""Signs of life, clients that leave, queues, keys, names and a clean end."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from mlx_qwen.answer import AnswerDelta
from mlx_qwen.errors import PromptError
from mlx_qwen.server.record import Record
from mlx_qwen.server.settings import ServerSettings
from mlx_qwen.server.work import Piece
from tests.server.running import ScriptedBackend, command, running, serving, words

CHAT, TEXT, RESPONSE, MESSAGE = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
HI = [{"role": "user", "content": "Hi"}]
GOOD = {
    CHAT: {"messages": HI},
    TEXT: {"prompt": "Hi"},
    RESPONSE: {"input": "Hi"},
    MESSAGE: {"messages": HI, "max_tokens": 5},
}
# What each protocol sends while nothing is written.
SIGNS = {
    CHAT: lambda event: event["choices"][0]["delta"] == {},
    TEXT: lambda event: event["choices"][0]["text"] == "",
    RESPONSE: lambda event: event["type"] == "response.in_progress",
    MESSAGE: lambda event: event["type"] == "ping",
}


def until(condition, seconds=20.0):
    """Waits for a condition that another thread brings about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("where", ["preparing", "reading"])
def test_a_stream_gives_signs_of_life_while_nothing_is_written(path, where):
    silent = 0.6
    script = words("Well.") if where == "preparing" else [silent, *words("Well.")]
    backend = ScriptedBackend(lambda ask, index: script, preparing=silent if where == "preparing" else 0.0)
    asked = {"json": {**GOOD[path], "stream": True}, "timeout": 20}
    with running(backend, heartbeat=0.1) as url, httpx.stream("POST", url + path, **asked) as answer:
        began = time.monotonic()
        lines = [line for line in answer.iter_lines() if line.startswith("data: {")]
        assert time.monotonic() - began > 0.2, "headers came at once"
    signs = sum(SIGNS[path](json.loads(line.removeprefix("data: "))) for line in lines)
    assert signs >= 3


def test_a_request_that_is_refused_in_time_has_its_status_also_when_it_streams():
    backend = ScriptedBackend(lambda ask, index: words("Well."))
    with running(backend, heartbeat=0.5) as url:
        assert httpx.post(url + CHAT, json={**GOOD[CHAT], "stream": True, "model": "x"}).status_code == 404


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", GOOD)
def test_a_client_that_leaves_stops_its_work_at_once(path, stream):
    backend = ScriptedBackend(lambda ask, index: [*words("one ")[:-1], 60.0, *words("two")])
    with running(backend) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + path, json={**GOOD[path], "stream": stream}, timeout=0.3)
        until(lambda: backend.asked and backend.asked[0].closed, seconds=2)
        assert backend.asked[0].left == [0]
        assert 'status="499"} 1' in httpx.get(f"{url}/metrics").text


def test_a_client_that_leaves_during_prefill_frees_the_engine():
    long = "the quick brown fox jumps over the lazy dog " * 90
    with serving() as url:
        httpx.post(url + TEXT, json={"prompt": "warm", "max_tokens": 2}, timeout=60)
        for _ in range(3):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url + TEXT, json={"prompt": f"{_} {long}", "max_tokens": 2000}, timeout=0.2)
        until(lambda: "mlx_qwen_requests_running 0" in httpx.get(f"{url}/metrics", timeout=20).text)
        assert httpx.post(url + TEXT, json={"prompt": "again", "max_tokens": 2}, timeout=60).status_code == 200


def test_a_client_that_takes_nothing_holds_up_nobody_else():
    flood = [*[Piece(AnswerDelta(content="x" * 10_000), n) for n in range(1, 2000)], *words("end")]
    backend = ScriptedBackend(lambda ask, index: flood if ask.choices.get("seed") else words("Well."))
    with running(backend) as url, socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as lazy:
        body = json.dumps({**GOOD[CHAT], "stream": True, "seed": 1}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        lazy.sendall(head.encode() + body)
        until(lambda: len(backend.asked) == 1)
        for _ in range(3):
            assert httpx.post(url + CHAT, json=GOOD[CHAT], timeout=10).status_code == 200


def test_more_requests_than_the_queue_takes_are_refused_with_a_time():
    backend = ScriptedBackend(lambda ask, index: [30.0, *words("Well.")])

    async def ask(url):
        async with httpx.AsyncClient(base_url=url, timeout=20) as client:
            held = [asyncio.ensure_future(client.post(CHAT, json=GOOD[CHAT])) for _ in range(3)]
            while len(backend.asked) < 3:
                await asyncio.sleep(0.01)
            refused = [await client.post(path, json=good) for path, good in GOOD.items()]
            health = await client.get("/health")
            for each in held:
                each.cancel()
            return refused, health

    with running(backend, max_batch=2, max_queue=1) as url:
        refused, health = asyncio.run(ask(url))
        assert health.status_code == 200
        for answer in refused:
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
            assert "error" in answer.json()
        until(lambda: all(each.closed for each in backend.asked), seconds=5)


KEY = {"api_key": "secret"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Bearer secret"}, 200),
        ({"x-api-key": "secret"}, 200),
        ({"x-api-key": ""}, 401),
        ({"x-api-key": "ünknown".encode()}, 401),
    ],
    ids=str,
)
def test_without_the_key_nothing_is_answered(headers, status):
    with running(ScriptedBackend(lambda ask, index: words("Well.")), **KEY) as url:
        for path, good in GOOD.items():
            answer = httpx.post(url + path, json=good, headers=headers)
            assert answer.status_code == status
            assert status == 200 or answer.json()["error"]["type"] == "authentication_error"
        for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/nothing"):
            assert httpx.get(url + path, headers=headers).status_code == (
                404 if status == 200 and "nothing" in path else status
            )
        assert httpx.get(f"{url}/health").status_code == 200


@pytest.fixture(scope="module")
def url():
    with running(ScriptedBackend(lambda ask, index: words("Well.")), allow_origin=["https://chat.example"]) as address:
        yield address


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:80", "[::1]:8080", "10.0.0.3", "LOCALHOST."])
def test_names_of_this_machine_are_answered(url, host):
    assert httpx.get(f"{url}/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "localhost.evil.example", "", "127.0.0.1.nip.io", "[bad"]
)
def test_a_name_that_points_here_is_refused(url, host):
    assert httpx.get(f"{url}/health", headers={"host": host}).status_code == 421


def test_pages_of_other_sites_may_not_ask(url):
    for origin in ("https://evil.example", "null", "http://localhost:1"):
        answer = httpx.post(url + CHAT, json=GOOD[CHAT], headers={"origin": origin})
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
    assert httpx.post(url + CHAT, json=GOOD[CHAT], headers={"origin": url}).status_code == 200


def test_pages_that_were_allowed_may_ask(url):
    origin = {"origin": "https://chat.example"}
    asked = {**origin, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    before = httpx.options(url + CHAT, headers=asked)
    assert before.status_code == 204
    assert before.headers["access-control-allow-headers"] == "content-type"
    answer = httpx.post(url + CHAT, json=GOOD[CHAT], headers=origin)
    assert answer.headers["access-control-allow-origin"] == "https://chat.example"


def test_an_address_that_others_reach_needs_a_key():
    with pytest.raises(PromptError, match="--api-key"):
        ServerSettings(host="0.0.0.0")
    assert ServerSettings(host="0.0.0.0", api_key="secret").api_key == "secret"


def test_nothing_is_told_of_what_is_not_there(url):
    for path in (
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/v1/models/../../x",
        "/v1/models/%00",
    ):
        with httpx.Client(base_url=url) as client:
            assert client.get(path).status_code == 404
    wrong = httpx.get(url + CHAT)
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"


def test_the_log_has_a_line_for_a_request_and_nothing_of_its_prompt():
    with command() as (process, url):
        asked = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
        assert httpx.post(url + CHAT, json=asked, timeout=60).status_code == 200
        assert httpx.post(url + CHAT, json={"messages": [{"role": "Hello"}]}).status_code == 400
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        log = process.stderr.read()
    line, refused = [line for line in log.splitlines() if CHAT in line]
    assert refused.endswith("400, messages[0].role")
    assert re.search(
        r"200, mlx-qwen-demo: \d+ prompt tokens \(\d+ cached\), first after .* s .*, \d+ written .*, stop", line
    )
    assert "Hello" not in log
    assert "tiny" not in log


def test_prompts_are_logged_where_that_was_asked_for(caplog):
    backend = ScriptedBackend(lambda ask, index: words("Well."))
    with running(backend, log_prompts=True) as url, caplog.at_level("INFO", logger="mlx_qwen.server"):
        httpx.post(url + CHAT, json=GOOD[CHAT])
    assert "'Hi'" in caplog.text
    assert "Well." in caplog.text


def test_a_port_that_is_taken_is_told_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = subprocess.run(
            [sys.executable, "-m", "mlx_qwen", "serve", "--port", port],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert ended.returncode == 1
    assert f"127.0.0.1:{port}" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_is_told_with_the_extra_that_brings_it(package):
    program = f"import sys; sys.modules[{package!r}] = None; from mlx_qwen.cli import main; main(['serve'])"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "pip install 'mlx-qwen[serve]'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_long_prefill_has_lines_of_its_own(caplog, monkeypatch):
    record = Record("/v1/messages")
    clock = iter(range(0, 100, 1))
    monkeypatch.setattr("mlx_qwen.server.record.perf_counter", lambda: float(next(clock)) + record._began)
    with caplog.at_level("INFO", logger="mlx_qwen.server"):
        for done in range(1000, 9001, 1000):
            record.progress(done, 9000)
    lines = [line.getMessage() for line in caplog.records]
    assert lines[0] == "/v1/messages reading the prompt: 3,000 of 9,000 tokens"
    assert len(lines) == 3
