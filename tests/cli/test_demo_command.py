"""`mlx-qwen demo` and commands without --model run the bundled checkpoint, on any machine and offline."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from mlx_qwen.cli import main
from mlx_qwen.cli.demo import this_command


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the demo prints, and the folder of its pictures."""
    folder = tmp_path_factory.mktemp("demo") / "shown"
    result = CliRunner().invoke(main, ["demo", "--save", str(folder)])
    assert result.exit_code == 0, result.output
    return result.output, folder


def test_the_demo_shows_an_answer_of_each_kind_beside_the_right_one(shown: tuple[str, Path]) -> None:
    output, _ = shown
    kinds = ("Text goes on", "Arithmetic", "Recall", "tool", "picture", "sequence of frames")
    assert all(kind in output for kind in kinds)
    assert output.count("\n  model ") == output.count("\n  right ") >= 10


def test_most_answers_that_the_demo_shows_are_right(shown: tuple[str, Path]) -> None:
    (counts,) = re.findall(r"(\d+) of (\d+) answers are right", shown[0])
    right, asked = map(int, counts)
    assert right >= 0.8 * asked


def test_the_demo_saves_the_pictures_that_the_model_saw(shown: tuple[str, Path]) -> None:
    output, folder = shown
    assert str(folder / "picture-1.png") in output
    with Image.open(folder / "picture-1.png") as picture:
        assert min(picture.size) >= 256
    with Image.open(folder / "frames-2.gif") as frames:
        assert frames.n_frames == 8  # type: ignore[attr-defined]


def test_what_the_demo_suggests_can_be_typed_as_it_stands(shown: tuple[str, Path]) -> None:
    (line,) = re.findall(r"^  (.*) generate --prompt .* --enable-thinking$", shown[0], flags=re.MULTILINE)
    done = subprocess.run([*shlex.split(line), "--version"], capture_output=True, text=True, check=True)
    assert "mlx-qwen" in done.stdout


def test_a_command_off_the_path_is_suggested_by_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.chdir(tmp_path)
    for called in (tmp_path / ".venv/bin/mlx-qwen", Path(".venv/bin/mlx-qwen")):
        monkeypatch.setattr(sys, "argv", [str(called)])
        assert this_command() == ".venv/bin/mlx-qwen"


def test_the_demo_runs_converted_to_fewer_bits(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["demo", "--bits", "4", "--save", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "Bits per weight" in result.output


@pytest.mark.parametrize(
    ("arguments", "typed"), [(["generate", "--prompt", "What is 3+4?"], ""), (["chat"], "What is 3+4?\n/quit\n")]
)
def test_without_a_model_the_bundled_one_answers_and_that_is_said(arguments: list[str], typed: str) -> None:
    result = CliRunner().invoke(main, arguments, input=typed)
    assert result.exit_code == 0, result.output
    assert "bundled demo" in result.stderr
    assert "7" in result.stdout
