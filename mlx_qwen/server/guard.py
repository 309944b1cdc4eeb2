"""Who may ask: names that the server goes by, keys, and pages in browsers."""

import ipaddress
import secrets
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from mlx_qwen.server.refusals import Body, Refusal, anthropic_error, openai_error
from mlx_qwen.server.settings import ServerSettings
from mlx_qwen.server.wire import Receive, Scope, Send, header, send_bytes, send_json

App = Callable[[Scope, Receive, Send], Awaitable[None]]

# What tells nothing that needs a key.
_OPEN = ("/health", "/")


class Guard:
    """Lets through to `app` what comes from here, or with the key; answers everything else itself.

    A page in a browser can reach a server on this machine: directly, which its Origin tells, or by a name of its own
    that points here (DNS rebinding), which Host tells.
    """

    def __init__(self, app: App, settings: ServerSettings) -> None:
        self._app = app
        self._key = settings.api_key
        self._origins = {origin.rstrip("/").lower() for origin in settings.allow_origin}
        own = socket.gethostname().lower()
        names = ("localhost", settings.host, own, own.partition(".")[0] + ".local", *settings.allow_host)
        self._names = {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            return
        origin = header(scope, b"origin")
        allowed = origin is not None and ("*" in self._origins or origin.lower() in self._origins)
        try:
            self._check(scope, origin, allowed=allowed)
        except Refusal as refusal:
            await send_json(send, refusal.status, error_for(scope, refusal), refusal.headers)
            return
        if allowed and scope["method"] == "OPTIONS":
            await send_bytes(send, 204, b"", _preflight(scope, str(origin)))
            return
        await self._app(scope, receive, _with_origin(send, str(origin)) if allowed else send)

    def _check(self, scope: Scope, origin: str | None, *, allowed: bool) -> None:
        host = header(scope, b"host") or ""
        if not self._is_own(host):
            raise Refusal(
                421, f"This server does not go by the name {host!r:.80}. Start it with --allow-host to let it."
            )
        if origin is not None and not allowed and urlsplit(origin).netloc.lower() != host.lower():
            raise Refusal(
                403, f"Pages of {origin!r:.80} may not use this server. Start it with --allow-origin to let them."
            )
        if self._key is None or scope["path"] in _OPEN or scope["method"] == "OPTIONS":
            return
        given = header(scope, b"x-api-key") or (header(scope, b"authorization") or "").removeprefix("Bearer ")
        if not secrets.compare_digest(given.strip().encode(), self._key.encode()):
            raise Refusal(
                401,
                "The API key is missing or wrong. Send it as `Authorization: Bearer …` or `x-api-key`.",
                code="invalid_api_key",
            )

    def _is_own(self, host: str) -> bool:
        """Whether a Host header names this server. Addresses do: only names can be pointed elsewhere."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name.lower().rstrip(".") in self._names
        return True


def error_for(scope: Scope, refusal: Refusal) -> Body:
    """The error in the form of the protocol that the path belongs to."""
    anthropic = scope["path"].startswith("/v1/messages") or header(scope, b"anthropic-version") is not None
    return anthropic_error(refusal) if anthropic else openai_error(refusal)


def _preflight(scope: Scope, origin: str) -> dict[str, str]:
    asked = header(scope, b"access-control-request-headers") or "*"
    return {
        "access-control-allow-origin": origin,
        "access-control-allow-methods": "GET, POST, OPTIONS",
        "access-control-allow-headers": asked,
        "access-control-max-age": "600",
        "vary": "Origin",
    }


def _with_origin(send: Send, origin: str) -> Send:
    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            own = [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin")]
            message = {**message, "headers": [*message.get("headers", []), *own]}
        await send(message)

    return sending
