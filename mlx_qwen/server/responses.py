"""`/v1/responses`."""

import time
from collections.abc import Sequence

from mlx_qwen.json_types import Json, Message, tool_name
from mlx_qwen.prompt.messages import function_tools as as_functions
from mlx_qwen.prompt.shapes import standard_messages
from mlx_qwen.server.exchange import new_id
from mlx_qwen.server.fields import Fields
from mlx_qwen.server.messages import whole_members
from mlx_qwen.server.openai_fields import EFFORTS, MOST_TOP_LOGPROBS, given, sampling, thinking, tool_choice
from mlx_qwen.server.reading import Reading, function_tools, tool_of
from mlx_qwen.server.refusals import Body, Refusal
from mlx_qwen.server.response_items import Events, Items
from mlx_qwen.server.stored import Stored
from mlx_qwen.server.work import Ask, Piece, Prepared

_LOGPROBS = "message.output_text.logprobs"
_ROLES = ("system", "developer", "user", "assistant")
_SEALED = "reasoning.encrypted_content"


def read_response(body: Body, reading: Reading, stored: Stored) -> Ask:
    """What a request asks for, behind the conversation that it goes on with."""
    fields = Fields(body)
    fields.forbid(
        background="every answer is written at once.",
        conversation="send previous_response_id, or all items.",
        prompt="send the text itself as input.",
    )
    messages: list[Message] = _input(fields, reading)
    if (earlier := fields.text("previous_response_id")) is not None:
        messages = [*stored.get(earlier), *messages]
    if instructions := fields.text("instructions"):
        messages = [{"role": "system", "content": instructions}, *messages]
    if not messages:
        raise Refusal(400, "input is empty; expected at least one item.", param="input")
    tools = function_tools(fields.objects("tools"), reading, _tool)
    names = [name for tool in tools if (name := tool_name(tool))]
    top = fields.whole("top_logprobs", least=0, most=MOST_TOP_LOGPROBS)
    own = {
        "max_tokens": fields.whole("max_output_tokens", least=1),
        "tools": tools or None,
        "tool_choice": tool_choice(body.get("tool_choice"), names),
        "parallel_tool_calls": None if fields.flag("parallel_tool_calls", default=True) else False,
        "response_format": _format(fields.inner("text").inner("format")),
        "reasoning_effort": fields.inner("reasoning").one_of("effort", EFFORTS),
        "logprobs": top or 0 if top is not None or _LOGPROBS in (fields.items("include") or []) else None,
    }
    return Ask(
        model=fields.text("model"),
        prompt=messages,
        choices={**sampling(fields), **thinking(fields), **given(own)},
        stream=fields.flag("stream"),
        notes=tuple(reading.notes),
    )


def _input(fields: Fields, reading: Reading) -> list[Message]:
    """The messages that a text or a list of items stands for."""
    if isinstance(fields.body.get("input"), str):
        return [{"role": "user", "content": fields.text("input")}]
    items = fields.objects("input")
    if items is None:
        raise Refusal(400, "input is missing; expected a text or a list of items.", param="input")
    return reading.messages(items, "input", roles=_ROLES)


def _tool(tool: Body, at: str) -> dict[str, object] | None:
    """A function tool, or a custom one as a function of its text; None for one of another type."""
    if tool.get("type") == "custom":
        described = next(iter(as_functions([tool])), {}).get("function", {})
        assert isinstance(described, dict), "as it was made"
        return tool_of(described, described.get("parameters"), at)
    if tool.get("type") != "function":
        return None
    return tool_of(tool, tool.get("parameters"), at)


def _format(form: Fields) -> Body | None:
    """The format as chat/completions has it."""
    kind = form.one_of("type", ("text", "json_object", "json_schema"))
    if form.body and kind is None:
        raise Refusal(400, f"{form.path('type')} is missing.", param=form.path("type"))
    if kind in (None, "text"):
        return None
    if kind == "json_object":
        return {"type": kind}
    return {"type": kind, "json_schema": {key: value for key, value in form.body.items() if key != "type"}}


