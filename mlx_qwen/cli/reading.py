"""What commands read besides their flags: prompts from files and standard input, tools from a file."""

import json
import sys
from pathlib import Path

import click

from mlx_qwen.errors import PromptError
from mlx_qwen.json_types import Tools

# What a terminal hands over of one line at most; it drops the rest without a word.
MOST_OF_A_LINE = 1_023 if sys.platform == "darwin" else 4_095


def read_prompt(file: str) -> str:
    """The text of a prompt's file, or for - of standard input; raises PromptError where there is none."""
    if file == "-":
        text, name = sys.stdin.read(), "Standard input"
        if sys.stdin.isatty():
            for line in text.splitlines():
                check_whole(line)
    else:
        name = file
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise PromptError(f"{_unread('prompt', file, error)} Give a file of UTF-8 text.") from error
    if not text.strip():
        raise PromptError(f"{name} is empty; expected the prompt there.")
    return text


def check_whole(line: str) -> None:
    """Raises PromptError for a line that a terminal may have cut."""
    if len(line.encode(errors="surrogateescape")) >= MOST_OF_A_LINE:
        raise PromptError(
            f"The terminal hands over no more than {MOST_OF_A_LINE:,} bytes of a line, so that this one may be cut. "
            "Put it into a file, and give that instead."
        )


def read_tools(file: str) -> Tools:
    """Function descriptions of a JSON file; raises PromptError for anything else."""
    try:
        tools = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, RuntimeError) as error:
        raise PromptError(f"{_unread('tools', file, error)} {_EXPECTED}") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise PromptError(f"{file} holds no list of tools. {_EXPECTED}")
    return tools


def _unread(what: str, file: str, error: Exception) -> str:
    return f"The {what} cannot be read from {file} ({getattr(error, 'strerror', None) or error})."


_EXPECTED = 'Expected a JSON file like [{"type": "function", "function": {"name": ..., "parameters": {...}}}].'


class ToolsFile(click.ParamType[Tools]):
    """The path of a file of tools, as their descriptions."""

    name = "file"

    def convert(self, value: str | Tools, param: click.Parameter | None, ctx: click.Context | None) -> Tools:
        return read_tools(value) if isinstance(value, str) else value


class SchemaText(click.ParamType[dict[str, object]]):
    """A JSON schema, or the path of the file that holds it."""

    name = "schema"

    def convert(
        self, value: str | dict[str, object], param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, object]:
        if isinstance(value, dict):
            return value
        text = value if value.lstrip().startswith("{") else _text_of("schema", value)
        try:
            schema = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"The schema is no JSON ({error}): {value!r:.60}.") from error
        if not isinstance(schema, dict):
            raise PromptError(f'{value!r:.60} holds no JSON schema; expected an object such as {{"type": ...}}.')
        return schema


class GrammarFile(click.ParamType[str]):
    """The path of a file with a Lark grammar, as its text."""

    name = "file"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return _text_of("grammar", value)


def _text_of(what: str, file: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:
        raise PromptError(f"{_unread(what, file, error)} Give a file of UTF-8 text.") from error
