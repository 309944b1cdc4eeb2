"""The text on which conversions of the demo are compared."""

from tools.demo_text import held_out_text


def test_the_text_is_always_the_same() -> None:
    assert held_out_text(2) == held_out_text(2)


def test_the_text_has_plain_texts_and_conversations_but_no_pictures() -> None:
    text = held_out_text(4)
    assert text.count("<|endoftext|>") == 8  # counting and tales
    assert text.count("<|im_start|>system\n# Tools") == 8  # calls and responses
    assert "<|vision_start|>" not in text
