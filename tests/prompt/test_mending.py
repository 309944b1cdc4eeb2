"""What a template refuses is said otherwise where that helps, and only then."""

import warnings

import pytest

from mlx_qwen.errors import PromptError
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt.inputs import prompt_inputs
from tests.prompt.test_chat_template import processor, reference

USER = {"role": "user", "content": "Hi"}
LATE = [{"role": "system", "content": "A"}, USER, {"role": "system", "content": "B"}, USER]
ANY_ROLE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
DROPS_LATE = (
    "{% for m in messages if m.role != 'system' or m == messages[0] %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
KNOWS_DEVELOPERS = "{% for m in messages %}{{ '#' if m.role == \"developer\" else m.role }}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("template", [None, DROPS_LATE], ids=["refused", "dropped"])
def test_late_system_messages_are_joined_in_order_with_one_warning(template: str | None) -> None:
    one = processor() if template is None else processor(template)
    with pytest.warns(UserWarning, match="does not take a system message at position 2") as caught:
        found = one.apply_chat_template(LATE)
    joined = [{"role": "system", "content": "A\n\nB"}, USER, USER]
    assert found == one.apply_chat_template(joined)
    assert len(caught) == 1


def test_a_template_that_renders_late_system_messages_gets_them() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = processor(ANY_ROLE).apply_chat_template(LATE)
    assert found == reference(ANY_ROLE).apply_chat_template(LATE, tokenize=False)


def test_a_template_that_needs_no_user_is_not_given_one() -> None:
    messages = [{"role": "system", "content": "A"}, {"role": "assistant", "content": "B"}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = processor(ANY_ROLE).apply_chat_template(messages)
    assert found == reference(ANY_ROLE).apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("first", [[], [{"role": "system", "content": "A"}]], ids=["bare", "system"])
def test_a_template_that_needs_a_user_gets_an_empty_one_with_a_warning(first: list[dict[str, str]]) -> None:
    answer = [{"role": "assistant", "content": "B"}]
    with pytest.warns(UserWarning, match='messages without one of role "user"'):
        found = processor().apply_chat_template([*first, *answer])
    assert found == processor().apply_chat_template([*first, {"role": "user", "content": ""}, *answer])


def test_both_repairs_are_one_warning() -> None:
    messages = [{"role": "assistant", "content": "B"}, {"role": "system", "content": "A"}]
    with pytest.warns(UserWarning, match=r"position 1: .* Nor messages without") as caught:
        found = processor().apply_chat_template(messages)
    expected = [messages[1], {"role": "user", "content": ""}, messages[0]]
    assert found == processor().apply_chat_template(expected)
    assert len(caught) == 1


def test_what_no_repair_helps_keeps_the_templates_words() -> None:
    template = "{% if messages|length > 2 %}{{ raise_exception('too many') }}{% endif %}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PromptError, match="too many"):
            processor(template).apply_chat_template([*LATE, USER])


def test_a_developer_speaks_as_the_system_unless_the_template_knows_the_role() -> None:
    messages = [{"role": "developer", "content": "A"}, USER]
    as_system = [{"role": "system", "content": "A"}, USER]
    assert processor().apply_chat_template(messages) == processor().apply_chat_template(as_system)
    assert processor(KNOWS_DEVELOPERS).apply_chat_template(messages) == "#AuserHi"
    assert processor(ANY_ROLE).apply_chat_template(messages) == "<system>A<user>Hi"


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"])
def test_an_image_for_a_model_without_vision_is_refused_by_name_before_the_template_sees_it(
    template: str | None,
) -> None:
    blind = processor() if template is None else processor(template)
    asked = [{"role": "user", "content": [{"type": "image", "image": "cats/tom.png"}, "Who is this?"]}]
    with pytest.raises(PromptError, match=r"The image cats/tom.png in message 1 cannot be shown .* for text only"):
        prompt_inputs(blind, [USER, *asked], GenerationOptions())
    with pytest.raises(PromptError, match=r"The video tom.mp4 in message 0 cannot be shown"):
        prompt_inputs(blind, [USER], GenerationOptions(videos=["tom.mp4"]))
