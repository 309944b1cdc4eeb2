"""The benchmarks compare like with like, and print what they measured."""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_qwen.bench.table import Table
from mlx_qwen.bench.timing import median_times
from mlx_qwen.checkpoint.released import reduced
from tests.support.checkpoints import tiny_checkpoint
from tests.support.ranks import in_processes
from tests.support.tokenizers import add_tokenizer
from tools.benchmarks.__main__ import RANKED, main
from tools.benchmarks.conversions import bench_conversion_memory
from tools.benchmarks.delta_rule import random_problem
from tools.benchmarks.draft_vocabulary import bench_draft_vocabulary
from tools.benchmarks.packed_keys import bench_packed
from tools.benchmarks.peer import WITHOUT_TORCH, random_pair
from tools.benchmarks.quality import bench_quality
from tools.benchmarks.rank_models import KINDS
from tools.benchmarks.ranks import bench_ranks

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "vocab_size": 256,
}


@pytest.mark.parametrize("bits", [None, 4])
def test_both_models_of_a_comparison_compute_the_same(bits: int | None) -> None:
    ours, theirs = random_pair(reduced("0.8B", num_layers=4, changes=SMALL), bits=bits)
    ids = mx.array([[1, 2, 3, 4, 5, 6, 7]])
    expected = np.array(theirs(ids))
    assert np.abs(np.array(ours(ids)) - expected).max() <= 1e-3 * np.abs(expected).max()


def test_guesses_from_parts_of_a_vocabulary_read_less_of_the_head() -> None:
    table = bench_draft_vocabulary(repeats=1, vocab_size=4096)
    greedy = {row[1]: float(row[2].split()[0]) for row in table.rows if row[0] == "greedy"}
    assert list(greedy) == ["all", "1/8", "2/8", "3/8", "5/8"]
    # 4 bits, and 64 of scale and bias for each 64 of 1,024 columns.
    assert greedy["all"] == pytest.approx(4096 * 1024 * (4 + 64 / 64) / 8 / 1e6, abs=0.06)
    assert greedy["1/8"] < greedy["all"] / 4
    assert all(float(row[3].split()[0]) >= 0 for row in table.rows)


def test_precision_is_compared_with_transformers_and_mlx_lm(tmp_path: Path) -> None:
    folder = add_tokenizer(tiny_checkpoint(tmp_path / "source", "dense", dtype="bfloat16"))
    (tmp_path / "text.txt").write_text("what is the answer, and which tool is the one? " * 40)
    table = bench_quality(folder, tmp_path / "text.txt", tmp_path, windows=1)
    names = [row[0] for row in table.rows]
    assert names[:2] == ["transformers, fp32", "transformers, bf16"]
    assert [name for name in names if name.startswith("mlx-qwen")] == [
        f"mlx-qwen, {p}" for p in ("bf16", "8 bits", "4 bits")
    ]
    assert sum(name.startswith("mlx-lm") for name in names) == 3
    agreement = {row[0]: float(row[2].rstrip("%")) for row in table.rows}
    assert agreement["transformers, fp32"] == 100
    assert agreement["mlx-qwen, bf16"] > 90
    assert agreement["mlx-qwen, 8 bits"] > 80


def test_candidates_take_turns_after_one_that_is_not_timed() -> None:
    calls: list[str] = []
    times = median_times({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4
    assert set(times) == {"a", "b"}


def test_a_table_is_markdown_with_aligned_columns() -> None:
    lines = str(Table("Title", "A note.", ("", "ours"), [("long name", "1")])).splitlines()
    assert lines[0] == "### Title"
    assert {len(line) for line in lines if line.startswith("|")} == {len("| long name | ours |")}


def test_the_rules_inputs_decay_as_in_a_trained_layer() -> None:
    problem = random_problem(8, Hk=1, Hv=2, Dk=16, Dv=16)
    assert problem.q.shape == (1, 8, 1, 16)
    assert mx.all(mx.isfinite(problem.A_log)).item()


def test_launches_and_bytes_are_printed_beside_mlx_lms() -> None:
    result = CliRunner().invoke(main, ["kernels"])
    assert result.exit_code == 0, result.output
    assert "Kernel launches" in result.output
    assert "gated_delta_mixer" in result.output
    assert "mlx-lm: gated_delta_step_packed" in result.output


def test_quality_without_a_model_says_what_it_needs() -> None:
    result = CliRunner().invoke(main, ["quality"])
    assert result.exit_code == 2
    assert "--model" in result.output


def test_memory_of_a_conversion_is_measured_at_three_sizes(tmp_path: Path) -> None:
    table = bench_conversion_memory(tmp_path, layers=1, vocab_size=1024)
    assert [row[0] for row in table.rows] == ["1×", "2×", "4×", "4× / 1×"]
    assert list(tmp_path.iterdir()) == []


def test_mlx_lm_is_measured_without_torch() -> None:
    code = f"{WITHOUT_TORCH}import mlx_lm, transformers; print(transformers.utils.is_torch_available())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_two_ranks_are_compared_with_one_and_with_mlx_lms(tmp_path: Path) -> None:
    tables = bench_ranks(tmp_path, kinds=("dense",), precisions=("4 bits",), ranks=(2,), turns=1, tokens=4)
    computed, taken = ([dict(zip(table.header, row, strict=True)) for row in table.rows] for table in tables)
    assert [(row[""], row["ranks"]) for row in computed] == [("dense 4 bits", "1, again"), ("dense 4 bits", "2")]
    for row in computed:
        for name in ("mlx-qwen", "mlx-lm"):
            assert float(row[f"{name} differs"]) < 1e-5
            assert row[f"{name} other"] == "0 of 70"
            assert row[f"{name} equal"] == "2 of 2"
        assert float(row["between them"]) < 2e-4
    alone, shared = taken
    assert alone["mlx-qwen exchanges"] == ""
    # Two a layer, that of the embedding, and that of the logits.
    assert shared["mlx-qwen exchanges"] == "10"
    assert float(shared["mlx-qwen sends"].split()[0]) == pytest.approx((9 * 4 * 128 + 4 * 1024 / 2) / 1e3, abs=0.06)
    held, whole, above, largest = (
        float(cell.split()[0])
        for cell in (shared["holds"], alone["holds"], shared["peak above"], shared["largest tensor"])
    )
    assert whole / 2 <= held < 0.6 * whole
    assert above <= largest


def test_every_kind_that_ranks_divide_can_be_chosen() -> None:
    assert tuple(KINDS) == RANKED


_WAITING = """
import time
import mlx.core as mx
from tools.benchmarks.rings import join_sleeping
group = join_sleeping()
mx.eval(mx.distributed.all_sum(mx.ones(2), group=group))
if group.rank() == 1:
    time.sleep(1)
before = time.process_time()
mx.eval(mx.distributed.all_sum(mx.ones(2), group=group))
print(time.process_time() - before)
"""


def test_ranks_of_a_benchmark_sleep_while_they_wait(tmp_path: Path) -> None:
    waited, _ = in_processes(2, _WAITING, folder=tmp_path)
    assert float(waited) < 0.1


@pytest.mark.parametrize("scores", [False, True])
def test_packed_keys_and_values_take_what_is_planned_for_them(scores: bool) -> None:
    table = bench_packed(tokens=300, scores=scores)
    assert [row[0] for row in table.rows] == ["fp32", "8 bits", "4 bits"]
    assert {row[4] for row in table.rows} == {"1.000"}
    held = [float(row[5]) for row in table.rows]
    assert held == sorted(held, reverse=True)
