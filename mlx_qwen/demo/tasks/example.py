"""What every task of the demo draws: a conversation, or a plain text, with its right answers."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias
from zlib import crc32

from mlx_qwen.demo.tasks.scenes import Scene

Part: TypeAlias = dict[str, object]
Message: TypeAlias = dict[str, object]

# One content in this many is kept out of training.
HELD_OUT_SHARE = 12


@dataclass(frozen=True, slots=True)
class Clip:
    """Scenes one after the other, each shown for two frames, and how fast."""

    scenes: tuple[Scene, ...]
    frames_per_second: float

    @property
    def content(self) -> str:
        """Everything that questions can ask about."""
        return " > ".join(scene.content for scene in self.scenes)


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation whose assistant's turns are the right answers, or a plain text.

    Attributes:
        content: what is asked about, apart from its wording: training and held-out questions differ in it.
        messages: chat messages; a picture is the part {"type": "image"}, a frame sequence {"type": "video"}.
        thinking: whether the last answer is reasoned first, in its `reasoning_content`.
        tools: function descriptions for the chat template.
        pictures: what the image parts show, in order.
        clips: what the video parts show, in order.
        text: a plain text instead of messages.
        cut: how much of `text` a prompt shows.
        end: how far the answer after it reaches, where the rest is a matter of chance.
    """

    content: str
    messages: tuple[Message, ...] = ()
    thinking: bool = False
    tools: tuple[dict[str, object], ...] = ()
    pictures: tuple["Scene", ...] = ()
    clips: tuple["Clip", ...] = ()
    text: str = ""
    cut: int = 0
    end: int | None = None

    @property
    def held_out(self) -> bool:
        """Whether the content belongs to the questions that are never trained on."""
        return crc32(self.content.encode()) % HELD_OUT_SHARE == 0

    @property
    def answer(self) -> str:
        """The right answer to the last question, a call in Qwen3.5's format, or how a plain text goes on."""
        if not self.messages:
            return self.text[self.cut : self.end]
        last = self.messages[-1]
        return str(last["content"]) + call_text(last.get("tool_calls"))


Draw: TypeAlias = Callable[[random.Random], Example]


def draw(task: Draw, rng: random.Random, *, held_out: bool) -> Example:
    """The first example of `task` on the wanted side of the split."""
    while True:
        example = task(rng)
        if example.held_out == held_out:
            return example


def asked(question: str, answer: str, reasoning: str = "") -> tuple[Message, Message]:
    """A question of the user and its answer."""
    reply: Message = {"role": "assistant", "content": answer}
    if reasoning:
        reply["reasoning_content"] = reasoning
    return {"role": "user", "content": question}, reply


def call_text(calls: object) -> str:
    """The first call of a message, in Qwen3.5's format; empty without one."""
    if not isinstance(calls, list) or not calls:
        return ""
    function = calls[0]["function"]
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in function["arguments"].items())
    return f"<tool_call>\n<function={function['name']}>\n{parameters}</function>\n</tool_call>"
