"""Flags are made from declared options: names, types, defaults and help."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click
import pytest
from click.testing import CliRunner

from mlx_qwen.cli.flags import flags_of
from mlx_qwen.declared import option


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """One of each kind."""

    count: int = option(3, help="how many there are.", flag=("-n", "--how-many"))
    share: float | None = option(None, help="how much of it.", flag="--share")
    words: str | Sequence[str] | None = option(None, help="what is said.", flag="--word", metavar="WORD")
    loud: bool | None = option(None, help="whether it is loud.", flag="--loud/--quiet")
    kind: Literal["a", "b"] | None = option(None, help="which kind.", flag="--kind")
    kept: bool = option(True, help="whether it is kept.", flag="--kept/--no-kept")
    folder: Path = option(Path("here"), help="where to.", flag="--folder")
    size: int | str | None = option(None, help="how large.", flag="--size")
    secret: int = option(1, help="not for the command line.")


def parsed(*arguments: str, **changes: dict[str, object]) -> dict[str, object]:
    found: dict[str, object] = {}

    @click.command()
    @flags_of(Choices, without=("folder",), **changes)
    def command(**flags: object) -> None:
        found.update(flags)

    CliRunner().invoke(command, arguments, standalone_mode=False, catch_exceptions=False)
    return found


DEFAULTS = {"count": 3, "share": None, "words": (), "loud": None, "kind": None, "kept": True, "size": None}


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ((), {}),
        (("-n", "4"), {"count": 4}),
        (("--how-many", "4", "--share", "0.5"), {"count": 4, "share": 0.5}),
        (("--word", "a", "--word", "b"), {"words": ("a", "b")}),
        (("--loud",), {"loud": True}),
        (("--quiet",), {"loud": False}),
        (("--kind", "b"), {"kind": "b"}),
        (("--no-kept",), {"kept": False}),
        (("--size", "16GB"), {"size": "16GB"}),
    ],
)
def test_flags_give_values_under_the_options_names(arguments: tuple[str, ...], changed: dict[str, object]) -> None:
    assert parsed(*arguments) == {**DEFAULTS, **changed}


@pytest.mark.parametrize("arguments", [("-n", "many"), ("--kind", "c"), ("--folder", "x"), ("--secret", "2")])
def test_other_words_and_flags_are_refused(arguments: tuple[str, ...]) -> None:
    with pytest.raises(click.UsageError):
        parsed(*arguments)


def test_a_command_may_change_a_default() -> None:
    assert parsed(count={"default": 9})["count"] == 9


def test_help_is_the_declarations_text_in_their_order() -> None:
    command = click.command()(flags_of(Choices)(lambda **flags: None))
    assert isinstance(command, click.Command)
    with click.Context(command) as context:
        records = [record for parameter in command.params if (record := parameter.get_help_record(context))]
    assert [name.split()[0].strip(",") for name, _ in records] == [
        "-n", "--share", "--word", "--loud", "--kind", "--kept", "--folder", "--size"
    ]  # fmt: skip
    assert records[0][1] == "How many there are.  [default: 3]"
    assert records[2] == ("--word WORD", "What is said. May be repeated.")
