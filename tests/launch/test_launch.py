"""`mlx-qwen launch` with clients that write down what they were started with."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_qwen.launch import CLIENTS
from tests.server.running import ScriptedBackend, running, words

# Writes its arguments, its environment and the files beside them to $SEEN, then does what $DOES says.
CLIENT = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time
paths = [*sys.argv, os.environ.get("QWEN_CODE_SYSTEM_SETTINGS_PATH", "")]
files = {{path: pathlib.Path(path).read_text() for path in paths if "mlx-qwen-launch-" in path}}
signal.signal(signal.SIGINT, lambda *_: pathlib.Path(os.environ["SEEN"] + ".interrupted").touch())
seen = pathlib.Path(os.environ["SEEN"])
saw = {{"arguments": sys.argv[1:], "environment": dict(os.environ), "files": files}}
seen.with_suffix(".part").write_text(json.dumps(saw))
seen.with_suffix(".part").rename(seen)
exec(os.environ["DOES"])
"""


class Launcher:
    """Starts `mlx-qwen launch` with its own home, temporary folder and clients."""

    def __init__(self, folder: Path) -> None:
        self.seen, self.temporary = folder / "seen", folder / "tmp"
        for name in ("bin", "tmp", "home"):
            (folder / name).mkdir()
        for client in CLIENTS.values():
            (folder / "bin" / client.program).write_text(CLIENT)
            (folder / "bin" / client.program).chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(folder / "home"),
            "TMPDIR": str(self.temporary),
            "SEEN": str(self.seen),
            "ANTHROPIC_API_KEY": "the user's own",
            "PYTHONUNBUFFERED": "1",
        }

    def start(self, *arguments: str, does: str = "", **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "mlx_qwen", "launch", *arguments],
            env={**self.environment, "DOES": does, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, does: str = "", **environment: str) -> tuple[int, str, str]:
        process = self.start(*arguments, does=does, **environment)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def client_saw(self) -> dict:
        wait_for(self.seen.exists)
        return json.loads(self.seen.read_text())

    def left(self) -> list[str]:
        return [path.name for path in self.temporary.iterdir()]


