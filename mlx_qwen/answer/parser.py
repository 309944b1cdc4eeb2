"""Takes a finished or growing model answer apart: reasoning, visible content, tool calls."""

from mlx_qwen.answer.reasoning import ReasoningSplitter
from mlx_qwen.answer.tool_calls import ToolCallParser
from mlx_qwen.json_types import ToolCall, Tools


class AnswerParser:
    """Feeds raw text through the reasoning splitter and, past the reasoning, the tool call parser."""

    def __init__(self, *, inside_thinking: bool, tools: Tools | None = None) -> None:
        self._splitter = ReasoningSplitter(inside=inside_thinking)
        self._calls = ToolCallParser(tools)
        self._reasoning: list[str] = []
        self._content: list[str] = []

    def push(self, text: str) -> None:
        """Takes the next piece of raw text, cut anywhere."""
        piece = self._splitter.push(text)
        self._reasoning.append(piece.reasoning)
        self._content.append(self._calls.push(piece.answer))

    def finish(self) -> None:
        """Settles what was held back; call once, after the last piece."""
        piece = self._splitter.finish()
        self._reasoning.append(piece.reasoning)
        self._content += [self._calls.push(piece.answer), self._calls.finish()]

    @property
    def reasoning(self) -> str | None:
        """The text inside the think block so far; None when there is none."""
        return "".join(self._reasoning) or None

    @property
    def content(self) -> str:
        """The answer so far, without reasoning and tool calls."""
        return "".join(self._content)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The complete tool calls so far."""
        return tuple(self._calls.calls)
