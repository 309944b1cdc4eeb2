"""Markdown while it is written: the screen ends as if it had been drawn once, whatever the pieces."""

import io
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mlx_qwen.cli.chat import markdown
from mlx_qwen.cli.chat.markdown import MarkdownStream, rendered
from tests.support.terminal import screen

ROWS, COLUMNS = 12, 40
BLOCKS = [
    "# A title",
    "Words and **bold ones** and `code`, more than fit into a line of the screen.\nThe next line.",
    "- one\n- two\n  - and a half\n\n- three after a gap",
    "1. first\n2. second",
    "| a | b |\n|---|---|\n| 1 | two |\n| three hundred | 4 |",
    "```python\ndef f(x):\n    return '''\n\nx'''  # the end\n```",
    "> quoted\n> twice",
    "A heading below\n===============",
    "<div>a tag is text</div>",
    "Wörter, 漢字 und 🙂, [a link](https://a.b/c) and 3 < 4 & 5.",
    "    indented\n\n    code",
    "* * *",
    "text\n#nothing but text",
    "```\n" + "\n".join(f"line {n}" for n in range(30)) + "\n```",
]


@pytest.fixture(autouse=True)
def terminal_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    monkeypatch.setenv("LINES", str(ROWS))


class Clock:
    """Time that passes by a second whenever someone looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def drawn(pieces: list[str], clock: object = None) -> str:
    paper = io.StringIO()
    stream = MarkdownStream(paper, clock or Clock())  # type: ignore[arg-type]
    for piece in pieces:
        stream.push(piece)
    stream.finish()
    return paper.getvalue()


def seen(output: str) -> list[str]:
    """The lines on the screen, apart from empty ones."""
    return [line for line in screen(output.replace("\n", "\r\n"), rows=ROWS, columns=COLUMNS).split("\n") if line]


def whole(text: str) -> list[str]:
    return [line for line in rendered(text, Console(file=io.StringIO(), width=COLUMNS, height=ROWS)) if line]


def cut(text: str, rng: random.Random) -> list[str]:
    places = sorted(rng.sample(range(len(text) + 1), min(len(text) // 3, 200)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


# A table's columns move with every row; those that are out of the cursor's reach stay as they were.
@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_any_pieces_end_as_the_whole_does(blocks: list[str], rng: random.Random) -> None:
    text = "\n\n".join(blocks)
    assert seen(drawn(cut(text, rng))) == whole(text)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="a b\n-*#`>|1.=~_[]()<&\\", max_size=120), st.randoms(use_true_random=False))
def test_what_looks_like_markdown_ends_as_the_whole_does(text: str, rng: random.Random) -> None:
    assert seen(drawn(cut(text, rng))) == whole(text)


def test_blocks_stand_apart_by_a_line_and_code_keeps_its_own() -> None:
    text = "# Title\nWords\n- one\n- two\n\n```\na\n\n\nb\n```\n* * *\nEnd"
    expected = f"Title\n\nWords\n\n • one\n • two\n\na\n\n\nb\n\n{'-' * COLUMNS}\n\nEnd\n"
    assert screen(drawn([text + " "]).replace("\n", "\r\n"), rows=ROWS, columns=COLUMNS) == expected


def test_no_text_is_lost() -> None:
    text = "Use <b>tags</b> & <!-- notes -->, 1 < 2.\n\n<script>\nx = 1\n</script>"
    shown = " ".join(seen(drawn([text])))
    assert all(word in shown for word in ("<b>tags</b>", "<!-- notes -->", "1 < 2", "<script>", "x = 1"))


def test_a_finished_block_is_written_once_and_a_long_answer_costs_in_proportion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawings: list[int] = []
    plain = markdown.rendered
    monkeypatch.setattr(markdown, "rendered", lambda text, console: drawings.append(len(text)) or plain(text, console))

    def cost(blocks: int) -> tuple[int, int]:
        drawings.clear()
        words = [f"word{n}" for n in range(20)]
        text = "\n\n".join(f"{' '.join(words)} in block {n}." for n in range(blocks))
        output = drawn([text[i : i + 9] for i in range(0, len(text), 9)])
        assert output.count("in block 3.") == 1
        return sum(drawings), len(output)

    (less, shorter), (more, longer) = cost(10), cost(40)
    assert more < 4.4 * less
    assert longer < 4.4 * shorter


def test_a_block_that_grows_is_drawn_less_often_the_longer_drawing_takes() -> None:
    clock = Clock()
    paper = io.StringIO()
    stream = MarkdownStream(paper, clock)
    written = []
    for n in range(60):
        stream.push(f"{n} ")
        written.append(len(paper.getvalue()))
    assert len(set(written)) <= 60 // 4 + 1


def test_colours_are_left_out_where_they_are_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    console = Console(file=io.StringIO(), force_terminal=True)
    lines = "\n".join(rendered("**bold** `code`\n\n```python\nx = 1\n```", console))
    assert "\x1b[1m" in lines
    assert "\x1b[3" not in lines.replace("\x1b[3m", "")