class ResponseExchange:
    """One response, item after item."""

    def __init__(self, body: Body, reading: Reading, stored: Stored) -> None:
        self.ask = read_response(body, reading, stored)
        fields = Fields(body)
        self._stored = stored if fields.flag("store", default=True) else None
        self._events = Events()
        custom = {str(tool.get("name")) for tool in fields.objects("tools") or () if tool.get("type") == "custom"}
        self._items = Items(self._events, seal=_SEALED in (fields.items("include") or []), custom=custom)
        self._last = Piece.nothing()
        self._prompt_tokens = 0
        self._opened = False
        self._response = _described(body, self.ask, stored=self._stored is not None)

    def begin(self, prepared: Prepared) -> bytes:
        """The response without output, and that it is worked on."""
        self._response["model"] = prepared.model
        self._prompt_tokens = prepared.prompt_tokens
        return self.ping()

    def add(self, index: int, piece: Piece) -> bytes:
        """Events for what was added."""
        self._last = piece
        return self._items.add(piece)

    def end(self) -> bytes:
        """The end of the last item, and the whole response."""
        cut = self._last.finish == "length"
        status = "incomplete" if cut else "completed"
        ended = self._items.end(status)
        output: list[Json] = list(self._items.done)
        self._response |= {"status": status, "output": output, "usage": self._usage(), "completed_at": time.time()}
        if cut:
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}
        if self._stored is not None:
            self._stored.put(str(self._response["id"]), self._conversation())
        return ended + self._events(f"response.{status}", response=dict(self._response))

    def ping(self) -> bytes:
        """The event that says that work goes on; before the first one, that the response was created."""
        created = b"" if self._opened else self._events("response.created", response=dict(self._response))
        self._opened = True
        return created + self._events("response.in_progress", response=dict(self._response))

    def failed(self, refusal: Refusal) -> bytes:
        """The response with its error."""
        code = "invalid_prompt" if refusal.status < 500 else "server_error"
        failed: Body = {**self._response, "status": "failed", "error": {"code": code, "message": refusal.message}}
        return self._events("response.failed", response=failed)

    def body(self) -> Body:
        """The whole response."""
        return self._response

    def _conversation(self) -> Sequence[Message]:
        """What a later request goes on with: everything but the instructions, which are each request's own."""
        assert isinstance(self.ask.prompt, list), "messages"
        asked: list[Message] = [one for one in self.ask.prompt if isinstance(one, dict)]
        asked = asked[1:] if self._response["instructions"] else asked
        return [*asked, *standard_messages([_finished(item) for item in self._items.done])]

    def _usage(self) -> Body:
        last = self._last
        return {
            "input_tokens": self._prompt_tokens,
            "input_tokens_details": {"cached_tokens": last.cached, "cache_write_tokens": 0},
            "output_tokens": last.tokens,
            "output_tokens_details": {"reasoning_tokens": last.reasoning_tokens},
            "total_tokens": self._prompt_tokens + last.tokens,
        }


def _finished(item: Body) -> Body:
    """An item that can be gone on with, also where a limit cut a call short."""
    if item["type"] != "function_call":
        return item
    arguments: Json = whole_members(str(item["arguments"]))
    return {**item, "arguments": arguments}


def _described(body: Body, ask: Ask, *, stored: bool) -> Body:
    """The response's own fields, and those of the request that it repeats."""
    tools: list[Json] = [one for one in Fields(body).objects("tools") or () if one.get("type") == "function"]
    repeated = ("instructions", "metadata", "previous_response_id", "user", "temperature", "top_p", "max_output_tokens")
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": ask.model or "",
        "output": [],
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": [{"strict": None, **tool} for tool in tools if isinstance(tool, dict)],
        "text": body.get("text") or {"format": {"type": "text"}},
        "reasoning": body.get("reasoning") or {"effort": None, "summary": None},
        "truncation": "disabled",
        "store": stored,
        "usage": None,
        **{name: body.get(name) for name in repeated},
    }
