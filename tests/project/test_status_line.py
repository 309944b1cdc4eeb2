"""Progress is one line that changes, wherever it is watched, and a short log where it is not."""

import io
import sys
from types import SimpleNamespace

import pytest

from mlx_qwen.convert.progress import Progress
from mlx_qwen.status_line import StatusLine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Screen:
    """A notebook's outputs by display id, as `IPython.display` changes them."""

    def __init__(self) -> None:
        self.outputs: dict[int, str] = {}

    def display(self, content: dict[str, str], *, raw: bool, display_id: bool) -> SimpleNamespace:
        number = len(self.outputs)
        self.outputs[number] = content["text/plain"]
        return SimpleNamespace(display_id=number)

    def update_display(self, content: dict[str, str], *, raw: bool, display_id: int) -> None:
        self.outputs[display_id] = content["text/plain"]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """This process as the kernel of a notebook."""
    screen = Screen()
    shell = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel="the kernel"))
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", screen)
    return screen


def test_a_terminals_line_is_overwritten_and_kept() -> None:
    stream = Terminal()
    line = StatusLine(stream)
    line.show("one")
    line.show("two")
    line.finish(keep=True)
    assert stream.getvalue() == "\r\033[Kone\r\033[Ktwo\n"


def test_a_terminals_line_is_wiped_when_it_is_not_kept() -> None:
    stream = Terminal()
    line = StatusLine(stream)
    line.show("one")
    line.finish(keep=False)
    assert stream.getvalue().endswith("one\r\033[K")


def test_a_log_gets_the_last_line_of_short_work() -> None:
    stream = io.StringIO()
    line = StatusLine(stream)
    for number in range(100):
        line.show(f"{number} of 99")
    line.finish(keep=False)
    assert stream.getvalue() == "99 of 99\n"
    assert not line.watched


def test_a_notebook_has_one_output_that_changes(screen: Screen, capsys: pytest.CaptureFixture[str]) -> None:
    line = StatusLine()
    line.show("one")
    line.show("two")
    line.finish(keep=True)
    assert screen.outputs == {0: "two"}
    assert capsys.readouterr().err == ""


def test_a_notebooks_output_is_emptied_when_it_is_not_kept(screen: Screen) -> None:
    line = StatusLine()
    line.show("one")
    line.finish(keep=False)
    assert screen.outputs == {0: ""}


def test_a_conversion_shows_its_progress_in_a_notebook_unasked(screen: Screen) -> None:
    with Progress(2_000_000_000, shown=None) as line:
        line.advance(2_000_000_000)
    assert "2.00 of 2.00 GB" in screen.outputs[0]
