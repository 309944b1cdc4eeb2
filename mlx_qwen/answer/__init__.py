"""From a model's raw text to what it says: reasoning, content, tool calls, and where it stops."""

from mlx_qwen.answer.deltas import AnswerDelta, ClosedBy, FinishReason, ParsedAnswer, ToolCallDelta
from mlx_qwen.answer.reasoning import ReasoningSplitter
from mlx_qwen.answer.stream import AnswerStream
from mlx_qwen.answer.text import TextStream
from mlx_qwen.answer.tool_calls import ToolCallParser

__all__ = [
    "AnswerDelta",
    "AnswerStream",
    "ClosedBy",
    "FinishReason",
    "ParsedAnswer",
    "ReasoningSplitter",
    "TextStream",
    "ToolCallDelta",
    "ToolCallParser",
]
