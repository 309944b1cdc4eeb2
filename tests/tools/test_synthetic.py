"""Random checkpoints for benchmarks look like released ones, and the conversion benchmark runs on them."""

import json
from pathlib import Path

import pytest

from mlx_qwen.checkpoint.layout import Layout, plan_checkpoint
from mlx_qwen.checkpoint.names import parameter_count, tensor_specs
from mlx_qwen.checkpoint.shards import checkpoint_tensors
from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert
from tests.conftest import CheckpointFactory
from tests.support.checkpoints import KINDS
from tests.support.mlx_folders import digests
from tools.benchmarks import conversions as bench
from tools.benchmarks.synthetic import write_random_checkpoint


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_checkpoint_holds_every_tensor_in_the_released_layout(
    kind: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    config = ModelConfig.from_directory(checkpoint(kind, with_mtp=True))
    write_random_checkpoint(config, tmp_path / "random")
    plan = plan_checkpoint(config, checkpoint_tensors(tmp_path / "random"))
    assert plan.layout is Layout.HUGGING_FACE
    assert plan.has_mtp and plan.has_vision == (config.vision is not None)
    assert plan.ignored == ()
    assert convert(tmp_path / "random", tmp_path / "out").non_finite == ()


def test_the_seed_decides_every_byte(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    config = ModelConfig.from_directory(checkpoint("moe_vl"))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_checkpoint(config, tmp_path / name, seed=seed)
    a, b, c = (digests(tmp_path / name)["model.safetensors"] for name in "abc")
    assert a == b != c


def test_the_bench_compares_both_converters_on_one_checkpoint(
    checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = json.loads((checkpoint("moe_vl") / "config.json").read_text())
    monkeypatch.setattr(bench, "bench_config", lambda shape: ModelConfig.from_dict(raw))
    table = bench.bench_conversion("35B-slice", tmp_path, repeats=1)
    measured = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert 0 < float(measured["peak memory"]["ratio"]) < 1
    assert 0 < float(measured["peak memory"]["ratio by default"]) < 1
    assert measured["time"][bench.OURS].endswith(" s")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("shape", "gigabytes"), [("0.8B", 1.75), ("35B-slice", 7.27)])
def test_the_bench_converts_checkpoints_of_real_shape(shape: bench.Shape, gigabytes: float) -> None:
    config = bench.bench_config(shape)
    assert 2 * parameter_count(tensor_specs(config)) / 1e9 == pytest.approx(gigabytes, abs=0.01)
