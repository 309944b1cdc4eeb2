"""`/v1/chat/completions`."""

import time

from mlx_qwen.json_types import Json, tool_name
from mlx_qwen.server.exchange import new_id
from mlx_qwen.server.fields import Fields
from mlx_qwen.server.openai_fields import (
    EFFORTS,
    MOST_ANSWERS,
    MOST_TOP_LOGPROBS,
    given,
    sampling,
    thinking,
    tool_choice,
    usage,
)
from mlx_qwen.server.reading import Reading, function_tools, tool_of
from mlx_qwen.server.refusals import Body, Refusal, openai_error
from mlx_qwen.server.wire import event
from mlx_qwen.server.work import Ask, Likelihood, Piece, Prepared

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def read_chat(body: Body, reading: Reading) -> Ask:
    """What a request asks for."""
    fields = Fields(body)
    fields.forbid(
        functions="send tools instead.",
        function_call="send tool_choice instead.",
        audio="this server writes text alone.",
        web_search_options="this server does not search the web.",
    )
    if set(fields.texts("modalities", most=8) or ["text"]) - {"text"}:
        raise Refusal(400, "modalities asks for more than text.", param="modalities")
    messages = fields.objects("messages")
    if not messages:
        raise Refusal(400, "messages is missing or empty; expected at least one.", param="messages")
    tools = function_tools(fields.objects("tools"), reading, _tool)
    names = [name for tool in tools if (name := tool_name(tool))]
    top = fields.whole("top_logprobs", least=0, most=MOST_TOP_LOGPROBS)
    if top is not None and not fields.flag("logprobs"):
        raise Refusal(400, "top_logprobs needs logprobs to be true.", param="top_logprobs")
    most = fields.whole("max_completion_tokens", least=1)
    own = {
        "max_tokens": most if most is not None else fields.whole("max_tokens", least=1),
        "tools": tools or None,
        "tool_choice": tool_choice(body.get("tool_choice"), names),
        "parallel_tool_calls": None if fields.flag("parallel_tool_calls", default=True) else False,
        "response_format": fields.inner("response_format").body or None,
        "continue_final_message": fields.flag("continue_final_message") or None,
        "reasoning_effort": fields.one_of("reasoning_effort", EFFORTS),
        "logprobs": (top or 0) if fields.flag("logprobs") else None,
    }
    return Ask(
        model=fields.text("model"),
        prompt=reading.messages(messages, "messages", roles=_ROLES),
        choices={**sampling(fields), **thinking(fields), **given(own)},
        count=fields.whole("n", least=1, most=MOST_ANSWERS) or 1,
        stream=fields.flag("stream"),
        notes=tuple(reading.notes),
    )


def _tool(tool: Body, at: str) -> dict[str, object] | None:
    """A function tool; None for one of another type."""
    if tool.get("type", "function") != "function":
        return None
    function = tool.get("function", tool)
    if not isinstance(function, dict):
        raise Refusal(400, f"{at}.function is no description of a function.", param=f"{at}.function")
    return tool_of(function, function.get("parameters"), f"{at}.function")


