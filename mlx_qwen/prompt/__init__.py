"""From a caller's prompt to token ids, and from token ids to text, reasoning and tool calls."""

from mlx_qwen.prompt.answer import AnswerParser
from mlx_qwen.prompt.json_types import Message, Messages, ToolCall, Tools
from mlx_qwen.prompt.processor import Processor
from mlx_qwen.prompt.reasoning import ReasoningSplitter
from mlx_qwen.prompt.stream import TextStream
from mlx_qwen.prompt.tool_calls import ToolCallParser

__all__ = [
    "AnswerParser",
    "Message",
    "Messages",
    "Processor",
    "ReasoningSplitter",
    "TextStream",
    "ToolCall",
    "ToolCallParser",
    "Tools",
]
