"""`/v1/messages`, and how many tokens such a request has."""

import hashlib
import json
import re
from base64 import b64encode

from mlx_qwen.json_types import Json, tool_name
from mlx_qwen.server.exchange import new_id
from mlx_qwen.server.fields import Fields
from mlx_qwen.server.openai_fields import EFFORTS, MOST_STOPS, given
from mlx_qwen.server.reading import Reading, function_tools, tool_of
from mlx_qwen.server.refusals import Body, Refusal, anthropic_error
from mlx_qwen.server.wire import event
from mlx_qwen.server.work import Ask, Piece, Prepared

_ROLES = ("user", "assistant", "system")
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def read_messages(body: Body, reading: Reading, *, counting: bool = False) -> Ask:
    """What a request asks for; when `counting`, it need not say how long the answer may be."""
    fields = Fields(body)
    fields.forbid(container="this server runs no code.", mcp_servers="this server calls no other servers.")
    if body.get("thread") is not None:
        # By these words Anthropic's client goes on without threads.
        unsupported: Body = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        raise Refusal(400, "is not supported: send all messages.", param="thread", details=unsupported)
    messages, most = fields.objects("messages"), fields.whole("max_tokens", least=1)
    if not messages or (most is None and not counting):
        missing = "max_tokens" if messages else "messages"
        raise Refusal(400, "Field required.", param=missing)
    tools = function_tools(fields.objects("tools"), reading, _tool)
    names = [name for tool in tools if (name := tool_name(tool))]
    output = fields.inner("output_config")
    structured = fields.inner("output_format") if body.get("output_format") else output.inner("format")
    if structured.body and structured.one_of("type", ["json_schema"]) is None:
        raise Refusal(400, "the format has no type; expected json_schema.", param=structured.path("type"))
    choices = {
        "max_tokens": most,
        "temperature": fields.number("temperature", least=0, most=1),
        "top_p": fields.number("top_p", least=0, most=1),
        "top_k": fields.whole("top_k", least=0),
        "stop": fields.texts("stop_sequences", most=MOST_STOPS) or None,
        "tools": tools or None,
        "reasoning_effort": output.one_of("effort", EFFORTS),
        # A message of the assistant's at the end is what the answer begins with.
        "continue_final_message": True if messages[-1].get("role") == "assistant" else None,
        "schema": structured.inner("schema").body if structured.body else None,
        **_choice(fields.inner("tool_choice"), names),
        **_thinking(fields.inner("thinking"), most),
    }
    return Ask(
        model=fields.text("model"),
        prompt=[*reading.system(body.get("system")), *reading.messages(messages, "messages", roles=_ROLES)],
        choices=given(choices),
        stream=fields.flag("stream"),
        notes=tuple(reading.notes),
    )


def _tool(tool: Body, at: str) -> dict[str, object] | None:
    """A tool of the client's own; None for one that Anthropic runs or describes."""
    if tool.get("type") not in (None, "custom"):
        return None
    return tool_of(tool, tool.get("input_schema"), at)


def _choice(choice: Fields, names: list[str]) -> dict[str, object]:
    if not choice.body:
        return {}
    kind = choice.one_of("type", ("auto", "any", "tool", "none"))
    if kind is None:
        raise Refusal(400, "Field required.", param=choice.path("type"))
    name = choice.text("name")
    if kind == "tool" and name not in names:
        raise Refusal(400, f"{name!r:.60} is not among the tools.", param=choice.path("name"))
    if kind == "any" and not names:
        raise Refusal(400, "a call is asked for, but the request holds no tools.", param="tool_choice")
    return {
        "tool_choice": {"auto": None, "none": "none", "any": "required", "tool": name}[kind],
        "parallel_tool_calls": False if choice.flag("disable_parallel_tool_use") else None,
    }


def _thinking(thinking: Fields, most: int | None) -> dict[str, object]:
    """Adaptive thinking is what the model does by itself."""
    if not thinking.body:
        return {}
    kind = thinking.one_of("type", ("enabled", "disabled", "adaptive"))
    if kind is None:
        raise Refusal(400, "Field required.", param=thinking.path("type"))
    budget = thinking.whole("budget_tokens", least=1)
    if kind != "enabled":
        return {"enable_thinking": False} if kind == "disabled" else {}
    if budget is None:
        raise Refusal(400, "Field required.", param=thinking.path("budget_tokens"))
    if most is not None and budget >= most:
        raise Refusal(400, "must be less than max_tokens.", param=thinking.path("budget_tokens"))
    return {"enable_thinking": True, "thinking_budget": budget}


