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


@pytest.fixture
def own_text(tmp_path: Path) -> Path:
    (tmp_path / "own.txt").write_text("the answer and the question " * 12)
    return tmp_path / "own.txt"


def test_another_text_can_be_verified_on(reference: Path, own_text: Path, tmp_path: Path) -> None:
    report = convert(reference, tmp_path / "mlx", verify=True, verify_text=str(own_text), progress=False)
    assert report.quality is not None
    again = compare(reference, tmp_path / "mlx", text=own_text)
    assert report.quality.tokens == again.tokens != compare(reference, tmp_path / "mlx", text=TEXT).tokens
    assert report.quality.mean_divergence == again.mean_divergence
    assert f"over {again.tokens:,} predictions on the text own.txt" in (tmp_path / "mlx" / "README.md").read_text()


def test_a_text_that_cannot_be_read_is_refused_before_any_work(reference: Path, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(128, 256)))
    (tmp_path / "empty").touch()
    for name, told in (("missing", "cannot be read"), ("binary", "Give a text file in UTF-8"), ("empty", "0 tokens")):
        with pytest.raises(ConversionError, match=told):
            convert(reference, tmp_path / "mlx", verify=True, verify_text=tmp_path / name, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"binary", "empty"}


def test_a_text_to_verify_on_needs_verifying(reference: Path, own_text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="verify_text only matters with verify"):
        convert(reference, tmp_path / "mlx", verify_text=own_text)
    arguments = ["convert", "--hf-path", str(reference), "--mlx-path", str(tmp_path / "mlx")]
    result = CliRunner().invoke(main, [*arguments, "--verify-text", str(own_text)])
    assert result.exit_code == 2
    assert "--verify-text only matters for --verify" in result.stderr


def test_the_command_passes_the_text_on(reference: Path, own_text: Path, tmp_path: Path) -> None:
    arguments = ["convert", "--hf-path", str(reference), "--mlx-path", str(tmp_path / "mlx"), "--verify"]
    result = CliRunner().invoke(main, [*arguments, "--verify-text", str(own_text)])
    assert result.exit_code == 0, result.output
    assert "on the text own.txt" in (tmp_path / "mlx" / "README.md").read_text()
    missing = CliRunner().invoke(main, [*arguments, "--verify-text", str(tmp_path / "missing.txt")])
    assert missing.exit_code == 2
    assert "missing.txt" in missing.stderr
