"""What the README shows works as it stands."""

import re
import shlex
from pathlib import Path

import click
import pytest

from mlx_qwen.cli import COMMANDS, main
from mlx_qwen.cli.bench import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = "qwen3.5-0.8b-4bit"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMAND_LINES = [
    line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines() if "mlx-qwen " in line
]


@pytest.mark.parametrize("line", [line for line in COMMAND_LINES if line.startswith("mlx-qwen ")])
def test_every_command_line_is_understood(line: str) -> None:
    name, *arguments = shlex.split(line)[1:]
    assert name in COMMANDS
    context = click.Context(main)
    command = main.get_command(context, name)
    assert command is not None
    command.make_parser(click.Context(command)).parse_args(arguments)


def test_make_targets_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake (\w+)", README))
    assert {"demo", "test"} <= named
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in named)


@pytest.mark.parametrize("block", blocks("python"))
def test_every_python_block_runs(block: str, chat_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert MODEL in block
    exec(compile(block.replace(MODEL, str(chat_folder)), "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_every_measurement_names_a_section_of_the_benchmark() -> None:
    measured = README.partition("## Measured")[2].partition("\n## ")[0]
    named = set(re.findall(r"`--only ([\w-]+)", measured))
    assert {"convert", "host", "rule", "start", "quality"} <= named <= set(SECTIONS)
    assert measured.count("\n| ") > 10


def test_every_folder_named_exists() -> None:
    folders = re.findall(r"^\| `(\w+)/` \|", README, flags=re.MULTILINE)
    assert len(folders) >= 4
    assert all((ROOT / folder).is_dir() for folder in folders)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_and_each_of_its_options(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert command.help
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert all(option.help for option in options)
