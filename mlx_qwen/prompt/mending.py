"""Chats that a template refuses, said in a way that it does not: it is asked first, as templates differ."""

import warnings
from collections.abc import Callable, Iterator

from mlx_qwen.errors import PromptError
from mlx_qwen.json_types import Json

Plain = list[dict[str, Json]]


def render_mended(messages: Plain, render: Callable[[Plain], str]) -> str:
    """What a template makes of the messages, or of the nearest ones that it can be given, with one warning then.

    Where it refuses or drops a system message behind the first message, all of them are joined at the start, in order.
    Where it refuses a chat in which no user speaks, one who says nothing is put behind the system message. Raises
    PromptError with the template's own words where neither helps.
    """
    refusal = None
    try:
        text = render(messages)
        if all(_said(message, text) for message in messages[1:]):
            return text
    except PromptError as error:
        refusal = error
    for mended, warning in _mended(messages):
        try:
            again = render(mended)
        except PromptError:
            continue
        warnings.warn(f"The chat template does not take {warning}", stacklevel=2)
        return again
    if refusal is not None:
        raise refusal
    return text


def _said(message: dict[str, Json], text: str) -> bool:
    """Whether a system message came to the model's eyes."""
    return message["role"] != "system" or str(message["content"]).strip() in text


def _mended(messages: Plain) -> Iterator[tuple[Plain, str]]:
    joined, words = messages, []
    late = next((index for index, message in enumerate(messages) if index and message["role"] == "system"), None)
    if late is not None:
        system = [message for message in messages if message["role"] == "system"]
        first: dict[str, Json] = {**system[0], "content": "\n\n".join(str(message["content"]) for message in system)}
        joined = [first, *(message for message in messages if message["role"] != "system")]
        words = [f"a system message at position {late}: all of them were joined at the start."]
        yield joined, words[0]
    if not any(message["role"] == "user" for message in messages):
        place = sum(message["role"] == "system" for message in joined[:1])
        words.append('messages without one of role "user": an empty one was added.')
        yield [*joined[:place], {"role": "user", "content": ""}, *joined[place:]], " Nor ".join(words)
