"""The page at `/`, in a real browser."""

import base64
import io
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from mlx_qwen.answer import AnswerDelta
from mlx_qwen.server.work import Ask, Piece
from tests.server.browser import Tab, chromium, tab
from tests.server.running import ScriptedBackend, Step, running, serving

MARKUP = "<img src=x onerror=document.title='broken'><script>document.title='broken'</script>"
CODE = "```python\nprint('<b>no</b>')\n```"
MARKDOWN = f"It has **two** parts:\n\n- one `x`\n- {MARKUP}\n\n{CODE}\n"


def script(ask: Ask, index: int) -> list[Step]:
    """Reasons, waits, answers in Markdown with markup in it; goes on for ever where it is asked to."""
    steps: list[Step] = [
        Piece(AnswerDelta(reasoning="First I think."), tokens=1),
        1.0,
        Piece(AnswerDelta(content="Hello there. "), tokens=2),
        1.0,
    ]
    if "for ever" in str(ask.prompt[-1]):
        return [*steps, 600.0]
    end = Piece(AnswerDelta(), tokens=12, cached=5, finish="stop")
    return [*steps, Piece(AnswerDelta(content=MARKDOWN), tokens=11, cached=5), end]


@pytest.fixture(scope="module")
def backend() -> ScriptedBackend:
    return ScriptedBackend(script)


@pytest.fixture(scope="module")
def url(backend: ScriptedBackend) -> Iterator[str]:
    with running(backend) as address:
        yield address


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Tab]:
    program = chromium()
    if program is None:
        pytest.skip("there is no Chromium; Debian's is installed by: apt-get install chromium")
    with tab(program, tmp_path) as opened:
        yield opened
        assert opened.complaints() == []
        strangers = [one for one in opened.requested() if not one.startswith(("http://127.0.0.1:", "data:"))]
        assert strangers == [], "nothing is asked of others"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def opened(page: Tab, url: str) -> None:
    page.send("Page.navigate", url=url)
    page.until("document.readyState === 'complete' && document.querySelector('#name').textContent !== ''")


def test_an_answer_streams_with_its_reasoning_folded_and_its_markup_as_text(
    page: Tab, url: str, tmp_path: Path
) -> None:
    opened(page, url)
    page.type("What is there?")
    assert page.until("document.querySelector('.user .words')?.innerText") == "What is there?"
    page.until("document.querySelector('details:not([hidden])')?.innerText.startsWith('Thinking')")
    assert page.evaluate("document.querySelector('.assistant .words').innerText") == ""
    page.until("document.querySelector('.assistant .words').innerText.includes('Hello there.')")
    assert page.evaluate("document.querySelector('.busy') !== null"), "the words are there before the answer has ended"
    page.until("document.querySelector('.busy') === null")

    words = page.evaluate("document.querySelector('.assistant .words').innerText")
    assert MARKUP in words
    assert "print('<b>no</b>')" in words
    inside = "[...document.querySelectorAll('.assistant .words *')].map((node) => node.localName).join(' ')"
    assert page.evaluate(inside) == "p strong ul li code li pre code"
    assert page.evaluate("document.title") == "mlx-qwen"
    assert page.evaluate("document.querySelector('details').open") is False
    assert str(page.evaluate("document.querySelector('summary').innerText")).startswith("Thought for ")
    numbers = str(page.evaluate("document.querySelector('.numbers').innerText"))
    assert numbers.startswith("12 tokens · ")
    assert " tokens/s · prompt 7, 5 cached · first after " in numbers
    assert str(page.evaluate("document.querySelector('#memory').innerText")).endswith("B")

    page.click("summary")
    assert page.evaluate("document.querySelector('details div').innerText") == "First I think."
    light, dark = (page.screenshot(tmp_path / f"{dark}.png", dark=dark) for dark in (False, True))
    assert brightness(light) > 200
    assert brightness(dark) < 100


def brightness(file: Path) -> float:
    """The mean of a picture in greys, 0 to 255."""
    grey = Image.open(file).convert("L").resize((1, 1))
    return float(grey.getpixel((0, 0)))  # type: ignore[arg-type]


