"""Answers are shown as they come: dimmed reasoning on a terminal, raw text elsewhere."""

import sys

import mlx.core as mx
import pytest

from mlx_qwen.answer import AnswerDelta, AnswerStream
from mlx_qwen.answer.response import FinishReason, GenerationResponse
from mlx_qwen.cli.printer import AnswerPrinter

PIECES = ["Hm", "m.\n</th", "ink>\n\nYes", "."]


def response(delta: AnswerDelta, finish_reason: FinishReason | None = None) -> GenerationResponse:
    return GenerationResponse(
        text=delta.text,
        token=0,
        logprobs=mx.zeros(1),
        from_draft=False,
        prompt_tokens=1,
        prompt_tps=1.0,
        generation_tokens=len(PIECES),
        generation_tps=1.0,
        peak_memory=0.0,
        finish_reason=finish_reason,
        delta=delta,
    )


def shown(capsys: pytest.CaptureFixture[str], pieces: list[str] = PIECES) -> str:
    printer, stream = AnswerPrinter(), AnswerStream(inside_thinking=True)
    for piece in pieces:
        printer.push(response(stream.push(piece)))
    printer.push(response(stream.finish(), "stop"))
    printer.finish()
    return capsys.readouterr().out


def test_a_terminal_shows_reasoning_dimmed_and_no_tags(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    output = shown(capsys)
    assert output.startswith("\x1b[2mHm")
    assert output.endswith("\n\nYes.\n")
    assert "think" not in output


def test_a_pipe_gets_the_raw_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys) == "".join(PIECES) + "\n"


CALL = [
    "\n</think>\n\nI ask.\n",
    "<tool_call>\n<function=weather>\n<parameter=",
    "city>\nKö",
    "ln\n</parameter>\n</fun",
]


def test_a_terminal_shows_a_call_by_its_name_and_arguments(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    output = shown(capsys, [*CALL, "ction>\n</tool_call>"])
    assert output == 'I ask.\n\n\x1b[1mweather \x1b[0m{"city": "Köln"}\n'


def test_a_terminal_gets_no_codes_from_a_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert shown(capsys, ["</think>\n\n", "a\x1b[2Jb\x07\x9b1mc\td\r\n"]) == "a[2Jb1mc\td\n\n"


def test_an_answer_cut_by_the_limit_says_so_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    printer = AnswerPrinter()
    printer.push(response(AnswerDelta("Once"), "length"))
    printer.finish()
    written = capsys.readouterr()
    assert written.out == "Once\n"
    assert "cut at 4 tokens" in written.err
    assert "--max-tokens" in written.err
