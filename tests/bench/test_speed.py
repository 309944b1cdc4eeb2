"""The comparison of speed is fair, survives a peer that fails, and says what it measured."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image, ImageColor

from mlx_qwen.bench import speed
from mlx_qwen.bench.chart import COLORS
from mlx_qwen.bench.process import Timed, Turn, measure
from mlx_qwen.bench.runtimes import RUNTIMES
from mlx_qwen.bench.speed import KERNELS_OFF, Speed, compare_speed
from mlx_qwen.bench.speed_report import speed_table
from mlx_qwen.cli import main
from mlx_qwen.errors import MLXQwenError
from tests.conftest import CheckpointFactory

SIZES = (3, 5)


def a_turn(seconds: float = 1.0) -> Turn:
    return Turn(0.5, 10**9, [Timed(size, seconds, 4, 2 * seconds) for size in SIZES], {})


@pytest.mark.parametrize("kind", ["dense_vl", "moe_vl"])
def test_every_runtime_writes_the_same_tokens(kind: str, checkpoint: CheckpointFactory) -> None:
    folder = checkpoint(kind, fused_experts=kind.startswith("moe"))
    ours, theirs = (list(RUNTIMES[name](folder)([7, 1, 9, 4], 12)) for name in ("mlx-qwen", "mlx-lm"))
    assert len(ours) == 12
    assert ours == theirs


def test_a_turn_reads_every_prompt_and_writes_all_tokens(checkpoint: CheckpointFactory) -> None:
    turn = measure("mlx-qwen", checkpoint("dense"), SIZES, 4)
    assert [timed.prompt_tokens for timed in turn.prompts] == [3, 5]
    assert {timed.decoded_tokens for timed in turn.prompts} == {3}
    assert all(timed.prefill_seconds > 0 and timed.decode_seconds > 0 for timed in turn.prompts)
    assert turn.load_seconds > 0
    assert turn.peak_memory > 0
    assert "gated_delta_mixer" in turn.kernels


def recorded(monkeypatch: pytest.MonkeyPatch, failing: Sequence[str] = ()) -> list[str]:
    """Who took a turn, in order, with turns that take no time."""
    order: list[str] = []

    def turn(name: str, folder: Path, sizes: Sequence[int], count: int) -> Turn:
        order.append(name)
        if name in failing:
            raise MLXQwenError(f"{name} stumbled.")
        return a_turn()

    monkeypatch.setattr(speed, "_turn", turn)
    return order


def compared(repeats: int = 2) -> Speed:
    return compare_speed(
        Path("model"), prompt_tokens=SIZES, generate_tokens=5, peers=["mlx-lm"], kernels_off=True, repeats=repeats
    )


def test_candidates_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order = recorded(monkeypatch)
    compared(repeats=2)
    assert order == ["mlx-qwen", KERNELS_OFF, "mlx-lm"] * 2


def test_a_peer_that_fails_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    order = recorded(monkeypatch, failing=["mlx-lm"])
    table = str(speed_table(compared(repeats=2), []))
    assert order.count("mlx-lm") == 1
    assert "Left out: mlx-lm stumbled." in table
    assert "ours / mlx-lm" not in table


def test_our_own_failure_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(monkeypatch, failing=["mlx-qwen"])
    with pytest.raises(MLXQwenError, match="mlx-qwen stumbled"):
        compared()


def test_kernels_off_means_plain_mlx_whatever_is_set(
    monkeypatch: pytest.MonkeyPatch, checkpoint: CheckpointFactory
) -> None:
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    turn = speed._turn(KERNELS_OFF, checkpoint("dense"), SIZES[:1], 2)
    assert all(calls.kernel == 0 for calls in turn.kernels.values())
    assert all("reference backend" in calls.reference for calls in turn.kernels.values())


def test_the_table_shows_medians_ranges_and_ratios() -> None:
    turns = {"mlx-qwen": [a_turn(1), a_turn(2), a_turn(4)], "mlx-lm": [a_turn(4)] * 3}
    lines = str(speed_table(Speed(SIZES, 5, turns, {}), [])).splitlines()
    prefill = next(line for line in lines if "prefill of 3" in line)
    assert "1.5 (0.8–3.0)" in prefill
    assert prefill.split("|")[-2].strip() == "2.00"


@pytest.fixture(scope="module")
def bench(checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """`mlx-qwen bench` of a tiny model beside mlx-lm, and the folder of the files it wrote."""
    out = tmp_path_factory.mktemp("bench")
    arguments = ["bench", "--model", str(checkpoint("moe")), "--prompt-tokens", "5,3", "--generate-tokens", "3"]
    files = ["--json", str(out / "b.json"), "--markdown", str(out / "b.md"), "--plot", str(out / "b.png")]
    more = ["--repeats", "1", "--vs", "mlx-lm", "--kernels-on-off"]
    return CliRunner().invoke(main, [*arguments, *files, *more]), out


def test_one_command_names_the_machine_and_every_version(bench: tuple[Result, Path]) -> None:
    result, _ = bench
    assert result.exit_code == 0, result.output
    first = result.stdout.splitlines()[0]
    assert all(word in first for word in ("chip ", "python ", "mlx-qwen ", "; mlx ", "mlx-lm "))


def test_one_command_compares_prompts_and_decoding(bench: tuple[Result, Path]) -> None:
    result, _ = bench
    for row in ("prefill of 3", "prefill of 5", "decode after 3", "decode after 5", "peak memory"):
        assert f"| {row}" in result.stdout
    assert "| mlx-lm " in result.stdout


def test_one_command_says_where_the_kernels_could_not_run(bench: tuple[Result, Path]) -> None:
    result, _ = bench
    assert (KERNELS_OFF in result.stdout) != ("not available here" in result.stdout)


def test_json_holds_every_sample_and_the_machine(bench: tuple[Result, Path]) -> None:
    found = json.loads((bench[1] / "b.json").read_text())
    assert found["machine"]["mlx-lm"]
    turns = found["speed"]["turns"]
    assert len(turns["mlx-qwen"]) == len(turns["mlx-lm"]) == 1
    assert {prompt["prompt_tokens"] for prompt in turns["mlx-lm"][0]["prompts"]} == {3, 5}


def test_markdown_is_what_was_printed(bench: tuple[Result, Path]) -> None:
    result, out = bench
    assert (out / "b.md").read_text().strip() == result.stdout.strip()


def test_the_chart_is_a_picture(bench: tuple[Result, Path]) -> None:
    with Image.open(bench[1] / "b.png") as picture:
        assert picture.width > 600
        colors = picture.convert("RGB").getcolors(1 << 24) or []
        assert {ImageColor.getrgb(color) for color in COLORS[:2]} <= {color for _, color in colors}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt-tokens", "12,many"], "no list of numbers"),
        (["--prompt-tokens", "0"], "at least 1 token"),
        (["--generate-tokens", "1"], "generate-tokens"),
        (["--kernels", "--plot", "x.png"], "leave one of them out"),
        (["--plot", "x.txt"], ".png"),
        (["--prompt-tokens", "300000"], "--prompt-tokens and --generate-tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_reason(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(main, ["bench", *arguments])
    assert result.exit_code != 0
    assert said in result.output
