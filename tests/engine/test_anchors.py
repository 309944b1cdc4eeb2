"""Checkpoints lie where later prompts differ: after the system message, around the last question, before the answer."""

from itertools import pairwise
from pathlib import Path

import pytest

import mlx_qwen.demo
from mlx_qwen.config import ModelConfig
from mlx_qwen.engine.anchors import GRID, Marks, Span, anchors, question_end
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.template import ChatTemplate
from tests.support.tokenizers import CHAT_TEMPLATE, tiny_tokenizer

NEAREST = 16
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
SYSTEM = {"role": "system", "content": "You help with the garden, and answer in full sentences whatever is asked."}
QUESTION = {"role": "user", "content": "When should I plant the beans that I bought on the market last week?"}
SECOND = {"role": "user", "content": "And how far apart do they have to stand, if the bed is a metre wide?"}
CALL = {
    "role": "assistant",
    "reasoning_content": "I have to look that up first, the almanac knows more about it than I do.",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"where": "in the almanac"}}}],
}
RESULT = {"role": "tool", "content": "Beans: after the last frost, which is in the middle of May around here."}
ANSWER = {"role": "assistant", "content": "Plant the beans in the middle of May.", "reasoning_content": "It says May."}


def bundled() -> Processor:
    folder = Path(mlx_qwen.demo.__file__).parent / "checkpoint"
    return Processor.from_directory(folder, ModelConfig.from_directory(folder))


def qwens() -> Processor:
    return Processor(tiny_tokenizer(), template=ChatTemplate({"default": CHAT_TEMPLATE}), end_token_ids=frozenset())


@pytest.fixture(params=[bundled, qwens])
def processor(request: pytest.FixtureRequest) -> Processor:
    made: Processor = request.param()
    return made


class Rendered:
    """A conversation's prompt, and what its checkpoints hold as text."""

    def __init__(self, processor: Processor, messages: list[dict[str, object]], **options: object) -> None:
        self.processor = processor
        self.marks = Marks.of(processor)
        text = processor.apply_chat_template(messages, tools=TOOLS, enable_thinking=True, **options)  # type: ignore[arg-type]
        self.ids = processor.encode(text)

    def held(self, *, after: int = 0) -> list[str]:
        return [self.processor.decode(self.ids[:place]) for place in anchors(self.ids, self.marks, after=after)]


def begins_with(processor: Processor, messages: list[dict[str, object]]) -> str:
    """The text of the messages alone, which every prompt with more of them begins with."""
    return processor.apply_chat_template(messages, tools=TOOLS, add_generation_prompt=False)  # type: ignore[arg-type]


def test_a_question_leaves_checkpoints_after_the_system_message_and_after_the_question(processor: Processor) -> None:
    prompt = Rendered(processor, [SYSTEM, QUESTION])
    asked = begins_with(processor, [SYSTEM, QUESTION])
    system = asked[: asked.rindex("<|im_start|>user")]
    assert "look" in system and SYSTEM["content"] in system
    assert prompt.held() == [system, asked, processor.decode(prompt.ids)]


