"""`mlx-qwen chat` on a real terminal: what is typed, pasted, dragged and interrupted."""

import json
import os
import re
import shutil
import signal
import stat
from pathlib import Path

import pytest

from tests.support.terminal import Terminal

ROOT = Path(__file__).resolve().parents[2]
GREEDY = ("chat", "--temp", "0")
PLAIN = "sys.modules.update(prompt_toolkit=None, rich=None)\n"
# The bundled model, whose answers end only at the limit of tokens.
ENDLESS = "from mlx_qwen.prompt import processor; processor.end_token_ids = lambda *_: frozenset()\n"
BOTH = pytest.mark.parametrize("first", ["", PLAIN], ids=["prompt_toolkit", "plain"])
CTRL_C, CTRL_D, UP, LEFT, ENTER = "\x03", "\x04", "\x1b[A", "\x1b[D", "\r"


def ask(terminal: Terminal, text: str) -> str:
    """Type a line and wait for the next prompt; what was printed meanwhile."""
    terminal.type(text + ENTER)
    return terminal.wait_for_prompt()


def saved(file: Path) -> list[dict[str, object]]:
    content = json.loads(file.read_text(encoding="utf-8"))
    messages: list[dict[str, object]] = content["messages"]
    return messages


LONG = " ".join(f"{number}." for number in range(3_600))


@BOTH
def test_a_paste_of_20_kb_arrives_whole(tmp_path: Path, first: str) -> None:
    text = f"/system {LONG}"
    assert 20_000 < len(text) < 21_000
    with Terminal(*GREEDY, cwd=tmp_path, first=first) as terminal:
        terminal.wait_for_prompt()
        terminal.paste(text)
        ask(terminal, "")
        ask(terminal, "/save chat.json")
    assert saved(tmp_path / "chat.json") == [{"role": "system", "content": LONG}]


def test_a_paste_of_20_kb_that_a_pipe_on_the_other_side_lets_the_terminal_cut_is_refused(tmp_path: Path) -> None:
    with Terminal(*GREEDY, cwd=tmp_path, first=PLAIN + "sys.modules.update(readline=None)") as terminal:
        terminal.wait_for(">>> ")
        terminal.type(f"{LONG}\n")
        terminal.wait_for("this one may be cut")
        terminal.type("What is 12+30?\n")
        terminal.wait_for("42")


@BOTH
def test_pasted_lines_are_one_question(tmp_path: Path, first: str) -> None:
    note = "Here is a note.\nAda: 41\nBen: 87\nCora: 53\n\nWhat number has Ben?"
    with Terminal(*GREEDY, cwd=tmp_path, first=first) as terminal:
        terminal.wait_for_prompt()
        terminal.paste(note)
        assert "87" in ask(terminal, "")
        ask(terminal, "/save chat.json")
    assert [message["content"] for message in saved(tmp_path / "chat.json")] == [note, "87"]


def test_lines_are_edited_and_several_are_typed(tmp_path: Path) -> None:
    with Terminal(*GREEDY, cwd=tmp_path) as terminal:
        terminal.wait_for_prompt()
        assert "42" in ask(terminal, f"What is 12+0?{LEFT * 2}3")
        terminal.type("/system one\\\rtwo\x1b\rthree")
        ask(terminal, "")
        ask(terminal, "/save chat.json")
        terminal.type(CTRL_D)
        assert terminal.end() == 0
    assert saved(tmp_path / "chat.json") == [{"role": "system", "content": "one\ntwo\nthree"}]


def test_what_was_typed_comes_back_in_the_next_session_and_is_private(tmp_path: Path) -> None:
    with Terminal(*GREEDY, cwd=tmp_path) as terminal:
        terminal.wait_for_prompt()
        ask(terminal, "What is 12+30?")
        terminal.type(f"/exit{ENTER}")
        assert terminal.end() == 0
    with Terminal(*GREEDY, cwd=tmp_path) as terminal:
        terminal.wait_for_prompt()
        terminal.type(UP * 2)
        terminal.wait_for("What is 12")
        assert "42" in ask(terminal, "")
    file = tmp_path / "state" / "mlx-qwen" / "history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_no_history_is_kept_where_it_is_switched_off(tmp_path: Path) -> None:
    with Terminal(*GREEDY, cwd=tmp_path, env={"MLX_QWEN_HISTORY": "0"}) as terminal:
        terminal.wait_for_prompt()
        ask(terminal, "What is 12+30?")
    assert not (tmp_path / "state").exists()


