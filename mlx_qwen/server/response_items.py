"""The output of OpenAI's Responses protocol: items and the events that build them."""

from collections.abc import Set

from mlx_qwen.json_types import Json
from mlx_qwen.server.chat import logprobs
from mlx_qwen.server.exchange import new_id
from mlx_qwen.server.messages import whole_members
from mlx_qwen.server.reading import sealed
from mlx_qwen.server.refusals import Body
from mlx_qwen.server.wire import event
from mlx_qwen.server.work import Likelihood, Piece


class Events:
    """Numbers a stream's events."""

    def __init__(self) -> None:
        self._number = 0

    def __call__(self, kind: str, **fields: Json) -> bytes:
        """The next event."""
        made = event({"type": kind, "sequence_number": self._number, **fields}, kind)
        self._number += 1
        return made


class Items:
    """The items of one response, the last one in the making.

    `seal`: whether reasoning comes packed too; `custom`: names of tools that take one text instead of JSON.
    """

    def __init__(self, events: Events, *, seal: bool, custom: Set[str] = frozenset()) -> None:
        self.done: list[Body] = []
        self._events = events
        self._seal = seal
        self._custom = custom
        self._open: Body | None = None
        self._pieces: list[str] = []
        self._likelihoods: list[Likelihood] = []

    def add(self, piece: Piece) -> bytes:
        """Events for what a piece added."""
        made = []
        if piece.delta.reasoning:
            made += self._to("reasoning", {"id": new_id("rs_"), "summary": [], "content": []})
            made.append(self._grown("response.reasoning_text.delta", piece.delta.reasoning))
        if piece.delta.content:
            made += self._to("message", {"id": new_id("msg_"), "role": "assistant", "content": []})
            found = logprobs(piece.likelihoods)
            listed: Json = found["content"] if isinstance(found, dict) else []
            self._likelihoods += piece.likelihoods
            made.append(self._grown("response.output_text.delta", piece.delta.content, logprobs=listed))
        for call in piece.delta.tool_calls:
            if call.name is not None:
                head: Body = {"id": new_id("fc_"), "call_id": new_id("call_"), "name": call.name}
                if call.name in self._custom:
                    made += self._to("custom_tool_call", {**head, "input": ""}, again=True)
                else:
                    made += self._to("function_call", {**head, "arguments": ""}, again=True)
            if call.arguments:
                made.append(self._grown("response.function_call_arguments.delta", call.arguments))
        return b"".join(made)

    def end(self, status: str = "completed") -> bytes:
        """Events that end the last item."""
        if self._open is None:
            return b""
        item, whole = self._open, "".join(self._pieces)
        made = []
        if item["type"] == "function_call":
            item["arguments"] = whole
            made.append(self._at("response.function_call_arguments.done", item, arguments=whole))
        elif item["type"] == "custom_tool_call":
            item["input"] = str(whole_members(whole).get("input", ""))
            made.append(self._at("response.custom_tool_call_input.delta", item, delta=item["input"]))
            made.append(self._at("response.custom_tool_call_input.done", item, input=item["input"]))
        else:
            name, part = self._part(whole)
            item["content"] = [part]
            extra: Body = {"logprobs": part["logprobs"]} if name == "output_text" else {}
            made.append(self._at(f"response.{name}.done", item, content_index=0, text=whole, **extra))
            made.append(self._at("response.content_part.done", item, content_index=0, part=part))
        if item["type"] == "reasoning" and self._seal:
            item["encrypted_content"] = sealed(whole)
        item["status"] = status
        made.append(self._events("response.output_item.done", output_index=len(self.done), item=dict(item)))
        self.done.append(item)
        self._open = None
        return b"".join(made)

    def _to(self, kind: str, item: Body, *, again: bool = False) -> list[bytes]:
        """Begin an item, unless the last one is of this kind already."""
        if self._open is not None and self._open["type"] == kind and not again:
            return []
        ended = self.end()
        self._open = {"type": kind, **item, "status": "in_progress"}
        self._pieces, self._likelihoods = [], []
        made = [ended, self._events("response.output_item.added", output_index=len(self.done), item=dict(self._open))]
        if not kind.endswith("_call"):
            part = self._part("")[1]
            made.append(self._at("response.content_part.added", self._open, content_index=0, part=part))
        return made

    def _grown(self, kind: str, text: str, **fields: Json) -> bytes:
        assert self._open is not None, "begun before"
        self._pieces.append(text)
        if self._open["type"] == "custom_tool_call":
            return b""  # its text comes when it is whole
        place: Body = {} if self._open["type"] == "function_call" else {"content_index": 0}
        return self._at(kind, self._open, **place, delta=text, **fields)

    def _part(self, text: str) -> tuple[str, Body]:
        """The content part of the item in the making, and what events call it."""
        assert self._open is not None, "begun before"
        if self._open["type"] == "reasoning":
            return "reasoning_text", {"type": "reasoning_text", "text": text}
        found = logprobs(tuple(self._likelihoods))
        listed: Json = found["content"] if isinstance(found, dict) else []
        return "output_text", {"type": "output_text", "text": text, "annotations": [], "logprobs": listed}

    def _at(self, kind: str, item: Body, **fields: Json) -> bytes:
        return self._events(kind, item_id=item["id"], output_index=len(self.done), **fields)
