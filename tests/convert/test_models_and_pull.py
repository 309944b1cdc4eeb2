"""Models by the name of their size: fetched from the Hub, listed in its cache, removed, and converted."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlx_qwen.checkpoint import known
from mlx_qwen.checkpoint.cached import cached_models
from mlx_qwen.checkpoint.known import CONVERSIONS, original, size_named
from mlx_qwen.checkpoint.released import SIZES
from mlx_qwen.cli import main
from mlx_qwen.convert import convert
from tests.conftest import CheckpointFactory
from tests.support.hub import REPOSITORY, MakeHub


def run(*arguments: str, answer: str = "") -> Result:
    return CliRunner().invoke(main, list(arguments), input=answer)


@pytest.fixture
def served(chat_folder: Path, hub: MakeHub, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's stand-in, whose one repository counts as 9B, converted and original."""
    hub(chat_folder)
    monkeypatch.setitem(CONVERSIONS, "9B", REPOSITORY)
    return chat_folder


def test_every_size_has_a_conversion_and_an_original_of_its_name() -> None:
    assert tuple(CONVERSIONS) == SIZES
    for size, repository in CONVERSIONS.items():
        assert repository.startswith(f"mlx-community/Qwen3.5-{size}-") and repository.endswith("4bit")
        assert original(size) == f"Qwen/Qwen3.5-{size}"


@pytest.mark.parametrize(
    ("name", "size"),
    [("9B", "9B"), ("9b", "9B"), ("35B", "35B-A3B"), ("397b-a17b", "397B-A17B"), ("7B", None), ("", None)],
)
def test_sizes_are_known_in_any_case_and_without_their_active_part(name: str, size: str | None) -> None:
    assert size_named(name) == size


def test_a_size_that_was_pulled_is_listed_until_it_is_deleted(served: Path) -> None:
    assert "holds no models" in run("models").stdout
    pulled = run("pull", "9b")
    assert pulled.exit_code == 0, pulled.output
    assert f"chat --model {REPOSITORY}" in pulled.stdout
    (found,) = cached_models()
    assert (found.repository, found.readers) == (REPOSITORY, ("mlx-qwen", "mlx-lm", "mlx-vlm"))
    assert found.nbytes >= sum(file.stat().st_size for file in served.glob("*.safetensors"))
    line = run("models").stdout
    assert REPOSITORY in line and "float32" in line and "read by mlx-qwen" in line
    kept = run("models", "--delete", REPOSITORY, answer="n\n")
    assert kept.exit_code == 1 and len(cached_models()) == 1
    assert "freed" in run("models", "--delete", REPOSITORY, "--yes").stdout
    assert cached_models() == []
    assert "has no" in run("models", "--delete", REPOSITORY, "--yes").stderr


def test_a_name_that_is_neither_is_one_line() -> None:
    result = run("pull", "7B")
    assert result.exit_code == 2 and "no size: 0.8B, 2B" in result.stderr.replace("\n", " ")


CHANGES: dict[str, dict[str, object]] = {
    "mixed": {},
    "gptq": {"quantization_config": {"quant_method": "gptq"}},
    "other": {"model_type": "llama"},
}


@pytest.mark.parametrize(
    ("kind", "precision", "readers", "note"),
    [
        ("mixed", "4 to 8 bits", 3, ""),
        ("gptq", "gptq", 0, "to be converted"),
        ("other", "", 0, "of another family, or damaged"),
    ],
)
def test_precision_and_readers_are_told(
    kind: str, precision: str, readers: int, note: str, checkpoint: CheckpointFactory, hub: MakeHub, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint("dense"), tmp_path / "source")
    if kind == "mixed":
        convert(checkpoint("dense"), tmp_path / "mixed", recipe="mixed-4-8")
        folder = tmp_path / "mixed"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **CHANGES[kind]}))
    hub(folder)
    assert run("pull", REPOSITORY).exit_code == 0
    (found,) = cached_models()
    assert (found.precision, len(found.readers), found.note) == (precision, readers, note)


def test_a_conversion_of_a_size_reads_its_original(
    served: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(known, "original", lambda size: REPOSITORY if size == "9B" else "")
    report = convert("9B", tmp_path / "out", bits=8)
    assert REPOSITORY in (tmp_path / "out" / "README.md").read_text()
    assert report.parameters > 0
