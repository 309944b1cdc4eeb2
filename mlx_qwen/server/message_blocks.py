"""Messages and tools of Anthropic's protocol, to those of a prompt."""

import re

from mlx_qwen.json_types import Json
from mlx_qwen.server.content import Reading, content_of, text_of, tool_of
from mlx_qwen.server.refusals import Body, Refusal

# Claude Code's first system block holds a line that differs from session to session and says nothing to a model.
_BILLING = re.compile(r"^x-anthropic-billing-header:[^\n]*\n*", re.MULTILINE)
_READ = ("text", "image", "video", "document", "search_result")


def anthropic_messages(system: Json, messages: list[Body], reading: Reading) -> list[dict[str, object]]:
    """The messages, the system prompt first."""
    if not messages:
        raise Refusal(400, "at least one message is required.", param="messages")
    made: list[dict[str, object]] = []
    if system is not None and (instructions := _system(system, reading)):
        made.append({"role": "system", "content": instructions})
    for index, message in enumerate(messages):
        at = f"messages[{index}]"
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system"):
            raise Refusal(400, f"{at}.role is {role!r:.40}; expected user, assistant or system.", param=f"{at}.role")
        if not isinstance(content, str | list):
            raise Refusal(400, f"{at}.content is missing; expected a text or a list of blocks.", param=f"{at}.content")
        blocks: list[Json] = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if role == "system":
            made.append({"role": "system", "content": _system(blocks, reading)})
        elif role == "user":
            made += _user(blocks, f"{at}.content", reading)
        else:
            made.append(_assistant(blocks, f"{at}.content", reading))
    return made


def _system(system: Json, reading: Reading) -> str:
    """Blocks as paragraphs, without billing lines."""
    blocks = system if isinstance(system, list) else [system]
    texts = [text_of([block], "system", reading) for block in blocks]
    clean = [_BILLING.sub("", text) for text in texts]
    if clean != texts:
        reading.note("billing line left out")
    return "\n\n".join(text for text in clean if text)


def _user(blocks: list[Json], at: str, reading: Reading) -> list[dict[str, object]]:
    """A user's turn: results of tools are messages of their own."""
    made: list[dict[str, object]] = []
    said: list[Json] = []
    for index, block in enumerate(blocks):
        if not isinstance(block, dict) or block.get("type") != "tool_result":
            said.append(block)
            continue
        if said:
            made.append({"role": "user", "content": content_of(said, at, reading)})
            said = []
        content = content_of(block.get("content"), f"{at}[{index}].content", reading)
        made.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content})
    if said or not made:
        made.append({"role": "user", "content": content_of(said, at, reading)})
    return made


def _assistant(blocks: list[Json], at: str, reading: Reading) -> dict[str, object]:
    said: list[Json] = []
    reasoning: list[str] = []
    calls: list[dict[str, object]] = []
    for index, block in enumerate(blocks):
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(block, dict) or kind in _READ:
            said.append(block)
        elif kind == "thinking":
            reasoning.append(text_of([{"type": "text", "text": block.get("thinking")}], f"{at}[{index}]", reading))
        elif kind == "tool_use":
            calls.append(_call(block, f"{at}[{index}]"))
        else:
            reading.note(f"block of type {kind!r:.40} left out")
    message: dict[str, object] = {"role": "assistant", "content": content_of(said, at, reading)}
    if any(reasoning):
        message["reasoning_content"] = "".join(reasoning)
    if calls:
        message["tool_calls"] = calls
    return message


def _call(block: Body, at: str) -> dict[str, object]:
    name, arguments = block.get("name"), block.get("input")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise Refusal(400, f"{at} is no tool_use with a name and an input.", param=at)
    return {"type": "function", "id": block.get("id"), "function": {"name": name, "arguments": arguments}}


def anthropic_tool(tool: Body, at: str) -> dict[str, object] | None:
    """A tool of the client's own; None for one that Anthropic runs or describes."""
    if tool.get("type") not in (None, "custom"):
        return None
    return tool_of(tool.get("name"), tool.get("description"), tool.get("input_schema"), at)
