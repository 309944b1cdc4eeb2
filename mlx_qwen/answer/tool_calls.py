"""Reads tool calls out of model text while it is still arriving.

Qwen3.5 writes `<tool_call>\\n<function=NAME>\\n<parameter=KEY>\\nVALUE\\n</parameter>\\n</function>\\n</tool_call>`;
Qwen3-Next writes `{"name": ..., "arguments": {...}}` between the same outer tags.
"""

from collections import deque
from collections.abc import Callable, Iterable

from mlx_qwen.answer.call_writer import CallWriter
from mlx_qwen.answer.deltas import ToolCallDelta, json_text, merged
from mlx_qwen.answer.json_block import JsonBlock
from mlx_qwen.answer.open_value import OpenValue, Verdict
from mlx_qwen.answer.outside import OutsideText
from mlx_qwen.answer.tags import Kind, Tag, TagReader
from mlx_qwen.answer.tools import ToolSchemas
from mlx_qwen.json_types import ToolCall, Tools


class ToolCallParser:
    """Separates tool calls from the text around them, wherever the pieces it is given are cut.

    `tools` are the function descriptions that the model was given: their JSON schemas type the values, and say which
    names in a value's text are tags. Values of parameters without a schema stay strings. A call begins to arrive with
    its first parameter, in JSON with its first whole argument; tags may be missing or doubled. What is no call is given
    back as text. Raises PromptError for a schema that makes no sense.
    """

    def __init__(self, tools: Tools | None = None) -> None:
        self.calls: list[ToolCall] = []
        self._tools = ToolSchemas(tools)
        self._reader = TagReader()
        self._todo: deque[Tag] = deque()
        self._take: Callable[[Tag], None] = self._in_text
        self._outside = OutsideText()
        self._deltas: list[ToolCallDelta] = []
        self._begun = 0
        self._held: list[Tag] = []
        self._raw: list[str] = []
        self._name = ""
        self._call: CallWriter
        self._value: OpenValue
        self._in_block = False
        self._aside = False
        self._json: JsonBlock | None = None
        self._json_is_broken = False

    def push(self, text: str) -> str:
        """Takes the next piece and returns the text that is certainly outside of any call."""
        self._run(self._reader.push(text))
        return self._outside.take()

    def deltas(self) -> tuple[ToolCallDelta, ...]:
        """What was added to calls since this was asked last."""
        deltas, self._deltas[:] = merged(self._deltas), []
        return deltas

    @property
    def awaits_end(self) -> bool:
        """Whether a call is whole but for the tag that closes its block."""
        return self._take == self._behind_call

    def finish(self, *, ended: bool = True) -> str:
        """The rest of the text. A call of which only closing tags are missing counts, any other is given back as text.

        `ended`: whether the model ended the text itself. Where it was cut, a call that might have gone on is none.
        """
        self._run(self._reader.finish())
        while self._take != self._in_text:
            self._settle(ended=ended)
            self._run([])
        self._outside.finish()
        return self._outside.take()

    def _run(self, tags: Iterable[Tag]) -> None:
        self._todo.extend(tags)
        while self._todo:
            self._take(self._todo.popleft())

    def _again(self, tags: list[Tag]) -> None:
        self._todo.extendleft(reversed(tags))

    def _give_back(self) -> None:
        held, self._held = self._held, []
        self._take, self._in_block, self._json = self._in_text, False, None
        for tag in held:
            self._outside.add(tag.raw)

    # One method for each place that the text can be in. Each takes the next tag, or text between tags.

    def _in_text(self, tag: Tag) -> None:
        if tag.kind is Kind.OPEN_BLOCK:
            self._held, self._take = [tag], self._behind_opener
        elif tag.kind is Kind.FUNCTION and tag.name in self._tools:
            self._begin_function(tag)
        elif tag.kind is Kind.CLOSE_BLOCK and self._in_block:
            self._in_block = False
        else:
            self._outside.add(tag.raw)

    def _behind_opener(self, tag: Tag) -> None:
        if tag.kind is Kind.FUNCTION:
            self._begin_function(tag)
        elif tag.blank:
            self._held.append(tag)
        elif tag.kind is Kind.TEXT:
            start = tag.raw.lstrip()
            between = "".join(one.raw for one in self._held[1:]) + tag.raw[: -len(start)]
            if start[0] in "{[":
                self._begin_json(tag)
                return
            self._held.append(tag)
            if "\n" in between:
                self._take = self._in_block_prose
            else:
                self._give_back()
        else:
            self._give_back()
            self._again([tag])

    def _in_block_prose(self, tag: Tag) -> None:
        """A tag on a line of its own, then words: the call may still come."""
        if tag.kind is Kind.FUNCTION:
            self._begin_function(tag)
        elif tag.kind is Kind.OPEN_BLOCK:
            self._give_back()
            self._again([tag])
        else:
            self._held.append(tag)
            if tag.kind is Kind.CLOSE_BLOCK:
                self._give_back()

    def _begin_function(self, tag: Tag) -> None:
        self._held.append(tag)
        self._name, self._take = tag.name, self._behind_name

    def _behind_name(self, tag: Tag) -> None:
        """The call stands with its first parameter, or with its end."""
        bare = all(one.blank for one in self._held if one.kind is Kind.TEXT)
        if tag.kind is Kind.PARAMETER:
            self._begin_call()
            self._begin_parameter(tag)
        elif tag.kind is Kind.CLOSE_FUNCTION or (tag.kind is Kind.CLOSE_BLOCK and bare):
            self._begin_call()
            self._end_call(tag)
        elif tag.kind in (Kind.OPEN_BLOCK, Kind.FUNCTION, Kind.CLOSE_BLOCK):
            self._give_back()
            self._again([tag])
        else:
            self._held.append(tag)

    def _begin_call(self) -> None:
        held, self._held = self._held, []
        prose = "".join(tag.raw for tag in held if tag.kind is Kind.TEXT).strip()
        if prose:
            self._outside.add(prose)
        self._raw = [tag.raw for tag in held if tag.kind is not Kind.TEXT or not prose]
        self._call = self._writer(self._name)

    def _writer(self, name: str) -> CallWriter:
        self._outside.call_came()
        self._in_block = True
        self._begun += 1
        return CallWriter(self._begun - 1, name, self._tools.parameters(name), self._deltas)

    def _begin_parameter(self, tag: Tag) -> None:
        name = tag.name
        if name.endswith("/") and not self._call.parameters.declares(name):
            name = name[:-1].rstrip()  # closes itself: its value is empty unless text follows
        self._raw.append(tag.raw)
        self._call.begin(name)
        self._value = OpenValue(is_parameter=self._call.is_parameter, is_tool=self._tools.may_name)
        self._take = self._in_value

    def _in_value(self, tag: Tag) -> None:
        self._obey(self._value.take(tag))

    def _obey(self, verdict: Verdict | None) -> None:
        if verdict is None:
            return
        self._raw.append(verdict.value)
        self._call.add(verdict.value)
        if verdict.ended:
            self._call.close(loose=verdict.loose)
            self._held, self._aside, self._take = [], False, self._between_parameters
        self._again(verdict.rest)

    def _between_parameters(self, tag: Tag) -> None:
        if tag.kind is Kind.PARAMETER:
            self._raw += [one.raw for one in self._held]
            self._begin_parameter(tag)
        elif tag.kind not in (Kind.TEXT, Kind.CLOSE_PARAMETER):
            self._end_call(tag)
        elif tag.kind is Kind.TEXT and (self._aside or not tag.blank):  # words between a call's tags are text
            self._aside = True
            self._raw += [one.raw for one in self._held if one.kind is not Kind.TEXT]
            for one in (*self._held, tag):
                self._outside.add(one.raw if one.kind is Kind.TEXT else "")
            self._held = []
        else:
            self._held.append(tag)

    def _end_call(self, tag: Tag) -> None:
        """The call ends with `tag`, or before it when it begins the next one."""
        self.calls.append(self._call.end())
        self._held, self._json, self._take = [], None, self._behind_call
        if tag.kind is Kind.CLOSE_BLOCK:
            self._in_block, self._take = False, self._in_text
        elif tag.kind is not Kind.CLOSE_FUNCTION:
            self._again([tag])

    def _behind_call(self, tag: Tag) -> None:
        """In the block, behind a call: its end, another call, or text."""
        if tag.kind is Kind.FUNCTION:
            self._held = []
            self._begin_function(tag)
        elif tag.kind in (Kind.CLOSE_BLOCK, Kind.OPEN_BLOCK):
            self._held, self._take = [], self._in_text
            self._in_block = self._in_block and tag.kind is Kind.OPEN_BLOCK
            self._again([tag] if tag.kind is Kind.OPEN_BLOCK else [])
        elif tag.blank or tag.kind is Kind.CLOSE_FUNCTION:
            self._held.append(tag)
        else:
            text = "".join(one.raw for one in self._held if one.kind is Kind.TEXT) + tag.raw
            start = text.lstrip().removeprefix(",").lstrip()
            self._held = []
            if self._json and not start:
                self._held.append(tag)
            elif self._json and start[0] in "{[":
                self._begin_json(Tag(Kind.TEXT, start))
            else:
                self._take = self._in_text
                self._again([Tag(Kind.TEXT, text)] if tag.kind is Kind.TEXT else [tag])

    def _begin_json(self, tag: Tag) -> None:
        self._json, self._take = JsonBlock(self._writer, broken=self._json_is_broken), self._in_json
        self._again([tag])

    def _in_json(self, tag: Tag) -> None:
        assert self._json is not None, "begun by _begin_json"
        rest = self._json.take(tag)
        if rest is not None:
            self._end_json(self._json, rest)

    def _end_json(self, json: JsonBlock, rest: list[Tag]) -> None:
        """The JSON has ended, with calls in it or not; `rest` comes behind it."""
        calls = json.calls()
        if json.arguments.writer is not None:
            self._end_json_call(json, calls, rest)
            return
        for call in calls:
            arguments = self._tools.parameters(call.name).checked(call.arguments)
            self.calls.append(ToolCall(call.name, arguments))
            self._deltas.append(ToolCallDelta(self._begun, call.name, json_text(arguments)))
            self._begun += 1
        if calls:
            self._outside.call_came()
            self._held, self._take, self._in_block = [], self._behind_call, True
            self._again(rest)
            return
        # It is text up to the next tag of a block, behind which calls may follow.
        held, kinds = [*self._held, *json.tags, *rest], (Kind.CLOSE_BLOCK, Kind.OPEN_BLOCK)
        cut = next((at for at, tag in enumerate(held) if at and tag.kind in kinds), len(held))
        self._held, self._json_is_broken = held[:cut], True
        self._give_back()
        self._again(held[cut:])

    def _end_json_call(self, json: JsonBlock, calls: list[ToolCall], rest: list[Tag]) -> None:
        """As `_end_json`, of a call that was begun; where the JSON is broken, what is not in the call is text."""
        inner = [] if calls else json.another_block()
        call, text = json.arguments.end(calls)
        self.calls.append(call)
        if text.strip():
            self._outside.add(text)
        self._json_is_broken = self._json_is_broken or not calls
        self._held, self._take = [], self._behind_call
        self._again([*inner, *rest])

    def _settle(self, *, ended: bool) -> None:
        """The text is over; what is open is closed, or was no call."""
        if self._take == self._in_value:
            verdict = self._value.finish(ended=ended)
            if verdict is not None:
                self._obey(verdict)
            elif ended:
                self._call.close(loose=True)
                self._end_call(_END)
            else:
                self._drop_call(self._value.held)
        elif self._take == self._between_parameters:
            if ended:
                self._end_call(_END)
            else:
                self._drop_call("".join(tag.raw for tag in self._held))
        elif self._take == self._behind_call:
            self._held, self._take = [], self._in_text
        elif self._json and self._take == self._in_json:
            if ended:
                self._end_json(self._json, [])
            else:
                self._held += self._json.tags
                self._give_back()
        else:
            self._give_back()

    def _drop_call(self, held: str) -> None:
        self._held, self._take = [], self._in_text
        self._outside.add("".join([*self._raw, held]))


class NoCalls:
    """Stands in for the parser where an answer holds no calls: all of it is text."""

    calls: tuple[ToolCall, ...] = ()
    awaits_end = False

    def push(self, text: str) -> str:
        """The text."""
        return text

    def deltas(self) -> tuple[ToolCallDelta, ...]:
        """None."""
        return ()

    def finish(self, *, ended: bool = True) -> str:
        """Nothing is held back."""
        return ""


_END = Tag(Kind.CLOSE_BLOCK, "")
