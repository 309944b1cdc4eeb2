"""What is going to be written is told before: by kind, by tensor, in bytes, and with what the work needs."""

import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_qwen.checkpoint.released import reduced
from mlx_qwen.checkpoint.shards import checkpoint_tensors, companion_tensors
from mlx_qwen.convert import Description, convert, describe, needs
from mlx_qwen.convert.measures import readable_size
from mlx_qwen.convert.recipes.kinds import Kind
from tests.conftest import CheckpointFactory
from tests.support.tokenizers import add_tokenizer
from tools.benchmarks.synthetic import write_random_checkpoint


@pytest.fixture(scope="module")
def source(checkpoint: CheckpointFactory) -> Path:
    return checkpoint("moe_vl", with_mtp=True, dtype="bfloat16")


def test_it_is_announced_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    announced: list[Description] = []

    def announce(description: Description) -> None:
        assert list(tmp_path.iterdir()) == []
        announced.append(description)

    report = convert(source, tmp_path / "out", announce=announce)
    assert announced == [report.description] == [describe(source)]


def test_rows_and_tensors_add_up_to_what_is_written(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out")
    found = report.description
    stored = [*checkpoint_tensors(tmp_path / "out").values(), *companion_tensors(tmp_path / "out").values()]
    assert found.nbytes == report.output_bytes == sum(info.nbytes for info in stored)
    assert sum(row.nbytes for row in found.rows) == sum(tensor.nbytes for tensor in found.tensors) == found.nbytes
    assert sum(row.tensors for row in found.rows) == len(found.tensors)
    assert found.parameters == report.parameters


def test_rows_are_by_kind_and_precision(source: Path) -> None:
    rows = describe(source, recipe="mixed-4-8", bits_for={"layers.0.*switch_mlp": 8}).rows
    experts = {row.quantization.bits: row.tensors for row in rows if row.kind is Kind.EXPERT and row.quantization}
    assert experts == {8: 3, 4: 9}
    assert {row.kind for row in rows} == set(Kind) - {Kind.MLP}


def test_the_disk_that_is_needed_is_what_the_folder_takes(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out")
    weights = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert weights <= report.description.disk <= weights + 20_000


def test_the_table_shows_kinds_and_on_request_every_tensor(source: Path) -> None:
    found = describe(source)
    for part in ("Recipe balanced", "experts", "4 bits, groups of 64", "bits per weight", "of memory", "of disk"):
        assert part in found.table()
    names = [tensor.name for tensor in found.tensors]
    assert not any(name in found.table() for name in names)
    assert all(name in found.table(tensors=True) for name in names)


def test_no_more_memory_is_taken_than_was_said(tmp_path: Path) -> None:
    config = reduced("0.8B", num_layers=4, changes={"vocab_size": 65536})
    write_random_checkpoint(config, tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "out")
    assert report.peak_memory <= report.description.memory


def test_a_calibration_and_verifying_count_as_memory_too(source: Path, tmp_path: Path) -> None:
    folder = add_tokenizer(shutil.copytree(source, tmp_path / "source"))
    needed = []
    for repeats in (10, 100):
        (tmp_path / "text.txt").write_text("what is the answer and which tool is the one " * repeats)
        needed.append(describe(folder, calibration=tmp_path / "text.txt").memory)
    assert describe(folder).memory < needed[0] < needed[1]
    verified = convert(folder, tmp_path / "out", verify=True, dry_run=True).description
    assert verified.memory > describe(folder).memory
    assert f"up to {readable_size(verified.memory)} of memory, " in verified.table()


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_no_more_memory_is_held_by_a_calibration_and_by_verifying_than_was_said(
    kind: str, checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is kept in reserve would hide all that such a small model takes.
    monkeypatch.setattr(needs, "_KEPT_BYTES", 0)
    folder = add_tokenizer(shutil.copytree(checkpoint(kind), tmp_path / "source"))
    (tmp_path / "text.txt").write_text("what is the answer and which tool is the one " * 100)
    options = {"calibration": tmp_path / "text.txt"}, {"verify": True, "verify_text": tmp_path / "text.txt"}
    for i, asked in enumerate(options):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        report = convert(folder, tmp_path / f"out-{i}", progress=False, **asked)  # type: ignore[arg-type]
        assert mx.get_peak_memory() - before <= report.description.memory
