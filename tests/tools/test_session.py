"""What an agent's session has to compute at least is counted right."""

import itertools
import random

from tools.benchmarks.agent_script import answer_ids, offered, script
from tools.benchmarks.session import least, tiny_model


def by_brute_force(key: list[int], before: list[list[int]]) -> int:
    """The tokens of `key` that are left when each of its beginnings is looked for."""
    known = [n for n in range(len(key) + 1) if any(other[:n] == key[:n] for other in before)]
    return len(key) - max(known, default=0)


def test_the_least_is_what_no_beginning_in_common_spares() -> None:
    rng = random.Random(0)
    for _ in range(300):
        before = [[rng.randrange(2) for _ in range(rng.randrange(1, 9))] for _ in range(rng.randrange(4))]
        key = [rng.randrange(2) for _ in range(rng.randrange(1, 9))]
        assert least(key, before) == by_brute_force(key, before)


def test_the_least_of_a_prompt_seen_before_is_nothing_and_of_the_first_one_all() -> None:
    assert least([1, 2, 3], []) == 3
    assert least([1, 2, 3], [[7], [1, 2, 3, 4]]) == 0
    assert least([1, 2, 3], [[1, 2]]) == 1
    assert least([1, 2, 3], [[2, 3]]) == 3


def test_the_script_has_twenty_requests_whose_answers_end_and_stand_in_the_prompts_behind_them() -> None:
    _, processor = tiny_model()
    asked, tools = list(script()), offered()
    assert len(asked) == 20
    assert sum(each.messages == later.messages for each, later in itertools.pairwise(asked)) == 1
    for each, later in itertools.pairwise(asked):
        answer = answer_ids(processor, each, tools)
        assert answer[-1] in processor.end_token_ids
        if later.what == "a tool's result":
            prompts = [
                processor.encode(processor.apply_chat_template(one.messages, tools=tools, enable_thinking=True))
                for one in (each, later)
            ]
            assert prompts[1][: len(prompts[0]) + len(answer)] == [*prompts[0], *answer]
