"""Whatever is thrown at the server, it answers the next request."""

import contextlib
import json
import re
import select
import socket
import threading
import time

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from mlx_qwen.server import connections, wire
from tests.server.running import ScriptedBackend, running, serving, words

CHAT, MESSAGE = "/v1/chat/completions", "/v1/messages"
HI = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def url():
    with running(ScriptedBackend(lambda ask, index: words("Well.")), max_body=1) as address:
        yield address


@pytest.fixture(autouse=True)
def _answers_afterwards(url):
    yield
    assert httpx.post(url + CHAT, json=HI, timeout=10).status_code == 200


def connected(url, seconds=10.0):
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=seconds)


def received(connection):
    """Everything up to the end of the connection, or of the answer."""
    data = b""
    with contextlib.suppress(OSError):
        while part := connection.recv(1 << 16):
            data += part
            found = re.search(rb"content-length: (\d+)\r\n.*?\r\n\r\n", data, re.DOTALL)
            if found and len(data) - found.end() >= int(found[1]):
                break
    return data


def raw(url, data):
    """What comes back for bytes as they are."""
    with connected(url) as connection, contextlib.suppress(OSError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return received(connection)
    return b""


def head(*lines, path=CHAT):
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode("latin-1")


@pytest.mark.parametrize("path", [CHAT, MESSAGE])
def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_read(url, path):
    with connected(url) as connection:
        connection.sendall(head(f"Content-Length: {100 << 20}", path=path))
        answer = received(connection)
    assert b" 413 " in answer.split(b"\r\n")[0]
    assert (b"request_too_large" if path == MESSAGE else b"invalid_request_error") in answer


def test_a_body_that_does_not_say_how_large_it_is_is_refused_as_soon_as_it_is_too_large(url):
    with connected(url) as connection:
        connection.sendall(head("Transfer-Encoding: chunked"))
        sent = 0
        while not select.select([connection], [], [], 0)[0]:
            connection.sendall(b"10000\r\n" + b"x" * (1 << 16) + b"\r\n")
            sent += 1 << 16
            assert sent < 20 << 20
        assert b" 413 " in connection.recv(1 << 16)


@pytest.mark.parametrize("length", ["-1", "1e9", "99999999999999999999999", "0x10", "", "٣"])
def test_lengths_that_are_none_are_refused(url, length):
    answer = raw(url, head(f"Content-Length: {length}".encode().decode("latin-1")) + b"{}")
    assert answer.split(b" ")[1] in (b"400", b"413")


BODIES = {
    "nothing": b"",
    "no JSON": b"Hello",
    "half of it": b'{"messages": [{"role": "user", "content": "Hi',
    "two of them": b'{"messages": []}{"messages": []}',
    "a list": b"[]",
    "null": b"null",
    "a number without end": b'{"messages": [], "seed": ' + b"9" * 5000 + b"}",
    "no number": b'{"temperature": NaN}',
    "infinity": b'{"temperature": Infinity}',
    "large exponent": b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": 1e999}',
    "not UTF-8": b'{"messages": "\xff\xfe"}',
    "UTF-16": json.dumps(HI).encode("utf-16"),
    "deep lists": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "deep for us alone": b'{"messages": ' + b"[" * 200 + b"]" * 200 + b"}",
    "form": b"messages=Hi",
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("path", [CHAT, MESSAGE])
def test_bodies_that_are_no_request_are_refused(url, path, body):
    answer = httpx.post(url + path, content=BODIES[body], headers={"content-type": "application/json"}, timeout=10)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "lines",
    [
        [f"X-{n}: {'y' * 1000}" for n in range(200)],
        ["X: " + "y" * 1_000_000],
        ["Transfer-Encoding: chunked", "Content-Length: 5"],
        ["No colon"],
        [f": {'x' * 10}"],
    ],
    ids=["many", "long", "two lengths", "no colon", "no name"],
)
def test_headers_that_are_none_or_too_many_are_refused(url, lines):
    answer = raw(url, head(*lines))
    assert not answer or answer.split(b" ")[1] in (b"400", b"413", b"431")


@pytest.mark.parametrize(
    "line", [b"GET", b"\0\0\0\0", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\0" * 100, b"GET " + b"/" * 99999]
)
def test_bytes_that_are_no_http_are_refused(url, line):
    answer = raw(url, line)
    assert not answer or answer.split(b" ")[1] in (b"400", b"404", b"421", b"505")


def test_connections_that_say_nothing_hold_up_nobody(url):
    silent = [socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) for _ in range(100)]
    try:
        began = time.monotonic()
        assert httpx.post(url + CHAT, json=HI, timeout=10).status_code == 200
        assert time.monotonic() - began < 5
    finally:
        for each in silent:
            each.close()


def test_a_body_that_does_not_come_is_refused_in_time(url, monkeypatch):
    monkeypatch.setattr(wire, "PATIENCE", 0.3)
    for said in ("Content-Length: 100", "Transfer-Encoding: chunked"):
        with connected(url) as connection:
            connection.sendall(head(said) + b"5\r\n{")
            answer = received(connection)
        assert b" 408 " in answer.split(b"\r\n")[0]
        assert b"did not come" in answer


def closed(connection, seconds):
    """What came before the connection was closed; it must be, in time."""
    connection.settimeout(seconds)
    data = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            data += part
    return data


@pytest.mark.parametrize("said", ["nothing", "half a head", "a request, then nothing", "a request, then half a head"])
def test_a_connection_that_does_not_ask_in_time_is_closed(url, monkeypatch, said):
    monkeypatch.setattr(connections, "PATIENCE", 0.3)
    with connected(url) as connection:
        if "request" in said:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in received(connection)
        if "half" in said:
            connection.sendall(b"POST / HTTP/1.1\r\nHost: loc")
        answer = closed(connection, 4)
    assert answer.startswith(b"HTTP/1.1 408") if said == "half a head" else answer == b""


def test_a_body_that_is_not_wanted_any_more_holds_no_connection(url, monkeypatch):
    monkeypatch.setattr(connections, "PATIENCE", 0.3)
    with connected(url) as connection:
        connection.sendall(head(f"Content-Length: {100 << 20}"))
        assert b" 413 " in received(connection)
        ends = time.monotonic() + 10
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < ends:
                connection.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() < ends


def test_an_answer_may_take_longer_than_headers_may(monkeypatch):
    monkeypatch.setattr(connections, "PATIENCE", 0.2)
    with running(ScriptedBackend(lambda ask, index: [1.0, *words("Well.")])) as slow:
        assert httpx.post(slow + CHAT, json=HI, timeout=10).status_code == 200


def test_silent_connections_make_room_for_whoever_asks(url, monkeypatch):
    monkeypatch.setattr(connections, "MOST", 20)
    silent = [connected(url) for _ in range(60)]
    try:
        with httpx.Client(base_url=url, timeout=10) as client:
            for _ in range(3):
                assert client.post(CHAT, json=HI).status_code == 200
            assert sum(bool(select.select([one], [], [], 0)[0]) for one in silent) >= 40
            assert select.select([silent[0]], [], [], 0)[0], "those that have waited longest go"
    finally:
        for each in silent:
            each.close()


def test_a_connection_too_many_is_told_so_where_all_others_are_answered(monkeypatch):
    monkeypatch.setattr(connections, "MOST", 3)
    backend = ScriptedBackend(lambda ask, index: [30.0, *words("Well.")])
    with running(backend) as busy, contextlib.ExitStack() as held:
        body = json.dumps(HI).encode()
        for _ in range(3):
            held.enter_context(connected(busy)).sendall(head(f"Content-Length: {len(body)}") + body)
        while len(backend.asked) < 3:
            time.sleep(0.01)
        answer = closed(held.enter_context(connected(busy)), 5)
        assert answer.startswith(b"HTTP/1.1 503")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_a_schema_without_end_ends_alone():
    loop = {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}}
    backslash = {"type": "string", "pattern": "(a+)+$"}
    with serving() as address:
        for schema in (loop, {"type": "object", "properties": {"x": backslash}}, {"type": "nonsense"}):
            tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
            answer = httpx.post(address + CHAT, json={**HI, "tools": tools, "max_tokens": 2}, timeout=60)
            assert answer.status_code in (200, 400)
        assert httpx.post(address + CHAT, json={**HI, "max_tokens": 2}, timeout=60).status_code == 200


def test_our_own_description_is_kept_to(url):
    described = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [result.ok() for result in described.get_all_operations()]
    assert {operation.path for operation in operations} >= {CHAT, MESSAGE, "/v1/responses", "/v1/models", "/metrics"}
    for operation in operations:
        _throw(operation)


def _throw(operation):
    checks = [
        schemathesis.checks.not_a_server_error,
        schemathesis.specs.openapi.checks.status_code_conformance,
        schemathesis.specs.openapi.checks.content_type_conformance,
        schemathesis.specs.openapi.checks.response_schema_conformance,
    ]

    @given(case=operation.as_strategy())
    @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def check(case):
        case.validate_response(case.call(timeout=10), checks=checks)

    check()


def test_many_threads_of_rubbish_leave_it_well(url):
    def throw(number):
        for body in BODIES.values():
            httpx.post(url + (CHAT, MESSAGE)[number % 2], content=body, timeout=20)

    threads = [threading.Thread(target=throw, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
        assert not each.is_alive()