def test_a_dropped_picture_is_shown_and_sent(page: Tab, url: str, backend: ScriptedBackend, tmp_path: Path) -> None:
    opened(page, url)
    png = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 60)).save(png, "PNG")
    data = base64.b64encode(png.getvalue()).decode()
    page.evaluate(
        f"""(() => {{
          const bytes = Uint8Array.from(atob("{data}"), (c) => c.charCodeAt(0));
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File([bytes], "red.png", {{ type: "image/png" }}));
          document.querySelector("footer").dispatchEvent(new DragEvent("drop", {{ dataTransfer, bubbles: true }}));
        }})()"""
    )
    assert page.until("document.querySelector('#chosen img')?.naturalWidth") == 40
    page.click("textarea")
    page.type("Which colour?")
    page.until("document.querySelector('.numbers')?.innerText.includes('tokens')")
    assert page.evaluate("document.querySelector('.user img').naturalWidth") == 40
    assert page.evaluate("document.querySelector('#chosen').childElementCount") == 0
    picture, text = backend.asked[-1].ask.prompt[-1]["content"]  # type: ignore[index]
    assert picture.source == png.getvalue()
    assert text == "Which colour?"


def test_the_stop_button_ends_the_work_and_keeps_the_words(page: Tab, url: str, backend: ScriptedBackend) -> None:
    opened(page, url)
    page.type("Talk for ever")
    page.until("document.querySelector('.assistant .words')?.innerText.includes('Hello')")
    page.click("#stop")
    assert page.until("document.querySelector('.numbers').innerText") == "Stopped."
    assert "Hello there." in str(page.evaluate("document.querySelector('.assistant .words').innerText"))
    page.until("document.querySelector('#stop').hidden && !document.querySelector('#send').hidden")
    wait_for(lambda: backend.asked[-1].left == [0])
    page.type("And now?")
    page.until("document.querySelectorAll('.numbers')[1]?.innerText.includes('tokens')")
    roles = [(message["role"], message["content"]) for message in backend.asked[-1].ask.prompt]  # type: ignore[index]
    assert roles == [("user", "Talk for ever"), ("assistant", "Hello there. "), ("user", "And now?")]


def test_the_engine_reasons_answers_and_reads_on_from_what_is_cached(page: Tab) -> None:
    with serving() as url:
        opened(page, url)
        page.click("#think")
        page.click("textarea")
        page.type("What is 358+67?")
        page.until("document.querySelector('.numbers')?.innerText.includes('tokens')")
        assert "425" in str(page.evaluate("document.querySelector('.assistant .words').innerText"))
        assert page.evaluate("!document.querySelector('details').hidden && !document.querySelector('details').open")
        page.type("And what is the sum of 358 and 68, once it is worked out digit by digit?")
        page.until("document.querySelectorAll('.numbers')[1]?.innerText.includes('tokens')")
        page.type("What is 358+69?")
        page.until("document.querySelectorAll('.numbers')[2]?.innerText.includes('tokens')")
        numbers = str(page.evaluate("document.querySelectorAll('.numbers')[2].innerText"))
    read, cached = (int(count) for count in re.findall(r"prompt (\d+), (\d+) cached", numbers)[0])
    assert read > cached > 30


def test_a_server_with_a_key_asks_for_it(page: Tab, backend: ScriptedBackend) -> None:
    with running(backend, api_key="the key") as url:
        page.send("Page.navigate", url=url)
        page.until("document.querySelector('#key:not([hidden])') !== null")
        page.click("#key")
        page.type("the key")
        page.until("document.querySelector('#name').textContent === 'scripted'")
    page.events.clear()  # the refusals before are in the browser's log


def test_a_browser_is_told_to_run_nothing_but_the_page(url: str) -> None:
    response = httpx.get(url)
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert not any("unsafe" in value or "*" in value or "http" in value for value in policy.values())
    assert "http://" not in response.text.replace("http://www.w3.org", "")
    assert "https://" not in response.text
