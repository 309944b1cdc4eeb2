"""A model's raw text to what it says, while it streams: the one place where answers are parsed."""

from collections.abc import Sequence

from mlx_qwen.answer.deltas import AnswerDelta, FinishReason, ParsedAnswer
from mlx_qwen.answer.reasoning import THINK_END, THINK_START, ReasoningEnd, ReasoningSplitter
from mlx_qwen.answer.stopping import StopStrings
from mlx_qwen.answer.tags import partial_tag_length
from mlx_qwen.answer.tool_calls import NoCalls, ToolCallParser
from mlx_qwen.json_types import Tools


class AnswerStream:
    """Takes a model's text in pieces, cut anywhere, and returns what each adds to the answer.

    Args:
        inside_thinking: whether the prompt already opened the think block.
        tools: the function descriptions that the model was given.
        stop: text that ends the answer and is not part of it; searched behind the reasoning.
        stop_in_reasoning: whether it is searched inside the reasoning too.
        thinking_is_limited: whether something else than the model may have closed the block. A `</think>` that the
            model then writes itself is no content.
        most_calls: how many calls end the answer; None for any number, and 0 where calls are text like any other.

    Raises PromptError for tools whose schemas make no sense.
    """

    def __init__(
        self,
        *,
        inside_thinking: bool,
        tools: Tools | None = None,
        stop: Sequence[str] = (),
        stop_in_reasoning: bool = False,
        thinking_is_limited: bool = False,
        most_calls: int | None = None,
    ) -> None:
        after = None if stop_in_reasoning else ReasoningEnd(inside=inside_thinking)
        self._stop = StopStrings(stop, after=after)
        self._splitter = ReasoningSplitter(inside=inside_thinking)
        self._calls = NoCalls() if most_calls == 0 else ToolCallParser(tools)
        self._most_calls = most_calls
        self._late_end = _LateThinkEnd() if thinking_is_limited else None
        self._content: list[str] = []
        self._reasoning: list[str] = []

    def expect_late_end(self) -> None:
        """The think block was closed for the model: a `</think>` that it still writes itself is no content."""
        self._late_end = self._late_end or _LateThinkEnd()

    @property
    def stopped(self) -> bool:
        """Whether a stop string came, or as many calls as there may be: the answer is over."""
        done = self._most_calls is not None and len(self._calls.calls) >= self._most_calls > 0
        return self._stop.reached or (done and not self._calls.awaits_end)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that came."""
        return self._stop.found

    def push(self, text: str) -> AnswerDelta:
        """Takes the next piece and returns what is certain with it."""
        text = self._stop.push(text)
        piece = self._splitter.push(text)
        return self._delta(text, piece.reasoning, self._calls.push(piece.answer))

    def finish(self, *, ended: bool = True) -> AnswerDelta:
        """Settles what was held back; call once, after the last piece.

        `ended`: whether the model ended the answer itself, rather than a stop string or a limit of tokens.
        """
        text = self._stop.finish()
        ended = ended and not self.stopped
        first, last = self._splitter.push(text), self._splitter.finish(ended=ended)
        outside = self._calls.push(first.answer + last.answer) + self._calls.finish(ended=ended)
        delta = self._delta(text, first.reasoning + last.reasoning, outside)
        rest = self._late_end.finish() if self._late_end else ""
        self._content.append(rest)
        return AnswerDelta(delta.text, delta.content + rest, delta.reasoning, delta.tool_calls)

    def answer(self, finish_reason: FinishReason) -> ParsedAnswer:
        """The whole answer so far; an end that is no limit counts as "tool_calls" when there are calls."""
        calls = tuple(self._calls.calls[: self._most_calls])
        return ParsedAnswer(
            content="".join(self._content),
            reasoning="".join(self._reasoning) or None,
            tool_calls=calls,
            finish_reason="tool_calls" if calls and finish_reason == "stop" else finish_reason,
        )

    def _delta(self, text: str, reasoning: str, content: str) -> AnswerDelta:
        if self._late_end and self._splitter.closed:
            content = self._late_end.push(content)
        self._content.append(content)
        self._reasoning.append(reasoning)
        calls = self._calls.deltas()
        if self._most_calls is not None:
            calls = tuple(call for call in calls if call.index < self._most_calls)
        return AnswerDelta(text, content, reasoning, calls)


class _LateThinkEnd:
    """Drops one `</think>` behind a block that was closed for the model, unless a block was opened again before it."""

    def __init__(self) -> None:
        self._held = ""
        self._begun = False
        self._done = False

    def push(self, text: str) -> str:
        text, self._held = self._held + text, ""
        if not self._done:
            text = self._without_end(text)
        if self._done and not self._begun:
            text = text.lstrip("\n")
        self._begun = self._begun or bool(text)
        return text

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held

    def _without_end(self, text: str) -> str:
        end, start = text.find(THINK_END), text.find(THINK_START)
        self._done = max(end, start) >= 0
        if not self._done:
            certain = len(text) - partial_tag_length(text, (THINK_START, THINK_END))
            self._held = text[certain:]
            return text[:certain]
        if end < 0 or 0 <= start < end:
            self._begun = True  # a block that the answer shows, with its end
            return text
        return text[:end] + text[end + len(THINK_END) :]