def test_questions_behind_the_same_long_notes_share_a_checkpoint_near_their_end(processor: Processor) -> None:
    notes = " ".join(f"The row number {number} is sown." for number in range(300))
    prompts = [
        Rendered(processor, [SYSTEM, {"role": "user", "content": notes + str(question["content"])}])
        for question in (QUESTION, SECOND)
    ]
    one, other = (prompt.ids for prompt in prompts)
    common = next(at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    shared = set(anchors(one, prompts[0].marks)) & set(anchors(other, prompts[1].marks))
    assert common - 1200 < max(place for place in shared if place <= common)


def test_a_later_question_leaves_checkpoints_before_and_after_it(processor: Processor) -> None:
    prompt = Rendered(processor, [SYSTEM, QUESTION, ANSWER, SECOND])
    whole = processor.decode(prompt.ids)
    before, after = (whole.rindex(part) for part in ("<|im_start|>user", "<|im_start|>assistant"))
    assert prompt.held()[-3:] == [whole[:before], whole[:after], whole]
    assert len(prompt.held()) == 4


def test_the_checkpoints_around_a_question_stay_for_a_whole_tool_loop(processor: Processor) -> None:
    first = Rendered(processor, [SYSTEM, QUESTION])
    loop = Rendered(processor, [SYSTEM, QUESTION, CALL, RESULT, CALL, RESULT])
    assert loop.held()[:2] == first.held()[:2]
    whole = processor.decode(loop.ids)
    assert loop.held()[2:] == [whole[: whole.rindex("<|im_start|>")], whole]
    assert (
        question_end(loop.ids, loop.marks) == question_end(first.ids, first.marks) == anchors(first.ids, first.marks)[1]
    )


def test_once_reasoning_is_dropped_the_next_prompt_begins_with_the_checkpoint_at_the_questions_end(
    processor: Processor,
) -> None:
    loop = Rendered(processor, [SYSTEM, QUESTION, CALL, RESULT])
    later = Rendered(processor, [SYSTEM, QUESTION, CALL, RESULT, ANSWER, SECOND])
    shared = next(i for i, (a, b) in enumerate(zip(loop.ids, later.ids, strict=False)) if a != b)
    usable = max(place for place in anchors(loop.ids, loop.marks) if place <= shared)
    assert usable == question_end(loop.ids, loop.marks)
    assert shared - usable < NEAREST


def test_a_result_that_another_quotes_is_a_question(processor: Processor) -> None:
    quoting = {"role": "user", "content": "What does this mean? <tool_response> stands in my log file, all over it."}
    prompt = Rendered(processor, [SYSTEM, QUESTION, ANSWER, quoting])
    whole = processor.decode(prompt.ids)
    assert whole[: whole.rindex("<|im_start|>user")] in prompt.held()
    assert question_end(prompt.ids, prompt.marks) == anchors(prompt.ids, prompt.marks)[-2]


def test_only_what_is_not_held_yet_is_cut(processor: Processor) -> None:
    prompt = Rendered(processor, [SYSTEM, QUESTION, ANSWER, SECOND])
    everywhere = anchors(prompt.ids, prompt.marks)
    for after in range(len(prompt.ids) + 1):
        found = anchors(prompt.ids, prompt.marks, after=after)
        assert set(found) == {
            place for place in everywhere if place - after >= NEAREST or place == len(prompt.ids) > after
        }


MARKS = Marks(start=1000, user=(1001,), system=(1002,), tool_response=1003)


def chat(*lengths: int, role: int = 1001) -> list[int]:
    """Messages of so many tokens, and a generation prompt of 3."""
    ids = []
    for length in lengths:
        ids += [1000, role, *[5] * (length - 2)]
    return [*ids, 1000, 1004, 5]


def test_a_prompt_without_messages_leaves_one_near_its_end() -> None:
    for marks in (None, MARKS):
        assert anchors([5] * 500, marks) == [436, 500]
        assert question_end([5] * 500, marks) == 500


@pytest.mark.parametrize("length", [1, 2, 15, 16, 64, 65, 79, 80, 81])
def test_a_short_prompt_is_cut_only_where_that_saves_something(length: int) -> None:
    assert anchors([5] * length, None) == ([length - 64, length] if length >= 80 else [length])


def test_the_grid_is_absolute_and_becomes_coarser_rather_than_dense() -> None:
    assert anchors([5] * 30_000, None) == [8192, 16384, 24576, 29936, 30_000]
    for length in (50_000, 100_000, 262_144):
        found = anchors([5] * length, None)
        assert 3 <= len(found) <= 7
        assert all(place % GRID == 0 for place in found[:-2])
        steps = {b - a for a, b in pairwise(found[:-2])}
        assert len(steps) <= 1


def test_the_middle_keeps_the_grid_as_a_prompt_grows() -> None:
    held: set[int] = set()
    for length in range(1_000, 120_000, 1_000):
        ids = chat(length)
        held |= set(anchors(ids, MARKS, after=max((place for place in held if place < length), default=0)))
    assert set(range(GRID, 119_000, GRID)) <= held


def test_at_most_eight_places_are_cut_however_long_the_prompt() -> None:
    for length in range(1_000, 262_000, 7_919):
        ids = [1000, 1002, *[5] * 98, *chat(length, 400)]
        assert len(anchors(ids, MARKS)) <= 8


def test_the_earlier_of_two_near_places_is_kept() -> None:
    ids = [1000, 1002, *[5] * 98, *chat(12)]
    assert anchors(ids, MARKS) == [100, 115]
    ids = [1000, 1002, *[5] * 98, *chat(16)]
    assert anchors(ids, MARKS) == [100, 116, 119]


def test_nothing_is_cut_within_an_image() -> None:
    image = Span(8_000, 500)
    assert anchors([5] * 9_000, None, media=[image]) == [8_000, 8_936, 9_000]
    near_the_end = Span(400, 90)
    assert anchors([5] * 500, None, media=[near_the_end]) == [400, 500]
    for start in range(400, 440):
        for place in anchors([5] * 500, None, media=[Span(start, 30)]):
            assert not start < place < start + 30


def test_a_prompt_that_is_held_whole_needs_no_checkpoint() -> None:
    assert anchors([5] * 500, MARKS, after=500) == []


def test_a_tokenizer_without_messages_has_no_marks() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    assert Marks.of(Processor(Tokenizer(BPE()), template=None, end_token_ids=frozenset())) is None
