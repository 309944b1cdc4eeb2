"""A headless Chromium that tests drive over its DevTools protocol, by two pipes."""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--remote-debugging-pipe",
    # Whatever is not on this machine is asked of nobody.
    "--proxy-server=http://127.0.0.1:9",
    "--proxy-bypass-list=127.0.0.1",
)
# The protocol's pipes are descriptors 3 and 4.
_WITH_PIPES = """
import fcntl, os, sys
theirs, ours = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(theirs, 3)
os.dup2(ours, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
_PATIENCE = 90.0


def chromium() -> str | None:
    """The program; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """A page in the browser; `events` holds what the browser told by itself, in order."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._buffer, self._number, self._session = b"", 0, ""
        self.events: list[dict] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", width=960, height=760, deviceScaleFactor=1, mobile=False)

    def send(self, method: str, **parameters: object) -> dict:
        """Calls a method of the protocol; its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def evaluate(self, script: str) -> object:
        """The value of an expression in the page."""
        said = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    def until(self, script: str) -> object:
        """Waits until an expression is true in the page; its value."""
        deadline = time.monotonic() + _PATIENCE
        while not (value := self.evaluate(script)):
            assert time.monotonic() < deadline, (
                f"{script} did not come true:\n{self.evaluate('document.body.innerText')}"
            )
            time.sleep(0.05)
        return value

    def type(self, text: str) -> None:
        """Types into what has the focus, and presses Enter."""
        self.send("Input.insertText", text=text)
        enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        self.send("Input.dispatchKeyEvent", type="keyDown", **enter)
        self.send("Input.dispatchKeyEvent", type="keyUp", **enter)

    def click(self, selector: str) -> None:
        """Clicks the middle of an element."""
        script = f"(() => {{ const r = document.querySelector({selector!r}).getBoundingClientRect();"
        x, y = self.evaluate(f"{script} return [r.x + r.width / 2, r.y + r.height / 2] }})()")  # type: ignore[misc]
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, file: Path, *, dark: bool = False) -> Path:
        """What the page looks like, as PNG."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))
        return file

    def requested(self) -> list[str]:
        """The addresses that the page has asked for."""
        self.evaluate("0")
        asked = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in asked]

    def complaints(self) -> list[str]:
        """Errors in the page's console, such as what its policy forbids."""
        self.evaluate("0")
        entries = [event["params"]["entry"] for event in self.events if event["method"] == "Log.entryAdded"]
        thrown = [event["params"] for event in self.events if event["method"] == "Runtime.exceptionThrown"]
        return [str(entry["text"]) for entry in entries if entry["level"] == "error"] + [str(one) for one in thrown]

    def _read(self) -> dict:
        while b"\0" not in self._buffer:
            part = os.read(self._answers, 1 << 20)
            assert part, "the browser ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextmanager
def tab(program: str, folder: Path) -> Iterator[Tab]:
    """A tab of a browser of its own, which keeps everything in `folder`."""
    theirs, commands = os.pipe()
    answers, ours = os.pipe()
    command = [sys.executable, "-c", _WITH_PIPES, str(theirs), str(ours), program, *_FLAGS, f"--user-data-dir={folder}"]
    environment = {**os.environ, "HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    with (folder / "log").open("wb") as log:
        browser = subprocess.Popen(command, pass_fds=(theirs, ours), env=environment, stdout=log, stderr=log)
    os.close(theirs)
    os.close(ours)
    try:
        yield Tab(commands, answers)
    finally:
        browser.terminate()
        browser.wait(30)
        os.close(commands)
        os.close(answers)