class MessagesExchange:
    """One message, block after block."""

    def __init__(self, body: Body, reading: Reading) -> None:
        self.ask = read_messages(body, reading)
        self._blocks: list[Body] = []
        self._pieces: list[str] = []
        self._last = Piece.nothing()
        self._message: Body = {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": self.ask.model}
        self._prompt_tokens = 0

    def begin(self, prepared: Prepared) -> bytes:
        """The message without content."""
        self._message["model"] = prepared.model
        self._prompt_tokens = prepared.prompt_tokens
        start: Body = {**self._message, "content": [], "stop_reason": None, "stop_sequence": None}
        return _event("message_start", message={**start, "usage": self._usage()})

    def add(self, index: int, piece: Piece) -> bytes:
        """Deltas of the block in the making, and new blocks."""
        self._last = piece
        events = []
        if piece.delta.reasoning:
            events += self._to("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            events.append(self._grow("thinking", piece.delta.reasoning, "thinking_delta"))
        if piece.delta.content:
            events += self._to("text", {"type": "text", "text": ""})
            events.append(self._grow("text", piece.delta.content, "text_delta"))
        for call in piece.delta.tool_calls:
            if call.name is not None:
                block: Body = {"type": "tool_use", "id": new_id("toolu_"), "name": call.name, "input": {}}
                events += self._to("", block)
            if call.arguments:
                events.append(self._grow("partial_json", call.arguments, "input_json_delta"))
        return b"".join(events)

    def end(self) -> bytes:
        """The last block's end, why the message ends, and its usage."""
        reason: Body = {"stop_reason": self._stop_reason(), "stop_sequence": self._last.stopped_by}
        delta = _event("message_delta", delta=reason, usage=self._usage())
        return b"".join([*self._closed(), delta, _event("message_stop")])

    def ping(self) -> bytes:
        """A ping."""
        return _event("ping")

    def failed(self, refusal: Refusal) -> bytes:
        """The error as an event."""
        return event(anthropic_error(refusal), "error")

    def body(self) -> Body:
        """The whole message."""
        blocks: list[Json] = list(self._blocks)
        reason: Body = {"stop_reason": self._stop_reason(), "stop_sequence": self._last.stopped_by}
        return {**self._message, "content": blocks, **reason, "usage": self._usage()}

    def _to(self, kind: str, block: Body) -> list[bytes]:
        """Begin a block, unless the last one is of this kind already."""
        if self._blocks and self._blocks[-1]["type"] == kind:
            return []
        closed = self._closed()
        self._blocks.append(block)
        return [*closed, _event("content_block_start", index=len(self._blocks) - 1, content_block=dict(block))]

    def _closed(self) -> list[bytes]:
        """End the last block."""
        if not self._blocks:
            return []
        block, whole = self._blocks[-1], "".join(self._pieces)
        self._pieces.clear()
        events = []
        if block["type"] == "tool_use":
            block["input"] = whole_members(whole)
        else:
            block[str(block["type"])] = whole
        if block["type"] == "thinking":
            block["signature"] = signature(whole)
            events.append(self._delta({"type": "signature_delta", "signature": block["signature"]}))
        return [*events, _event("content_block_stop", index=len(self._blocks) - 1)]

    def _grow(self, name: str, text: str, kind: str) -> bytes:
        self._pieces.append(text)
        return self._delta({"type": kind, name: text})

    def _delta(self, delta: Body) -> bytes:
        return _event("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def _stop_reason(self) -> str:
        if self._last.stopped_by is not None and self._last.finish == "stop":
            return "stop_sequence"
        return _STOP_REASONS[self._last.finish or "stop"]

    def _usage(self) -> Body:
        last = self._last
        return {
            "input_tokens": self._prompt_tokens - last.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": last.cached,
            "output_tokens": last.tokens,
            "output_tokens_details": {"thinking_tokens": last.reasoning_tokens},
        }


def signature(thinking: str) -> str:
    """What stands for a signature: the same for the same text. Nothing is checked when it comes back."""
    return b64encode(hashlib.sha256(thinking.encode()).digest()).decode()


def whole_members(arguments: str) -> Body:
    """The arguments; of those that a limit cut short, the members that are whole."""
    ends = [found.start() for found in re.finditer(", ", arguments)]
    for text in (arguments, *(arguments[:end] + "}" for end in reversed(ends[-64:]))):
        try:
            value = json.loads(text)
        except ValueError:
            continue
        if isinstance(value, dict):
            return value
    return {}


def _event(kind: str, **fields: Json) -> bytes:
    return event({"type": kind, **fields}, kind)
