"""`convert(verify=True)` proves its output against the source before it gets its name."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from mlx_qwen.cli import main
from mlx_qwen.convert import compare, convert
from mlx_qwen.convert.comparison import texts
from mlx_qwen.errors import CheckpointError, ConversionError
from tests.conftest import CheckpointFactory
from tests.convert.comparison.conftest import TEXT


@pytest.fixture(autouse=True)
def _short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "evaluation_text", lambda: TEXT)


def test_the_report_and_the_card_say_how_good_the_output_is(reference: Path, tmp_path: Path) -> None:
    report = convert(reference, tmp_path / "mlx", bits=4, group_size=32, verify=True, progress=False)
    again = compare(reference, tmp_path / "mlx", text=TEXT)
    assert report.quality is not None
    assert report.quality.tensors == again.tensors
    assert report.quality.mean_divergence == again.mean_divergence > 0
    assert f"{again.mean_divergence:.5f} nats" in (tmp_path / "mlx" / "README.md").read_text()
    assert (tmp_path / "mlx" / "quality.png").stat().st_size > 10_000


def test_without_it_nothing_is_compared(reference: Path, tmp_path: Path) -> None:
    report = convert(reference, tmp_path / "mlx", progress=False)
    assert report.quality is None
    assert "Quality" not in (tmp_path / "mlx" / "README.md").read_text()


def test_verifying_does_not_change_the_weights(reference: Path, tmp_path: Path) -> None:
    for name, verify in (("verified", True), ("plain", False)):
        convert(reference, tmp_path / name, bits=4, verify=verify, progress=False)
    verified, plain = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("verified", "plain"))
    assert verified == plain


def test_the_output_has_no_name_until_it_is_verified(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> str:
        assert not (tmp_path / "mlx").exists()
        assert load_file(next(tmp_path.rglob("model.safetensors")))
        raise ConversionError("the text is gone")

    monkeypatch.setattr(texts, "evaluation_text", fail)
    with pytest.raises(ConversionError, match="the text is gone"):
        convert(reference, tmp_path / "mlx", verify=True, progress=False)
    assert not (tmp_path / "mlx").exists()


def test_a_source_without_tokenizer_is_refused_before_any_work(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        convert(checkpoint("dense"), tmp_path / "mlx", verify=True, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_streamed_away_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="Leave --verify or --stream-from-hub out"):
        convert("someone/model", tmp_path / "mlx", stream_from_hub=True, verify=True)


def test_the_command_prints_what_verifying_found(reference: Path, tmp_path: Path) -> None:
    source = shutil.copytree(reference, tmp_path / "source")
    arguments = ["convert", "--hf-path", str(source), "--mlx-path", str(tmp_path / "mlx"), "--verify"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    for label in ("Bits per weight", "Perplexity", "KL divergence", "Same top token", "Worst tensors"):
        assert label in result.stdout
