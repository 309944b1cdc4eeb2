"""docs/agents.md sets by hand what `mlx-qwen launch` sets for one run."""

import json
import re
import tomllib
from pathlib import Path

from mlx_qwen.launch import CLIENTS, Needs, Served, needs_of

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "agents.md").read_text(encoding="utf-8")
SERVED = Served("http://127.0.0.1:8080", "Qwen3.5-27B-4bit", 262_144)


def by_hand(title: str) -> dict:
    """The first block behind a client's title in the part on settings."""
    part = PAGE.split("## By hand")[1]
    language, block = re.search(rf"\n{title}, in .*?```(json|toml)\n(.*?)```", part, re.DOTALL).groups()  # type: ignore[union-attr]
    return json.loads(block) if language == "json" else tomllib.loads(block)


def needs(client: str) -> Needs:
    return needs_of(client, SERVED, Path("folder"))


def test_claude_code_is_told_the_same_by_hand() -> None:
    assert by_hand("Claude Code") == json.loads(needs("claude").files["settings.json"])


def test_codex_is_told_the_same_by_hand() -> None:
    chosen = needs("codex").arguments[1::2]
    assert by_hand("Codex") == tomllib.loads("\n".join(chosen))


def test_opencode_is_told_the_same_by_hand() -> None:
    config = needs("opencode").environment["OPENCODE_CONFIG_CONTENT"]
    assert config is not None
    assert by_hand("OpenCode") == json.loads(config)


def test_qwen_code_is_told_the_same_by_hand() -> None:
    assert by_hand("Qwen Code") == json.loads(needs("qwen").files["settings.json"])


def test_pi_is_told_the_same_by_hand() -> None:
    extension = needs("pi").files["provider.ts"]
    name, provider = re.search(r'registerProvider\("(.*?)", (.*)\);', extension).groups()  # type: ignore[union-attr]
    assert by_hand("pi") == {"providers": {name: json.loads(provider)}}


def test_every_client_is_in_the_table_with_its_package() -> None:
    for name, client in CLIENTS.items():
        assert f"| `mlx-qwen launch {name}` | {client.title} | `{client.package}` |" in PAGE
