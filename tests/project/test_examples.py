"""The examples run as they are, with the bundled model and with any other, and say what they promise."""

import re
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "examples"
SAID = {
    "answer": "425",
    "picture": "bottom middle: blue square",
    "conversation": "Model: 53",
    "tools": "8216*662 is 5438992.",
    "convert": "With 4 bits, 37+58 is 95",
}


def test_these_are_the_examples_and_their_page_lists_them() -> None:
    assert {file.stem for file in FOLDER.glob("*.py")} == set(SAID)
    assert set(re.findall(r"\]\((\w+)\.py\)", (FOLDER / "README.md").read_text(encoding="utf-8"))) == set(SAID)


@pytest.mark.parametrize("name", SAID)
def test_an_example_is_short(name: str) -> None:
    assert len((FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 40


@pytest.mark.parametrize("name", SAID)
def test_an_example_gives_a_right_answer(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert SAID[name] in capsys.readouterr().out


@pytest.mark.parametrize("name", ["answer", "convert"])
def test_an_example_takes_another_model(
    name: str, chat_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, str(chat_folder)])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out