def wait_for(condition, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    return Launcher(tmp_path)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The port of a server that runs already; it has one model, called "scripted"."""
    with running(ScriptedBackend(lambda ask, index: words("Hello"))) as url:
        yield url.rpartition(":")[2]


def options_of(arguments: list[str]) -> dict[str, str]:
    """Codex's -c key=value."""
    return dict(arguments[i + 1].split("=", 1) for i, each in enumerate(arguments) if each == "-c")


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_is_told_where_a_running_server_is_and_what_to_ask(
    launcher: Launcher, server: str, client: str
) -> None:
    code, _, err = launcher.run(client, "--port", server, "--", "--its", "own argument")
    assert code == 0, err
    saw, url = launcher.client_saw(), f"http://127.0.0.1:{server}"
    assert saw["arguments"][-2:] == ["--its", "own argument"]
    environment, files = saw["environment"], list(saw["files"].values())
    if client == "claude":
        settings = json.loads(files[0])["env"]
        assert settings["ANTHROPIC_BASE_URL"] == environment["ANTHROPIC_BASE_URL"] == url
        assert settings["ANTHROPIC_MODEL"] == settings["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == "scripted"
        assert settings["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "4096"
        assert "ANTHROPIC_API_KEY" not in environment
    if client == "codex":
        chosen = tomllib.loads("\n".join(f"{key}={value}" for key, value in options_of(saw["arguments"]).items()))
        provider = chosen["model_providers"][chosen["model_provider"]]
        assert (provider["base_url"], chosen["model"], chosen["model_context_window"]) == (
            url + "/v1",
            "scripted",
            4096,
        )
        assert environment[provider["env_key"]]
    if client == "opencode":
        config = json.loads(environment["OPENCODE_CONFIG_CONTENT"])
        provider, _, model = config["model"].partition("/")
        assert config["provider"][provider]["options"]["baseURL"] == url + "/v1"
        assert config["provider"][provider]["models"][model]["limit"]["context"] == 4096
        assert config["small_model"] == config["model"]
    if client == "qwen":
        settings = json.loads(files[0])
        (model,) = settings["modelProviders"][settings["security"]["auth"]["selectedType"]]
        assert (model["baseUrl"], model["id"], settings["model"]["name"]) == (url + "/v1", "scripted", "scripted")
        assert model["generationConfig"]["contextWindowSize"] == 4096
        assert environment[model["envKey"]]
    if client == "pi":
        assert f'"baseUrl": "{url}/v1"' in files[0]
        assert saw["arguments"][2:6] == ["--provider", "mlx-qwen", "--model", "scripted"]
    assert launcher.left() == []


def test_the_exit_code_is_the_clients(launcher: Launcher, server: str) -> None:
    assert launcher.run("pi", "--port", server, does="sys.exit(7)")[0] == 7


def test_a_client_that_is_killed_leaves_nothing_behind(launcher: Launcher, server: str) -> None:
    code, _, _ = launcher.run("claude", "--port", server, does="os.kill(os.getpid(), signal.SIGKILL)")
    assert code == 128 + signal.SIGKILL
    assert launcher.left() == []


def test_ctrl_c_is_for_the_client(launcher: Launcher, server: str) -> None:
    process = launcher.start("qwen", "--port", server, does="time.sleep(1); sys.exit(3)")
    launcher.client_saw()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 3
    assert Path(f"{launcher.seen}.interrupted").exists()
    assert launcher.left() == []


def test_a_request_to_end_is_passed_on_to_the_client(launcher: Launcher, server: str) -> None:
    process = launcher.start("qwen", "--port", server, does="time.sleep(600)")
    launcher.client_saw()
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert launcher.left() == []


def test_a_key_reaches_the_client_and_no_output(launcher: Launcher) -> None:
    with running(ScriptedBackend(lambda ask, index: words("Hello")), api_key="a secret") as url:
        port = url.rpartition(":")[2]
        told = launcher.run("claude", "--port", port, MLX_QWEN_API_KEY="a secret")
        shown = launcher.run("claude", "--port", port, "--print", MLX_QWEN_API_KEY="a secret")
    assert launcher.client_saw()["environment"]["ANTHROPIC_AUTH_TOKEN"] == "a secret"
    assert [code for code, _, _ in (told, shown)] == [0, 0]
    assert url in shown[1], "the server was found"
    assert "a secret" not in "".join(out + err for _, out, err in (told, shown))


def test_print_starts_nothing(launcher: Launcher) -> None:
    code, out, _ = launcher.run("codex", "--port", "1", "--model", "Qwen/Qwen3.5-4B", "--print", "--", "exec", "a b")
    assert code == 0
    assert 'model="Qwen/Qwen3.5-4B"' in out
    assert out.endswith("exec 'a b'\n")
    assert not launcher.seen.exists()


def test_a_client_that_is_not_installed_is_named_with_its_package(launcher: Launcher) -> None:
    code, _, err = launcher.run("opencode", PATH="/nowhere")
    assert code == 1
    assert err == (
        "Error: OpenCode is not installed: there is no opencode on the PATH. Install it with: npm install -g "
        "opencode-ai\n"
    )


def test_a_server_that_cannot_start_says_why(launcher: Launcher) -> None:
    code, _, err = launcher.run("pi", "--port", "1", "--model", str(launcher.temporary / "nowhere"))
    assert code == 1
    assert err.startswith("Error: The server ended:\n")
    assert "nowhere" in err
    assert launcher.left() == []


def test_a_server_is_started_where_none_has_the_model_and_ends_with_the_client(
    launcher: Launcher, server: str, chat_folder: Path
) -> None:
    asks = "import urllib.request; print(urllib.request.urlopen(os.environ['ANTHROPIC_BASE_URL'] + '/health').status)"
    code, out, err = launcher.run("claude", "--port", server, "--model", str(chat_folder), does=asks)
    assert (code, out) == (0, "200\n"), err
    environment = launcher.client_saw()["environment"]
    assert environment["ANTHROPIC_MODEL"] == chat_folder.name
    assert not listens(environment["ANTHROPIC_BASE_URL"])
    assert launcher.left() == []


def test_a_started_server_does_not_outlive_a_launcher_that_is_killed(launcher: Launcher, chat_folder: Path) -> None:
    process = launcher.start("claude", "--port", "1", "--model", str(chat_folder), does="time.sleep(600)")
    url = launcher.client_saw()["environment"]["ANTHROPIC_BASE_URL"]
    assert listens(url)
    process.kill()
    try:
        wait_for(lambda: not listens(url), 30)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the client, which nobody has told


def listens(url: str) -> bool:
    """Whether a server answers there."""
    code = f"import urllib.request; urllib.request.urlopen({url + '/health'!r}, timeout=5)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
