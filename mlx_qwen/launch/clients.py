"""What each client needs to be told of the server, in the way that touches none of its user's own files.

A client's own settings would win over its environment: Claude Code puts the `env` of its settings over what it is
started with, Qwen Code prefers its providers. So each gets what it puts above those: arguments, or a file beside them.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlx_qwen.json_types import Json

PROVIDER = "mlx-qwen"
KEY = "MLX_QWEN_API_KEY"
# What clients are told of a server that asks for no key: most of them refuse to start without one.
NO_KEY = "none"
_UNKNOWN_CONTEXT = 262_144
_MOST_OUTPUT = 32_768


@dataclass(frozen=True, slots=True)
class Served:
    """A server that answers: its address without a path, the model to ask, and the most tokens that this reads."""

    url: str
    model: str
    context: int | None = None
    key: str = NO_KEY

    @property
    def window(self) -> int:
        """Tokens that a prompt and its answer may have."""
        return self.context or _UNKNOWN_CONTEXT

    @property
    def output(self) -> int:
        """Tokens that an answer may have: what is left beside a prompt of some length."""
        return min(_MOST_OUTPUT, self.window // 2)


@dataclass(frozen=True, slots=True)
class Needs:
    """What one run of a client needs.

    Attributes:
        arguments: what stands before the user's own.
        environment: variables; None takes one away.
        files: contents by name, in a folder that is there while the client runs.
    """

    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str | None] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Client:
    """A client: its title, its program, the npm package that has it, and what it needs of a server and a folder."""

    title: str
    program: str
    package: str
    needs: Callable[[Served, Path], Needs]


def needs_of(name: str, served: Served, folder: Path) -> Needs:
    """What the client needs to use this server, its files being in `folder`."""
    return CLIENTS[name].needs(served, folder)


def _claude(served: Served, folder: Path) -> Needs:
    kinds = ("OPUS", "SONNET", "HAIKU", "FABLE")
    environment = {
        "ANTHROPIC_BASE_URL": served.url,
        "ANTHROPIC_AUTH_TOKEN": served.key,
        "ANTHROPIC_MODEL": served.model,
        **{f"ANTHROPIC_DEFAULT_{kind}_MODEL": served.model for kind in kinds},
        "CLAUDE_CODE_SUBAGENT_MODEL": served.model,
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(served.window),
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(served.output),
        # A line that differs in every session, first in the prompt: nothing behind it would be found read.
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    settings = {"settings.json": _json({"env": environment})}
    return Needs(("--settings", str(folder / "settings.json")), {**environment, "ANTHROPIC_API_KEY": None}, settings)


def _codex(served: Served, folder: Path) -> Needs:
    # A JSON string is a TOML string too.
    url, name, key = json.dumps(f"{served.url}/v1"), json.dumps(PROVIDER), json.dumps(KEY)
    chosen = {
        "model": json.dumps(served.model),
        "model_provider": name,
        f"model_providers.{PROVIDER}": f'{{name={name},base_url={url},env_key={key},wire_api="responses"}}',
        "model_context_window": str(served.window),
    }
    arguments = [argument for key, value in chosen.items() for argument in ("-c", f"{key}={value}")]
    return Needs(tuple(arguments), {KEY: served.key})


def _opencode(served: Served, folder: Path) -> Needs:
    model: dict[str, Json] = {
        "name": served.model,
        "limit": {"context": served.window, "output": served.output},
        "attachment": True,
        "modalities": {"input": ["text", "image"], "output": ["text"]},
        "reasoning": True,
        "interleaved": {"field": "reasoning_content"},
        "tool_call": True,
    }
    provider: dict[str, Json] = {
        "npm": "@ai-sdk/openai-compatible",
        "name": PROVIDER,
        "options": {"baseURL": f"{served.url}/v1", "apiKey": f"{{env:{KEY}}}"},
        "models": {served.model: model},
    }
    named = f"{PROVIDER}/{served.model}"
    config = _json({"provider": {PROVIDER: provider}, "model": named, "small_model": named})
    return Needs(environment={"OPENCODE_CONFIG_CONTENT": config, KEY: served.key})


def _qwen(served: Served, folder: Path) -> Needs:
    model: dict[str, Json] = {
        "id": served.model,
        "name": served.model,
        "baseUrl": f"{served.url}/v1",
        "envKey": KEY,
        "generationConfig": {"contextWindowSize": served.window, "samplingParams": {"max_tokens": served.output}},
    }
    settings = {
        "modelProviders": {"openai": [model]},
        "security": {"auth": {"selectedType": "openai"}},
        "model": {"name": served.model},
    }
    environment = {"QWEN_CODE_SYSTEM_SETTINGS_PATH": str(folder / "settings.json"), KEY: served.key}
    return Needs(environment=environment, files={"settings.json": _json(settings)})


def _pi(served: Served, folder: Path) -> Needs:
    model: dict[str, Json] = {
        "id": served.model,
        "name": served.model,
        "reasoning": True,
        "input": ["text", "image"],
        "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0},
        "contextWindow": served.window,
        "maxTokens": served.output,
    }
    provider = _json({"baseUrl": f"{served.url}/v1", "apiKey": KEY, "api": "openai-completions", "models": [model]})
    extension = f"export default (pi) => pi.registerProvider({json.dumps(PROVIDER)}, {provider});\n"
    arguments = ("--extension", str(folder / "provider.ts"), "--provider", PROVIDER, "--model", served.model)
    return Needs(arguments, {KEY: served.key}, {"provider.ts": extension})


def _json(value: Mapping[str, object]) -> str:
    return json.dumps(value, ensure_ascii=False)


CLIENTS = {
    "claude": Client("Claude Code", "claude", "@anthropic-ai/claude-code", _claude),
    "codex": Client("Codex", "codex", "@openai/codex", _codex),
    "opencode": Client("OpenCode", "opencode", "opencode-ai", _opencode),
    "qwen": Client("Qwen Code", "qwen", "@qwen-code/qwen-code", _qwen),
    "pi": Client("pi", "pi", "@mariozechner/pi-coding-agent", _pi),
}
