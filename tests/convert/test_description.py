"""What is going to be written is told before: by kind, by tensor, in bytes, and with what the work needs."""

from pathlib import Path

import pytest

from mlx_qwen.convert import Description, convert, describe
from mlx_qwen.convert.recipes.kinds import Kind
from mlx_qwen.convert.synthetic import write_random_checkpoint
from mlx_qwen.files import checkpoint_tensors, companion_tensors
from mlx_qwen.sizes import reduced
from tests.conftest import CheckpointFactory


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
    rows = describe(source, bits_for={"layers.0.*switch_mlp": 8}).rows
    experts = {row.quantization.bits: row.tensors for row in rows if row.kind is Kind.EXPERT and row.quantization}
    assert experts == {8: 3, 4: 9}
    assert {row.kind for row in rows} == set(Kind) - {Kind.MLP}


def test_the_disk_that_is_needed_is_what_the_folder_takes(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out")
    weights = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert weights <= report.description.disk <= weights + 20_000


def test_the_table_shows_kinds_and_on_request_every_tensor(source: Path) -> None:
    found = describe(source)
    for part in ("Recipe mixed-4-8", "experts", "4 bits, groups of 64", "bits per weight", "of memory", "of disk"):
        assert part in found.table()
    names = [tensor.name for tensor in found.tensors]
    assert not any(name in found.table() for name in names)
    assert all(name in found.table(tensors=True) for name in names)


def test_no_more_memory_is_taken_than_was_said(tmp_path: Path) -> None:
    config = reduced("0.8B", num_layers=4, changes={"vocab_size": 65536})
    write_random_checkpoint(config, tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "out")
    assert report.peak_memory <= report.description.memory
