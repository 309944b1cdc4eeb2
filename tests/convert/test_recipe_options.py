"""`mlx-qwen convert` takes recipes, patterns and sizes, and shows what it is going to write before it does."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlx_qwen.cli import main
from mlx_qwen.convert.planning import room_for_weights
from tests.conftest import CheckpointFactory


@pytest.fixture(scope="module")
def source(checkpoint: CheckpointFactory) -> Path:
    return checkpoint("dense", dtype="bfloat16")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


def quantization(folder: Path) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads((folder / "config.json").read_text())["quantization"]
    return found


def test_a_mixed_recipe_gives_sensitive_matrices_eight_bits(source: Path, tmp_path: Path) -> None:
    assert run("--hf-path", source, "--mlx-path", tmp_path / "out", "--recipe", "mixed-4-8").exit_code == 0
    written = quantization(tmp_path / "out")
    assert written["bits"] == 4
    assert written["language_model.model.layers.0.linear_attn.out_proj"]["bits"] == 8
    assert "language_model.model.layers.0.mlp.down_proj" not in written


def test_recipe_and_patterns_reach_the_conversion(source: Path, tmp_path: Path) -> None:
    options = ("--recipe", "3bit", "--bits-for", "mlp=6,32", "--bits-for", "up_proj=mxfp4")
    assert run("--hf-path", source, "--mlx-path", tmp_path / "out", *options).exit_code == 0
    written = quantization(tmp_path / "out")
    layer = "language_model.model.layers.2.mlp"
    assert written["bits"] == 3
    assert written[f"{layer}.down_proj"] == {"bits": 6, "group_size": 32, "mode": "affine"}
    assert written[f"{layer}.up_proj"] == {"bits": 4, "group_size": 32, "mode": "mxfp4"}


def test_a_pattern_given_again_counts_as_the_last(source: Path, tmp_path: Path) -> None:
    options = ("--bits-for", "mlp=3", "--bits-for", "up_proj=8", "--bits-for", "mlp=6", "--dry-run", "--verbose")
    result = run("--hf-path", source, "--mlx-path", tmp_path / "out", *options)
    shown = [line for line in result.stdout.splitlines() if "layers.0.mlp.up_proj" in line]
    assert len(shown) == 1 and "6 bits" in shown[0]


def test_what_will_be_written_is_shown_on_stderr_and_the_report_on_stdout(source: Path, tmp_path: Path) -> None:
    result = run("--hf-path", source, "--mlx-path", tmp_path / "out")
    assert "Recipe balanced" in result.stderr and "linear attention output" in result.stderr
    assert "linear attention output" not in result.stdout and "Peak memory" in result.stdout


def test_a_dry_run_shows_it_on_stdout_and_every_tensor_when_verbose(source: Path, tmp_path: Path) -> None:
    arguments = ("--hf-path", source, "--mlx-path", tmp_path / "out", "--dry-run")
    brief, verbose = run(*arguments), run(*arguments, "--verbose")
    assert "linear attention output" in brief.stdout and "of disk" in brief.stdout
    name = "language_model.model.layers.0.linear_attn.out_proj.weight"
    assert name not in brief.stdout and name in verbose.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_target_size_is_met(source: Path, tmp_path: Path) -> None:
    result = run("--hf-path", source, "--mlx-path", tmp_path / "out", "--target-size", "200kB")
    assert result.exit_code == 0, result.output
    assert "Recipe fitted" in result.stderr
    assert sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) <= 200_000


def test_fitting_a_mac_leaves_room_for_the_context(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def room(model: str, *, memory: str, context: int | None, revision: str | None) -> int:
        asked.append((model, memory, context))
        return 200_000

    assert room_for_weights(source, memory="8GB", context=2048) < 16 / 3 * 2**30
    monkeypatch.setattr("mlx_qwen.convert.planning.room_for_weights", room)
    run("--hf-path", source, "--mlx-path", tmp_path / "out", "--fit", "24GB", "--context", "1000")
    assert asked == [(str(source), "24GB", 1000)]
    assert sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) <= 200_000


def test_the_dtype_for_a_chip_is_chosen_and_explained(source: Path, tmp_path: Path) -> None:
    options = ("--dtype", "auto", "--chip", "M1 Pro", "--recipe", "4bit")
    result = run("--hf-path", source, "--mlx-path", tmp_path / "out", *options)
    assert "float16, which M1 Pro is faster in" in result.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["text_config"]["dtype"], config["quantization"]["bits"]) == ("float16", 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--recipe", "4bit", "--q-bits", "4"), "--recipe and --q-bits each decide"),
        (("--fit", "24GB", "--target-size", "1GB"), "--target-size and --fit each decide"),
        (("--context", "100"), "only matters for --fit"),
        (("--bits-for", "out_proj"), "no pattern=bits"),
        (("--recipe", "mixed-4"), "Did you mean mixed-4"),
        (("--bits-for", "outproj=8"), "Names near it"),
        (("--target-size", "1kB"), "smallest possible is"),
        (("--chip", "M1"), "only matters for the dtype"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_one_line(options: tuple[str, ...], said: str, source: Path, tmp_path: Path) -> None:
    result = run("--hf-path", source, "--mlx-path", tmp_path / "out", *options)
    assert result.exit_code != 0
    assert said in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output


def test_help_says_how_large_a_gigabyte_of_memory_and_of_files_is() -> None:
    shown = " ".join(run("--help").output.split())
    assert "16GB (10^9 each; 16GiB are 2^30)" in shown
    assert "as it is sold: 24GB is one with 24 GiB" in shown
