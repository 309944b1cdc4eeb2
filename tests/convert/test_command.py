"""`mlx-qwen convert` says what it does and ends with a table, or with one line that says what to do."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlx_qwen.cli import main
from mlx_qwen.convert import conversion
from mlx_qwen.convert.progress import Progress
from mlx_qwen.convert.work import write as weights
from tests.conftest import CheckpointFactory
from tests.support.mlx_folders import digests


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


def quantization(folder: Path) -> dict[str, object] | None:
    config: dict[str, dict[str, object]] = json.loads((folder / "config.json").read_text())
    return config.get("quantization")


def test_without_options_it_quantizes_to_four_bits_and_shows_a_table(
    checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    result = run("--hf-path", checkpoint("dense"), "--mlx-path", tmp_path / "out")
    assert result.exit_code == 0
    assert (quantization(tmp_path / "out") or {})["bits"] == 4
    for label in ("Size before", "Size after", "Bits per weight", "Time", "Peak memory"):
        assert label in result.stdout


def test_every_option_reaches_the_conversion(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = checkpoint("dense")
    arguments = ("-q", "--q-bits", "8", "--q-group-size", "32", "--q-mode", "affine", "--dtype", "float16")
    run("--hf-path", source, "--mlx-path", tmp_path / "packed", *arguments)
    packed = quantization(tmp_path / "packed") or {}
    assert (packed["bits"], packed["group_size"], packed["mode"]) == (8, 32, "affine")
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["text_config"]["dtype"] == "float16"
    run("--hf-path", tmp_path / "packed", "--mlx-path", tmp_path / "plain", "--dequantize")
    assert quantization(tmp_path / "plain") is None
    run("--hf-path", source, "--mlx-path", tmp_path / "plain", "--no-quantize", "--dtype", "bfloat16", "--overwrite")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["text_config"]["dtype"] == "bfloat16"


def test_a_dtype_alone_changes_the_dtype_alone(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    run("--hf-path", checkpoint("dense"), "--mlx-path", tmp_path / "plain", "--dtype", "bfloat16")
    assert quantization(tmp_path / "plain") is None
    run("--hf-path", checkpoint("dense"), "--mlx-path", tmp_path / "packed", "--dtype", "bfloat16", "--q-bits", "8")
    assert (quantization(tmp_path / "packed") or {})["bits"] == 8


def test_a_dry_run_shows_the_size_and_writes_nothing(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    result = run("--hf-path", checkpoint("dense"), "--mlx-path", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0
    assert "Size after" in result.stdout and "not written" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_one_line_without_a_traceback(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    result = run("--hf-path", checkpoint("dense"), "--mlx-path", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ") and "--overwrite" in result.stderr
    assert "Traceback" not in result.output


def test_contradicting_options_are_refused(tmp_path: Path) -> None:
    result = run("--hf-path", tmp_path, "-q", "--dequantize")
    assert result.exit_code == 2
    assert "one of --quantize and --dequantize" in result.stderr


def test_an_interruption_says_how_to_go_on(
    checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(piece: object, *how: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "produce", interrupt)
    result = run("--hf-path", checkpoint("dense"), "--mlx-path", tmp_path / "out")
    assert result.exit_code == 130
    assert "the same command goes on" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def test_progress_shows_bytes_speed_time_left_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2_000_000_000, shown=True, stream=sys.stderr) as line:
        line.advance(500_000_000)
    shown = capsys.readouterr().err
    for part in ("0.50 of 2.00 GB", "MB/s", "left", "peak memory"):
        assert part in shown


def test_progress_is_silent_where_there_is_no_terminal(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    result = run("--hf-path", checkpoint("dense"), "--mlx-path", tmp_path / "out")
    assert "Converting" not in result.output
    assert digests(tmp_path / "out")


def test_an_interruption_before_anything_was_written_promises_nothing(
    checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*what: object, **how: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "plan_job", interrupt)
    result = run("--hf-path", checkpoint("dense"), "--mlx-path", tmp_path / "out")
    assert "Interrupted before anything was written." in result.stderr
    assert "goes on" not in result.stderr
