"""What the README says can be typed, gives what it shows, and holds the numbers that the packages give."""

import contextlib
import io
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mlx_qwen.cli import COMMANDS, main
from mlx_qwen.convert.planning import plan

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def plain_commands() -> list[str]:
    return [line for block in blocks("console") for line in block.splitlines() if line.startswith("mlx-qwen ")]


def shown() -> list[tuple[str, str]]:
    """Commands with what they print."""
    parts = (block[2:].partition("\n") for block in blocks("console") if block.startswith("$ "))
    return [(command, output) for command, _, output in parts]


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len(README.splitlines()) <= 140


@pytest.mark.parametrize("line", [*plain_commands(), *(command for command, _ in shown())])
def test_every_command_line_is_understood(line: str) -> None:
    name, *arguments = shlex.split(line)[1:]
    assert name in COMMANDS
    command = main.get_command(click.Context(main), name)
    assert command is not None
    command.make_parser(click.Context(command)).parse_args(arguments)


@pytest.mark.parametrize(("line", "output"), shown())
def test_every_answer_shown_is_the_one_that_is_given(line: str, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(main, shlex.split(line)[1:])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == output.strip()


def test_the_readme_shows_a_sum_and_a_picture() -> None:
    assert [("--image" in command, bool(output)) for command, output in shown()] == [(False, True), (True, True)]


def test_the_python_shown_gives_the_output_shown() -> None:
    (code,), (output,) = blocks("python"), blocks("text")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), {})
    assert [line.strip() for line in printed.getvalue().splitlines()] == [line.strip() for line in output.splitlines()]


def test_make_targets_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"^make (\w+)$", README, flags=re.MULTILINE))
    assert "demo" in named
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in named)


def test_extras_named_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = set(re.findall(r"'\.\[(\w+)\]'", README))
    assert {"bench", "notebooks", "video"} <= named <= set(extras)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("0.8B", r"([\d.]+)\s+for 0\.8B"),
        ("9B", r"([\d.]+) for 9B"),
        ("35B-A3B", r"([\d.]+) for\s+35B-A3B"),
    ],
)
def test_bits_a_weight_that_are_stated_are_those_of_a_plain_conversion(size: str, said: str) -> None:
    (stated,) = re.findall(said, README)
    found = plan(size).weights.text_bits
    assert found is not None
    assert stated == f"{found:.1f}"


def test_links_and_pictures_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(targets) > 8
    assert all((ROOT / target).exists() for target in targets)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_and_each_of_its_options(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert command.help
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert all(option.help for option in options)