@BOTH
def test_ctrl_c_clears_the_line_and_keeps_the_conversation(tmp_path: Path, first: str) -> None:
    with Terminal(*GREEDY, cwd=tmp_path, first=first) as terminal:
        terminal.wait_for_prompt()
        ask(terminal, "What is 12+30?")
        terminal.type("never asked")
        terminal.wait_for("never asked")
        terminal.interrupt()
        terminal.interrupt()
        assert "7" in ask(terminal, "What is 3+4?")
        ask(terminal, "/save chat.json")
        terminal.type(CTRL_D)
        assert terminal.end() == 0
    contents = [message["content"] for message in saved(tmp_path / "chat.json")]
    assert contents == ["What is 12+30?", "42", "What is 3+4?", "7"]


@BOTH
def test_an_interrupted_answer_is_kept_as_far_as_it_came(tmp_path: Path, first: str) -> None:
    with Terminal(*GREEDY, cwd=tmp_path, first=first + ENDLESS) as terminal:
        terminal.wait_for_prompt()
        terminal.type(f"What is 12+30?{ENTER}")
        terminal.wait_for("42")
        terminal.type(CTRL_C * 3)
        terminal.wait_for(r"\(stopped\)")
        terminal.wait_for_prompt()
        ask(terminal, "/save chat.json")
        assert "4,0" not in ask(terminal, "/stats")
    question, answer = saved(tmp_path / "chat.json")
    assert question == {"role": "user", "content": "What is 12+30?"}
    assert str(answer["content"]).startswith("42")


def test_what_is_typed_during_an_answer_waits_for_the_prompt(tmp_path: Path) -> None:
    with Terminal(*GREEDY, "-m", "64", cwd=tmp_path, first=ENDLESS) as terminal:
        terminal.wait_for_prompt()
        terminal.type(f"What is 12+30?{ENTER}")
        terminal.wait_for("42")
        terminal.type(f"/system Be kind.{ENTER}/save chat.json{ENTER}")
        assert "kind" not in terminal.wait_for("cut at 64 tokens")
        terminal.wait_for("holds 0 messages")
    assert saved(tmp_path / "chat.json") == [{"role": "system", "content": "Be kind."}]


def test_a_paste_during_an_answer_that_the_terminal_cuts_is_dropped_and_named(tmp_path: Path) -> None:
    with Terminal(*GREEDY, cwd=tmp_path, first=ENDLESS) as terminal:
        terminal.wait_for_prompt()
        terminal.type(f"What is 12+30?{ENTER}")
        terminal.wait_for("42")
        terminal.type(f"{'Word ' * 2_000}{ENTER}")
        terminal.process.send_signal(signal.SIGINT)  # the key itself would drop what is waiting
        terminal.wait_for("is dropped: paste it again")
        terminal.wait_for_prompt()
        ask(terminal, "/save chat.json")
    assert len(saved(tmp_path / "chat.json")) == 2


def test_pictures_are_named_as_terminals_hand_them_over(tmp_path: Path) -> None:
    picture = tmp_path / "two words, 100%.png"
    shutil.copy(ROOT / "docs" / "pictures" / "shapes.png", picture)
    escaped = str(picture).replace(" ", "\\ ").replace(",", "\\,")
    address = picture.as_uri()
    with Terminal(*GREEDY, cwd=tmp_path) as terminal:
        terminal.wait_for_prompt()
        for form in (f"'{picture}' ", escaped, f'"{picture}"', address, picture.name, f"{escaped} '{picture}'"):
            found = ask(terminal, f"/image {form}")
            assert found.count("it goes with your next question") == 1 + (form.endswith("'") and form[0] != "'"), form
            ask(terminal, "/reset")
        assert "is no file. Drag the file here" in ask(terminal, f"/image {picture} and more")
        assert "has a quote" in ask(terminal, f"/image '{picture}")
        assert "Put /image" in ask(terminal, f"'{picture}'")
        ask(terminal, f"/image '{picture}'")
        assert "3" in ask(terminal, "How many red things are there?")


