"""A scripted session of an agent: twenty requests as a client sends them, and the answers that they get."""

import random
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image

from mlx_qwen.demo.tasks.toolbox import TOOLS
from mlx_qwen.demo.tasks.words import ANIMALS, CITIES, COLOURS, NAMES, THINGS
from mlx_qwen.prompt import Processor

Message = dict[str, object]


class Asked(NamedTuple):
    """A request: what happens in it, its messages, and the message that answers it."""

    what: str
    messages: list[Message]
    reply: Message


def script(seed: int = 0) -> Iterator[Asked]:
    """The requests in order; answers are reasoned, and calls of tools are followed by their results."""
    rng = random.Random(seed)
    history: list[Message] = [{"role": "system", "content": f"You are a careful assistant. {_text(rng, 24)}"}]

    def turn(what: str, question: Message, calls: int) -> Iterator[Asked]:
        history.append(question)
        for call in range(calls + 1):
            reply = _reply(rng, calling=call < calls)
            yield Asked(what if call == 0 else "a tool's result", list(history), reply)
            history.append(reply)
            if call < calls:
                history.append({"role": "tool", "content": _text(rng, 24)})

    yield from turn("a question about a file", _user(_text(rng, 48)), 3)
    yield from turn("another question, reasoning dropped", _user(_text(rng, 10)), 2)
    yield Asked("the same again", list(history[:-1]), history[-1])
    picture: Message = {"type": "image", "image": Image.effect_noise((128, 128), 60).convert("RGB")}
    words: Message = {"type": "text", "text": _text(rng, 8)}
    yield from turn("a question about an image", {"role": "user", "content": [picture, words]}, 1)
    yield from turn("a question without tools", _user(_text(rng, 12)), 0)
    del history[-2:]
    yield from turn("the last question changed", _user(_text(rng, 12)), 1)
    yield from turn("another question, reasoning dropped", _user(_text(rng, 32)), 2)
    second = [i for i, message in enumerate(history) if message["role"] == "user"][1]
    history[second] = _user(_text(rng, 10))
    del history[second + 1 :]
    yield from turn("an older question edited", history.pop(), 2)
    yield from turn("another question, reasoning dropped", _user(_text(rng, 16)), 0)


def answer_ids(processor: Processor, asked: Asked, tools: list[dict[str, object]]) -> list[int]:
    """The tokens that a model would have written for the reply, its end token the last."""
    before = processor.apply_chat_template(asked.messages, tools=tools, enable_thinking=True)
    whole = processor.apply_chat_template([*asked.messages, asked.reply], tools=tools, add_generation_prompt=False)
    assert whole.startswith(before), "a template goes on from its own generation prompt"
    return processor.encode(whole[len(before) :].removesuffix("\n"))


def offered() -> list[dict[str, object]]:
    """The tools of every request."""
    return [dict(tool) for tool in TOOLS]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _reply(rng: random.Random, *, calling: bool) -> Message:
    reply: Message = {"role": "assistant", "content": _text(rng, 2), "reasoning_content": _text(rng, 2)}
    if calling:
        function = {"name": "get_weather", "arguments": {"city": rng.choice(CITIES)}}
        reply["tool_calls"] = [{"type": "function", "function": function}]
    return reply


def _text(rng: random.Random, sentences: int) -> str:
    """Sentences that no two texts share."""
    return " ".join(
        f"{rng.choice(NAMES)} has {rng.randrange(1000)} {rng.choice(COLOURS)} {rng.choice(THINGS)} and a "
        f"{rng.choice(ANIMALS)} in {rng.choice(CITIES)}."
        for _ in range(sentences)
    )