class ChatExchange:
    """One chat completion."""

    def __init__(self, body: Body, reading: Reading) -> None:
        self.ask = read_chat(body, reading)
        self._with_usage = Fields(body).inner("stream_options").flag("include_usage")
        self._answers = [_Message() for _ in range(self.ask.count)]
        self._head: Body = {"id": new_id("chatcmpl-"), "created": int(time.time()), "model": self.ask.model}
        self._prompt_tokens = 0

    def begin(self, prepared: Prepared) -> bytes:
        """A chunk with the role for each answer."""
        self._head["model"] = prepared.model
        self._prompt_tokens = prepared.prompt_tokens
        return b"".join(self._chunk(i, {"role": "assistant", "content": ""}) for i in range(self.ask.count))

    def add(self, index: int, piece: Piece) -> bytes:
        """A chunk with what was added, if anything; the last one says why the answer ends."""
        answer = self._answers[index]
        delta = answer.add(piece)
        likelihoods = logprobs(piece.likelihoods)
        chunks = self._chunk(index, delta, likelihoods=likelihoods) if delta or likelihoods else b""
        return chunks + (self._chunk(index, {}, finish=answer.last.finish) if answer.last.finish else b"")

    def end(self) -> bytes:
        """Usage, where it was asked for, and the end of the stream."""
        last = event({**self._object("chat.completion.chunk"), "choices": [], "usage": self._usage()})
        return (last if self._with_usage else b"") + b"data: [DONE]\n\n"

    def ping(self) -> bytes:
        """A chunk that adds nothing."""
        return self._chunk(0, {})

    def failed(self, refusal: Refusal) -> bytes:
        """The error as an event."""
        return event(openai_error(refusal))

    def body(self) -> Body:
        """The completion."""
        choices: list[Json] = [
            {
                "index": index,
                "message": answer.message(),
                "logprobs": logprobs(tuple(answer.likelihoods), always="logprobs" in self.ask.choices),
                "finish_reason": answer.last.finish,
            }
            for index, answer in enumerate(self._answers)
        ]
        return {**self._object("chat.completion"), "choices": choices, "usage": self._usage()}

    def _object(self, kind: str) -> Body:
        return {"id": self._head["id"], "object": kind, "created": self._head["created"], "model": self._head["model"]}

    def _chunk(self, index: int, delta: Body, *, finish: Json = None, likelihoods: Json = None) -> bytes:
        choice: Body = {"index": index, "delta": delta, "logprobs": likelihoods, "finish_reason": finish}
        chunk: Body = {**self._object("chat.completion.chunk"), "choices": [choice]}
        return event({**chunk, "usage": None} if self._with_usage else chunk)

    def _usage(self) -> Body:
        last = [answer.last for answer in self._answers]
        return usage(
            self._prompt_tokens,
            sum(piece.tokens for piece in last),
            last[0].cached,
            sum(piece.reasoning_tokens for piece in last),
        )


class _Message:
    """An answer as it comes together."""

    def __init__(self) -> None:
        self.last = Piece.nothing()
        self.likelihoods: list[Likelihood] = []
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, Body] = {}

    def add(self, piece: Piece) -> Body:
        """The delta that a chunk holds."""
        self.last = piece
        self.likelihoods += piece.likelihoods
        delta: Body = {}
        if piece.delta.reasoning:
            self._reasoning.append(piece.delta.reasoning)
            delta["reasoning_content"] = piece.delta.reasoning
        if piece.delta.content:
            self._content.append(piece.delta.content)
            delta["content"] = piece.delta.content
        calls: list[Json] = []
        for call in piece.delta.tool_calls:
            change: Body = {"index": call.index, "function": {"arguments": call.arguments}}
            if call.name is not None:
                change = {"index": call.index, "id": new_id("call_"), "type": "function"}
                change["function"] = {"name": call.name, "arguments": call.arguments}
                self._calls[call.index] = {
                    "id": change["id"],
                    "type": "function",
                    "function": {"name": call.name, "arguments": ""},
                }
            self._append(call.index, call.arguments)
            calls.append(change)
        if calls:
            delta["tool_calls"] = calls
        return delta

    def message(self) -> Body:
        """The whole message."""
        content = "".join(self._content)
        message: Body = {"role": "assistant", "content": content if content or not self._calls else None}
        message["refusal"] = None
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = list(self._calls.values())
        return message

    def _append(self, index: int, arguments: str) -> None:
        function = self._calls[index]["function"]
        assert isinstance(function, dict), "as it was made"
        function["arguments"] = f"{function['arguments']}{arguments}"


def logprobs(likelihoods: tuple[Likelihood, ...], *, always: bool = False) -> Json:
    """Log-probabilities of an answer's tokens; None where there are none, unless `always`."""
    if not likelihoods and not always:
        return None
    content: list[Json] = [
        {**_likelihood(one), "top_logprobs": [_likelihood(other) for other in one.others]} for one in likelihoods
    ]
    return {"content": content, "refusal": None}


def _likelihood(one: Likelihood) -> Body:
    return {"token": one.text, "logprob": one.logprob, "bytes": list(one.data)}
