"""Answers are shown as they come: dimmed reasoning on a terminal, raw text elsewhere."""

import sys

import pytest

from mlx_qwen.cli.printer import AnswerPrinter

PIECES = ["Hm", "m.\n</th", "ink>\n\nYes", "."]


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    printer = AnswerPrinter(inside_thinking=True)
    for piece in PIECES:
        printer.push(piece)
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
