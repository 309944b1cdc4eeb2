"""The application: which address runs what."""

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial

import mlx.core as mx
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from mlx_qwen.json_types import Json
from mlx_qwen.server.chat import ChatExchange
from mlx_qwen.server.completions import CompletionExchange
from mlx_qwen.server.exchange import Reader
from mlx_qwen.server.flow import Flow
from mlx_qwen.server.guard import Guard, error_for
from mlx_qwen.server.messages import MessagesExchange, read_messages
from mlx_qwen.server.metrics import Metrics
from mlx_qwen.server.openapi import document
from mlx_qwen.server.page import page
from mlx_qwen.server.record import told
from mlx_qwen.server.refusals import Body, Refusal
from mlx_qwen.server.responses import ResponseExchange
from mlx_qwen.server.settings import ServerSettings
from mlx_qwen.server.stored import Stored
from mlx_qwen.server.wire import Gone, Receive, Scope, Send, send_json
from mlx_qwen.server.work import Backend, ModelCard

# When models were released is not known; Anthropic's clients expect a time.
_EPOCH = "1970-01-01T00:00:00Z"


class Server:
    """An ASGI application over a backend; `flow.close` ends its answers."""

    def __init__(self, backend: Backend, settings: ServerSettings) -> None:
        self._backend, self._settings = backend, settings
        self.metrics = Metrics()
        self.flow = Flow(backend, settings, self.metrics)
        stored = Stored()
        readers: dict[str, Reader] = {
            "/v1/chat/completions": ChatExchange,
            "/v1/completions": CompletionExchange,
            "/v1/responses": partial(ResponseExchange, stored=stored),
            "/v1/messages": MessagesExchange,
        }
        routes = [Route(path, _Post(partial(self.flow, reader)), methods=["POST"]) for path, reader in readers.items()]
        routes += [
            Route("/v1/messages/count_tokens", _Post(self._count_tokens), methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/health", self._health),
            Route("/", page),
            Route("/metrics", self._metrics),
            Route("/openapi.json", self._document),
        ]
        self._app = Guard(
            Starlette(routes=routes, exception_handlers={HTTPException: _http_error, Exception: _server_error}),
            settings,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        await self._app(scope, receive, send)

    async def _count_tokens(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body, reading = await self.flow.read(scope, receive)
            ask = read_messages(body, reading, counting=True)
            async with aclosing(await self._backend.prepare(ask, lambda done, total: None)) as prepared:
                counted: Body = {"input_tokens": prepared.prompt_tokens}
            await send_json(send, 200, counted)
        except Gone:
            pass
        except Exception as error:
            refusal = told(error, scope["path"])
            await send_json(send, refusal.status, error_for(scope, refusal), refusal.headers)

    async def _models(self, request: Request) -> Response:
        data: list[Json] = [_described(card) for card in self._backend.cards()]
        first, last = (self._backend.cards()[at].name for at in (0, -1))
        listed: Body = {"object": "list", "data": data, "has_more": False, "first_id": first, "last_id": last}
        return JSONResponse(listed)

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        try:
            found = self._backend.find(name)
        except Refusal as refusal:
            return JSONResponse(error_for(request.scope, refusal), refusal.status)
        card = next(card for card in self._backend.cards() if card.name == found)
        return JSONResponse(_described(replace(card, name=name)))

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        running, most = self.flow.running, self._settings.max_batch
        gauges = [
            ("requests_running", "Requests that are answered.", min(running, most)),
            ("requests_waiting", "Requests in the queue.", max(running - most, 0)),
            ("models_loaded", "Models that are loaded.", sum(card.loaded for card in self._backend.cards())),
            ("memory_active_bytes", "Memory that arrays take.", mx.get_active_memory()),
            ("memory_cached_bytes", "Memory that MLX keeps for later arrays.", mx.get_cache_memory()),
            ("memory_peak_bytes", "The most that arrays have taken.", mx.get_peak_memory()),
        ]
        return PlainTextResponse(self.metrics.text(gauges), media_type="text/plain; version=0.0.4")

    async def _document(self, request: Request) -> Response:
        return JSONResponse(document())


class _Post:
    """An endpoint that gets the three parts of a request as they are, rather than wrapped."""

    def __init__(self, answer: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(scope, receive, send)


def _described(card: ModelCard) -> Body:
    """A model as OpenAI's and Anthropic's clients read it."""
    return {
        "id": card.name,
        "object": "model",
        "created": 0,
        "owned_by": "mlx-qwen",
        "type": "model",
        "display_name": card.name,
        "created_at": _EPOCH,
        "lifecycle": "active",
        "max_input_tokens": card.context,
        "loaded": card.loaded,
    }


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for it alone"
    what = f"{request.method} {request.url.path}"
    message = f"There is nothing at {what:.200}." if error.status_code == 404 else f"{what:.200}: {error.detail}."
    refusal = Refusal(error.status_code, message)
    return JSONResponse(error_for(request.scope, refusal), error.status_code, error.headers)


async def _server_error(request: Request, error: Exception) -> Response:
    refusal = told(error, request.url.path)
    return JSONResponse(error_for(request.scope, refusal), refusal.status)