def test_a_conversation_is_saved_taken_back_and_gone_on_with(tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs" / "pictures" / "shapes.png", tmp_path / "a picture.png")
    with Terminal(*GREEDY, "--system-prompt", "Be kind.", cwd=tmp_path) as terminal:
        terminal.wait_for_prompt()
        ask(terminal, "/image a\\ picture.png")
        assert "3" in ask(terminal, "How many red things are there?")
        ask(terminal, "What is 3+4?")
        assert "Taken back: What is 3+4?" in ask(terminal, "/undo")
        assert "holds 2 messages" in ask(terminal, "/save 'my chat.json'")
        terminal.type(CTRL_D)
        assert terminal.end() == 0
    picture = str(tmp_path / "a picture.png")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "How many red things are there?"}]
    before = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": content}]
    assert saved(tmp_path / "my chat.json")[:2] == before
    with Terminal(*GREEDY, cwd=tmp_path) as terminal:
        terminal.wait_for_prompt()
        assert "behind 2 messages" in ask(terminal, "/load my chat.json")
        assert "Taken back: How many red" in ask(terminal, "/undo")
        assert "3" in ask(terminal, "How many red things are there?")
        ask(terminal, "/save my chat.json")
    assert saved(tmp_path / "my chat.json")[:2] == before


def test_reasoning_is_shown_dimmed_or_folded_to_a_line(tmp_path: Path) -> None:
    with Terminal(*GREEDY, cwd=tmp_path) as terminal:
        terminal.wait_for_prompt()
        ask(terminal, "/think on")
        assert re.search(r"\x1b\[2m.*8.*425", ask(terminal, "What is 358+67?"), re.DOTALL)
        ask(terminal, "/fold")
        terminal.type(f"What is 358+67?{ENTER}")
        assert "8+7=15" not in terminal.wait_for("Thought for")
        assert "8+7=15" not in terminal.wait_for_prompt()
        assert "8+7=15" in ask(terminal, "/fold")
        ask(terminal, "/think off")
        assert "8+7" not in ask(terminal, "What is 358+67?").partition("?")[2]


def test_no_color_means_no_colours(tmp_path: Path) -> None:
    with Terminal(*GREEDY, "-m", "60", cwd=tmp_path, first=ENDLESS, env={"NO_COLOR": "1"}) as terminal:
        terminal.wait_for_prompt()
        ask(terminal, "What is 12+30?")
        ask(terminal, "/help")
        assert not re.search(r"\x1b\[[\d;]*\b(3[0-8]|4[0-8]|9\d|10\d)[\d;]*m", terminal.output)


def test_an_answer_that_the_limit_cuts_says_so(tmp_path: Path) -> None:
    with Terminal(*GREEDY, cwd=tmp_path) as terminal:
        terminal.wait_for_prompt()
        ask(terminal, "/set max_tokens 1")
        assert "The answer was cut at 1 tokens" in ask(terminal, "What is 12+30?")


def test_a_terminal_without_the_extra_is_told_once_how_to_get_it(tmp_path: Path) -> None:
    with Terminal(*GREEDY, cwd=tmp_path, first="sys.modules.update(rich=None)") as terminal:
        terminal.wait_for_prompt()
        ask(terminal, "What is 12+30?")
        assert terminal.output.count("pip install 'mlx-qwen[chat]'") == 1


def test_the_screen_ends_as_a_reader_expects_it(tmp_path: Path) -> None:
    with Terminal(*GREEDY, cwd=tmp_path, rows=6, columns=60) as terminal:
        terminal.wait_for_prompt()
        ask(terminal, "/image " + os.path.relpath(ROOT / "docs" / "pictures" / "shapes.png", tmp_path))
        ask(terminal, "What do you see?")
        shown = terminal.screen()
    assert shown.partition("What do you see?\n")[2].splitlines()[:6] == [
        "top left: red circle",
        "top middle: yellow square",
        "top right: red triangle",
        "bottom left: blue cross",
        "bottom right: red circle",
        ">>>",
    ]
