"""Which of the tools an answer may call, and whether it has to, out of any form of `tool_choice`."""

from collections.abc import Mapping
from typing import Literal

from mlx_qwen.errors import PromptError
from mlx_qwen.json_types import Tools, tool_name
from mlx_qwen.value_types import shown


def called_tools(
    wanted: str | Mapping[str, object] | None, tools: Tools
) -> tuple[Literal["auto", "none", "required"], Tools]:
    """What `wanted` comes to, and those of the tools that may be called: all, or the one that was named.

    Raises PromptError for a name that none of them has.
    """
    choice = _chosen(wanted)
    if choice == "none":
        return "none", ()
    if choice == "auto":
        return "auto", tools
    called = tools if choice == "required" else [tool for tool in tools if tool_name(tool) == choice]
    if not called:
        names = ", ".join(name for tool in tools if (name := tool_name(tool)))
        raise PromptError(f"tool_choice is {choice!r:.60}; the tools that were given: {names or 'none'}.")
    return "required", called


def _chosen(wanted: str | Mapping[str, object] | None) -> str:
    """A choice or a function's name."""
    if wanted is None or isinstance(wanted, str):
        return wanted or "auto"
    name = tool_name(wanted)
    if name is None:
        raise PromptError(f"tool_choice is {shown(wanted)}; expected a name in it: {{'type': 'function', ...}}.")
    return name
