"""Calls that transformers renders with a chat template of the family are read back as they were."""

import random
import re
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import mlx_qwen.demo
from mlx_qwen.json_types import Json
from tests.answer.transcripts import call, parameter, stream, tool
from tests.support.tokenizers import CHAT_TEMPLATE, tiny_tokenizer

BUNDLED = (Path(mlx_qwen.demo.__file__).parent / "checkpoint" / "chat_template.jinja").read_text(encoding="utf-8")
QUESTION = {"role": "user", "content": "?"}
TOOL = tool(
    "write",
    path={"type": "string"},
    content={"type": "string"},
    lines={"type": "integer"},
    share={"type": "number"},
    append={"type": "boolean"},
    owner={"type": ["string", "null"]},
    tags={"type": "array", "items": {"type": ["string", "integer"]}},
    options={"type": "object"},
)


@cache
def tokenizer(template: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), chat_template=template)


def rendered(answer: dict[str, object], template: str = BUNDLED) -> str:
    """What transformers shows a model as the text of its own earlier answer, behind the opened think block."""
    text = tokenizer(template).apply_chat_template([QUESTION, answer], tools=[TOOL], tokenize=False)
    return text.rpartition("<|im_start|>assistant\n<think>\n")[2].rpartition("<|im_end|>")[0]


def asked(*arguments: dict[str, Json]) -> dict[str, object]:
    calls = [{"type": "function", "function": {"name": "write", "arguments": one}} for one in arguments]
    return {"role": "assistant", "content": "I write.", "reasoning_content": "A file.", "tool_calls": calls}


LETTERS = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<") | st.just("\n"), max_size=12)
SAMPLES = st.sampled_from(
    [
        call("write", parameter("path", "a"), parameter("content", "b")),
        call("write", parameter("content", "")),
        call("other", parameter("path", "a")),
        call("other"),
        f"{call('write', parameter('lines', '1'))}\n{call('other')}",
        '<tool_call>\n{"name": "write", "arguments": {}}\n</tool_call>',
    ]
)
ALONE = st.sampled_from(
    [
        "<tool_call>",
        "<tool_call> is a tag",
        "the <function=write> in a line",
        "the <parameter=path> in a line",
        "<parameter=unknown>",
        "x\n</parameter>\n<parameter=unknown>\ny",
        "</parameter> in a line",
        "<think>",
        "</think>",
        "<",
        "</",
    ]
)
CLOSING = st.sampled_from(["", "</tool_call>", "</function>", "</function>\n</tool_call>"])
PARTS = st.lists(LETTERS | SAMPLES.map(lambda text: f"\n{text}\n") | ALONE.map(lambda text: f" {text} "), max_size=6)
# A closing tag with a call behind it is the end of one call and the beginning of the next: none follows it here.
MARKED = st.tuples(PARTS.map("".join), CLOSING, LETTERS).map("".join)
ARGUMENTS = st.fixed_dictionaries(
    {"path": LETTERS},
    optional={
        "content": MARKED,
        "lines": st.integers(),
        "share": st.floats(allow_nan=False, allow_infinity=False),
        "append": st.booleans(),
        "owner": st.none() | st.sampled_from(["me", "you"]),
        "tags": st.lists(LETTERS | st.integers(), max_size=3),
        "options": st.dictionaries(LETTERS, LETTERS | st.booleans() | st.none(), max_size=2),
    },
)


@pytest.mark.parametrize("template", [BUNDLED, CHAT_TEMPLATE], ids=["bundled", "minimal"])
@settings(deadline=None, max_examples=60)
@given(st.lists(ARGUMENTS, min_size=1, max_size=3))
def test_calls_rendered_by_transformers_come_back(template: str, arguments: list[dict[str, Json]]) -> None:
    """Values may hold whole sample calls, names that the schema does not have, and tags without their partners."""
    text = rendered(asked(*arguments), template)
    _, whole = stream([text[at : at + 3] for at in range(0, len(text), 3)], inside_thinking=True, tools=[TOOL])
    assert [(one.name, one.arguments) for one in whole.tool_calls] == [("write", one) for one in arguments]
    assert (whole.reasoning, whole.content.strip()) == ("A file.", "I write.")
    assert rendered(whole.message, template) == text


FRAGMENTS = (
    *("<tool_call>", "</tool_call>", "<function=write>", "<function=other>", "</function>"),
    *("<parameter=path>", "<parameter=lines>", "<parameter=unknown>", "</parameter>", "word"),
)


def looks_like_the_format(lines: list[str]) -> bool:
    """Whether the lines, as the end of a value, could be a call's own: the schema does not decide then."""
    text = "|".join(lines)
    real_parameter = "<parameter=lines>" in lines
    doubled = lines[-1] == "</parameter>"
    next_call = re.search(r"</\w+>.*<function=", text) is not None
    unclosed_sample = re.search(r"<function=.*(<parameter=|<function=.*</)", text) is not None
    whole_end = re.search(r"</parameter>(\|</function>)*\|</tool_call>", text) is not None
    return real_parameter or doubled or next_call or unclosed_sample or whole_end


def test_of_random_markup_only_what_looks_like_the_format_itself_is_read_differently() -> None:
    """Of 3,000 random values of 1 to 5 lines, each a tag or a word, 1,324 do not come back, for one of these reasons:

    a line begins with a parameter that the tool has and the call did not give yet (1); the last line is `</parameter>`,
    which is taken as doubled (2); a closing tag and later a function, as between two calls (3); a sample call that
    is not closed as often as opened (4); the whole end of a call, or one without `</function>` (5).
    """
    rng = random.Random(0)
    lost = 0
    for _ in range(3000):
        lines = [rng.choice(FRAGMENTS) for _ in range(rng.randint(1, 5))]
        arguments = {"path": "a", "content": "\n".join(lines)}
        _, whole = stream([call("write", *(parameter(key, one) for key, one in arguments.items()))], tools=[TOOL])
        came_back = [(one.name, one.arguments) for one in whole.tool_calls] == [("write", arguments)]
        assert came_back or looks_like_the_format(lines)
        lost += not came_back
    assert lost == 1324
