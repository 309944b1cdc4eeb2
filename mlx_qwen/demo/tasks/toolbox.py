"""Requests that call one of a few tools, and what to say of the tool's response."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from mlx_qwen.demo.tasks.example import Example, Message
from mlx_qwen.demo.tasks.words import CITIES, NAMES, THINGS

Tool: TypeAlias = dict[str, object]


@dataclass(frozen=True, slots=True)
class _Request:
    """What the user wants, the call's arguments, the tool's response and the answer that follows from it."""

    question: str
    arguments: dict[str, object]
    response: dict[str, object]
    answer: str


def _described(name: str, description: str, /, **types: str) -> Tool:
    properties = {key: {"type": kind} for key, kind in types.items()}
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _weather(rng: random.Random) -> _Request:
    city, degrees = rng.choice(CITIES), rng.randint(-9, 39)
    sky = rng.choice(("sunny", "cloudy", "rainy", "windy", "snowy"))
    asked = rng.choice(
        ("How is the weather in {}?", "Is it warm in {}?", "Weather in {}, please.", "Does it rain in {}?")
    )
    answer = f"It is {sky} in {city}, {degrees} degrees."
    return _Request(asked.format(city), {"city": city}, {"sky": sky, "degrees": degrees}, answer)


def _calculator(rng: random.Random) -> _Request:
    a, b, sign = rng.randint(100, 9999), rng.randint(10, 999), rng.choice("+-*")
    expression = f"{a}{sign}{b}"
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    asked = rng.choice(("What is {}? Use the calculator.", "Calculate {} with the tool.", "How much is {}?"))
    answer = f"{expression} is {result}."
    return _Request(asked.format(expression), {"expression": expression}, {"result": result}, answer)


def _timer(rng: random.Random) -> _Request:
    minutes = rng.randint(2, 180)
    asked = rng.choice(("Set a timer for {} minutes.", "Wake me in {} minutes.", "Tell me when {} minutes are over."))
    answer = f"The timer is set to {minutes} minutes."
    return _Request(asked.format(minutes), {"minutes": minutes}, {"set": True}, answer)


def _message(rng: random.Random) -> _Request:
    name, thing, count = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 99)
    text = rng.choice(("I have {count} {thing}", "Bring {count} {thing}", "Where are the {count} {thing}?")).format(
        count=count, thing=thing
    )
    asked = rng.choice(('Write to {}: "{}"', 'Send {} the message "{}"', 'Tell {} this: "{}"')).format(name, text)
    return _Request(asked, {"name": name, "text": text}, {"sent": True}, f"I have written to {name}.")


def _telephone(rng: random.Random) -> _Request:
    name, number = rng.choice(NAMES), rng.randint(1000, 99999)
    asked = rng.choice(("What is the telephone number of {}?", "How can I call {}?", "Find the number of {}."))
    return _Request(asked.format(name), {"name": name}, {"number": number}, f"The number of {name} is {number}.")


def _stock(rng: random.Random) -> _Request:
    thing, count, city = rng.choice(THINGS), rng.randrange(400), rng.choice(CITIES)
    asked = rng.choice(("How many {} are there in the shop in {}?", "Are there {} in the shop in {}?"))
    answer = f"There are {count} {thing} in the shop in {city}."
    return _Request(asked.format(thing, city), {"thing": thing, "city": city}, {"count": count}, answer)


_TOOLS: tuple[tuple[Tool, Callable[[random.Random], _Request]], ...] = (
    (_described("get_weather", "The weather in a city", city="string"), _weather),
    (_described("calculator", "Calculate with large numbers", expression="string"), _calculator),
    (_described("set_timer", "Ring after some minutes", minutes="integer"), _timer),
    (_described("send_message", "Write to a person", name="string", text="string"), _message),
    (_described("find_number", "Telephone number of a person", name="string"), _telephone),
    (_described("count_stock", "How many things a shop has", thing="string", city="string"), _stock),
)
TOOLS = tuple(tool for tool, _ in _TOOLS)


def call(rng: random.Random) -> Example:
    """A request that ends with the call of a tool."""
    return _conversation(rng, requests=1, with_response=False)


def answered(rng: random.Random) -> Example:
    """A request, the call, the tool's response and the answer."""
    return _conversation(rng, requests=1, with_response=True)


def several(rng: random.Random) -> Example:
    """Two requests, the first answered, the second most times too."""
    return _conversation(rng, requests=2, with_response=rng.random() < 0.7)


def _conversation(rng: random.Random, *, requests: int, with_response: bool) -> Example:
    offered = rng.sample(_TOOLS, rng.choice((1, 2, 2, 3)))
    thinking = rng.random() < 0.4
    turns: list[Message] = []
    content = []
    for index in range(requests):
        tool, draw_request = rng.choice(offered)
        request, last = draw_request(rng), index == requests - 1
        turns += _turns(_name(tool), request, reasoned=thinking and last, answered=with_response or not last)
        content.append(json.dumps([_name(tool), request.arguments]))
    return Example(" ".join(content), tuple(turns), thinking, tuple(tool for tool, _ in offered))


def _turns(name: str, request: _Request, *, reasoned: bool, answered: bool) -> list[Message]:
    function = {"name": name, "arguments": request.arguments}
    calling: Message = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    answering: Message = {"role": "assistant", "content": request.answer}
    if reasoned:
        values = ", ".join(str(value) for value in request.arguments.values())
        calling["reasoning_content"] = f"I call {name} with {values}."
        answering["reasoning_content"] = f"{name} has answered."
    turns: list[Message] = [{"role": "user", "content": request.question}, calling]
    if answered:
        turns += [{"role": "tool", "content": json.dumps(request.response)}, answering]
    return turns


def _name(tool: Tool) -> str:
    function = tool["function"]
    assert isinstance(function, dict), "a tool describes a function"
    return str(function["name"])
