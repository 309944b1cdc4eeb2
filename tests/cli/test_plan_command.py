"""`mlx-qwen plan` from the command line."""

from pathlib import Path

from click.testing import CliRunner

from mlx_qwen.cli import main


def test_a_named_mac_is_planned_for() -> None:
    result = CliRunner().invoke(main, ["plan", "--model", "9B", "--chip", "M2 Max", "--memory", "32GB"])
    assert result.exit_code == 0, result.output
    assert "M2 Max, 32.00 GiB of memory" in result.output
    assert "Bounds, not measurements" in result.output


def test_a_folder_is_planned_for_on_this_machine(folder: Path) -> None:
    result = CliRunner().invoke(main, ["plan", "--model", str(folder), "--bits", "8", "--context", "100"])
    assert result.exit_code == 0, result.output
    assert "sizes from its files" in result.output


def test_an_impossible_question_is_one_line() -> None:
    result = CliRunner().invoke(main, ["plan", "--model", "9B", "--chip", "M9", "--memory", "32GB"])
    assert result.exit_code == 1
    assert result.output.startswith("Error: 'M9' is no chip")
    assert "Traceback" not in result.output
