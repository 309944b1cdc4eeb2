"""A comparison can be looked at: as a picture, from the command line, and on the model card."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from mlx_qwen.cli import main
from mlx_qwen.convert import Comparison, compare, convert
from mlx_qwen.convert import comparison as comparison_package
from mlx_qwen.convert.comparison import PLOT_NAME, check_destination, save_plot, texts, verify_conversion
from mlx_qwen.errors import ConversionError
from tests.convert.comparison.conftest import TEXT, Perturb


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.fixture
def other(reference: Path, perturbed: Perturb) -> Path:
    return perturbed(reference, "model.layers.1.mlp.up_proj.weight", 0.1)


@pytest.fixture
def comparison(reference: Path, other: Path) -> Comparison:
    return compare(reference, other, text=TEXT)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


def colors(path: Path) -> int:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == 2000
        return len(image.getcolors(1 << 24) or ())


def test_the_picture_shows_more_where_models_differ(reference: Path, comparison: Comparison, tmp_path: Path) -> None:
    save_plot(comparison, tmp_path / "differing.png")
    save_plot(compare(reference, reference, text=TEXT), tmp_path / "equal.png")
    with Image.open(tmp_path / "differing.png") as differing, Image.open(tmp_path / "equal.png") as equal:
        blue = [np.array(image)[..., 2].astype(int) - np.array(image)[..., 0] for image in (differing, equal)]
    assert (blue[0] > 60).sum() > 10 * (blue[1] > 60).sum()


def test_a_picture_in_an_unknown_format_is_refused(comparison: Comparison, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"errors\.txt does not end in \.png"):
        save_plot(comparison, tmp_path / "errors.txt")


def test_the_command_prints_the_table_and_writes_numbers_and_picture(
    reference: Path, other: Path, comparison: Comparison, text_file: Path, tmp_path: Path
) -> None:
    files = ("--json", tmp_path / "numbers.json", "--plot", tmp_path / "picture.png")
    result = run(reference, other, "--text", text_file, *files)
    assert result.exit_code == 0, result.output
    assert result.stdout == comparison.table() + "\n"
    assert json.loads((tmp_path / "numbers.json").read_text()) == comparison.as_json()
    assert colors(tmp_path / "picture.png") > 20


def test_every_option_of_the_command_reaches_the_comparison(reference: Path, other: Path, text_file: Path) -> None:
    options = ("--tokens", "60", "--window", "20", "--dtype", "bfloat16")
    expected = compare(reference, other, text=text_file, tokens=60, window=20, dtype="bfloat16")
    assert run(reference, other, "--text", text_file, *options).stdout == expected.table() + "\n"


def test_the_command_refuses_in_one_line_before_any_work(reference: Path, other: Path, tmp_path: Path) -> None:
    result = run(reference, other, "--plot", tmp_path / "picture.txt")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: picture.txt does not end in .png")


@pytest.mark.parametrize("option", ["--json", "--plot"])
@pytest.mark.parametrize("place", ["missing/a.png", "file/a.png", "/proc/a.png"])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    option: str, place: str, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compared(*arguments: object, **options: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(comparison_package, "compare", compared)
    (tmp_path / "file").touch()
    result = run(reference, reference, option, tmp_path / place)
    assert result.exit_code == 1
    assert f"{tmp_path / place} cannot be written (" in result.stderr
    assert "Choose a file in a folder that exists" in result.stderr


def test_asking_whether_a_file_can_be_written_leaves_everything_as_it_was(tmp_path: Path) -> None:
    check_destination(tmp_path / "new.json")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old.json").write_text("kept")
    check_destination(tmp_path / "old.json")
    assert (tmp_path / "old.json").read_text() == "kept"


def test_verifying_writes_figures_worst_tensors_and_a_picture_into_the_card(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "evaluation_text", lambda: TEXT)
    folder = tmp_path / "mlx"
    convert(reference, folder, bits=4, group_size=32, progress=False)
    before = (folder / "README.md").read_text()
    found = verify_conversion(reference, folder, reference="Qwen/the-source", name="mlx")
    card = (folder / "README.md").read_text()
    assert (found.a, found.b) == ("Qwen/the-source", "mlx")
    assert card.startswith(before)
    added = card.removeprefix(before)
    assert f"| Perplexity, of this model | {found.perplexity_b:.3f} " in added
    assert f"| KL divergence, mean | {found.mean_divergence:.5f} nats |" in added
    assert f"| Same most likely token | {found.agreement:.2%} |" in added
    assert f"| `{found.worst()[0].name}` | {found.worst()[0].relative:.4f} |" in added
    assert f"]({PLOT_NAME})" in added
    assert colors(folder / PLOT_NAME) > 20
