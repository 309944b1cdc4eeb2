"""Whatever is thrown at the server, it answers the next request."""

import contextlib
import json
import socket
import threading
import time

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings

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


def raw(url, data, seconds=10.0):
    """What comes back for bytes as they are, up to the end of the connection."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=seconds) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        parts = []
        try:
            while part := connection.recv(1 << 16):
                parts.append(part)
        except OSError:
            pass
        return b"".join(parts)


def head(*lines, path=CHAT):
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode("latin-1")


@pytest.mark.parametrize("path", [CHAT, MESSAGE])
def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_read(url, path):
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5) as connection:
        connection.sendall(head(f"Content-Length: {100 << 20}", path=path))
        answer = connection.recv(1 << 16)
    assert b" 413 " in answer.split(b"\r\n")[0]
    assert (b"request_too_large" if path == MESSAGE else b"invalid_request_error") in answer


def test_a_body_that_does_not_say_how_large_it_is_is_cut_off(url):
    sent = 0

    def endless():
        nonlocal sent
        while sent < 100 << 20:
            sent += 1 << 16
            yield b"x" * (1 << 16)

    with contextlib.suppress(httpx.TransportError):  # the connection may end while it is still being sent
        assert httpx.post(url + CHAT, content=endless(), timeout=20).status_code == 413
    assert sent < 20 << 20


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
    assert not answer or answer.split(b" ")[1] in (b"400", b"404", b"505")


def test_connections_that_say_nothing_hold_up_nobody(url):
    silent = [socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) for _ in range(100)]
    try:
        began = time.monotonic()
        assert httpx.post(url + CHAT, json=HI, timeout=10).status_code == 200
        assert time.monotonic() - began < 5
    finally:
        for each in silent:
            each.close()


def test_a_schema_without_end_ends_alone():
    loop = {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}}
    backslash = {"type": "string", "pattern": "(a+)+$"}
    with serving() as address:
        for schema in (loop, {"type": "object", "properties": {"x": backslash}}, {"type": "nonsense"}):
            tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
            answer = httpx.post(address + CHAT, json={**HI, "tools": tools, "max_tokens": 2}, timeout=60)
            assert answer.status_code in (200, 400)
        assert httpx.post(address + CHAT, json={**HI, "max_tokens": 2}, timeout=60).status_code == 200


@pytest.fixture(scope="module")
def described(url):
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


schema = schemathesis.pytest.from_fixture("described")


@schema.parametrize()
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_our_own_description_is_kept_to(case):
    answer = case.call(timeout=10)
    assert answer.status_code < 500
    case.validate_response(answer, checks=[schemathesis.checks.not_a_server_error])


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
