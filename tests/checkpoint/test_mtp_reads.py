"""What the MTP layer reads is what its checkpoint says, and never guessed where that can be known."""

import base64
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert
from mlx_qwen.demo import DEMO_FOLDER
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model
from tests.support.mlx_folders import companion_arrays

Checkpoint = Callable[..., Path]

# What mtp.pre_fc_norm_hidden.weight was, in bf16, of the demo that came with the versions before the marker.
FORMER_NORM = base64.b64decode(
    "Dj4oPI0+HD7FPQA+PT6ZPtY8qz41Pg0+Az7sPZs+RT6VPa0+Tj6aPS0+gj48Pvm9GD6zPto9CT5NPik9Lz4cPno+Tj6yvTk+MD41PjU+"
    "mj5jPqY9Aj1NPus+Qz5jPkg+9j5oPgs/fT6/PW4+dL4jPro+ID47PgY+lj5/Pd09zT52vMM+TD6pvBo8Ez6CPnw+l7yoPtM9eD5pPpU+"
    "VT6xPZk+aT53Pg8+oT48PVA+kj0sPmo+WbyWPt49Bj6IPcg8Aj6RPny+OT6yPU4+DD4mPqg+ID4/PoM+uD5ZPjc+ATyhPok+lj4mPmo+"
    "YD6LPm898z2CPSQ9Jz2IPjw+sj7oPQ=="
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def loaded(path: Path) -> Model:
    return load_model(path, ModelConfig.from_directory(path))


def says(source: Path, target: Path, word: object) -> Path:
    """A copy of a folder whose marker says `word`, or nothing for None."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    marker = {"format": 1, **config.get("mlx_qwen", {}), "mtp_reads": word}
    if word is None:
        del marker["mtp_reads"]
    (target / "config.json").write_text(json.dumps({**config, "mlx_qwen": marker}))
    return target


def marker(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "config.json").read_text())["mlx_qwen"]
    return found


@pytest.mark.parametrize("word", ["normed", "residual"])
def test_the_word_of_the_config_holds_in_both_layouts_and_is_passed_on(
    checkpoint: Checkpoint, tmp_path: Path, word: str
) -> None:
    source = says(checkpoint("dense", with_mtp=True), tmp_path / "hf", word)
    convert(source, tmp_path / "once", progress=False)
    convert(tmp_path / "once", tmp_path / "twice", dequantize=True, progress=False)
    for folder in (source, tmp_path / "once", tmp_path / "twice"):
        model = loaded(folder)
        assert (model.mtp_reads, model.mtp_unsettled) == (word, None)
    assert marker(tmp_path / "twice")["mtp_reads"] == word


def test_a_silent_checkpoint_is_taken_as_released_ones_are_and_stays_silent(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    convert(checkpoint("dense", with_mtp=True), tmp_path / "out", progress=False)
    assert "mtp_reads" not in marker(tmp_path / "out")
    model = loaded(tmp_path / "out")
    assert model.mtp_reads == "normed" and model.mtp_unsettled is not None


def test_the_bundled_model_says_that_it_reads_normed_states() -> None:
    model = loaded(DEMO_FOLDER)
    assert marker(DEMO_FOLDER)["mtp_reads"] == "normed"
    assert (model.mtp_reads, model.mtp_unsettled) == ("normed", None)


@pytest.mark.parametrize("word", ["qwen4_exp", 3, ["normed"]])
def test_a_word_of_later_versions_leaves_the_layer_unused_and_says_so(
    checkpoint: Checkpoint, tmp_path: Path, word: object
) -> None:
    source = checkpoint("dense", with_mtp=True)
    folder = says(source, tmp_path / "later", word)
    with pytest.warns(UserWarning, match="mtp_reads .* expected 'normed' or 'residual'.*Upgrade"):
        model = loaded(folder)
    assert model.mtp is None
    ids = mx.array([[5, 9, 2, 77]])
    assert mx.array_equal(model(ids), loaded(source)(ids))
    convert(folder, tmp_path / "converted", progress=False)
    assert marker(tmp_path / "converted")["mtp_reads"] == word
    assert any(name.startswith("mtp.") for name in companion_arrays(tmp_path / "converted"))


def test_without_an_mtp_layer_nothing_is_said_about_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = says(checkpoint("dense"), tmp_path / "plain", "qwen4_exp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loaded(source).mtp_unsettled is None
    convert(source, tmp_path / "out", progress=False)
    assert "mtp_reads" not in marker(tmp_path / "out")


@pytest.fixture
def former_demo(tmp_path: Path) -> Path:
    """The bundled folder with the norm of the former one's MTP layer, and without the marker's word."""
    folder = says(DEMO_FOLDER, tmp_path / "former", None)
    weights = dict(companion_arrays(folder))
    shifts = mx.array(np.frombuffer(FORMER_NORM, np.uint16)).view(mx.bfloat16)
    weights["mtp.pre_fc_norm_hidden.weight"] = shifts.astype(mx.float32) + 1
    mx.eval(weights)
    mx.save_safetensors(str(folder / "mlx-qwen.safetensors"), weights, metadata={"format": "mlx"})
    return folder


def test_the_former_demo_and_its_conversions_are_known_to_read_residual_sums(former_demo: Path, tmp_path: Path) -> None:
    convert(former_demo, tmp_path / "4 bits", bits=4, progress=False)
    convert(former_demo, tmp_path / "fp16", quantize=False, dtype="float16", progress=False)
    for folder in (former_demo, tmp_path / "4 bits", tmp_path / "fp16"):
        model = loaded(folder)
        assert (model.mtp_reads, model.mtp_unsettled) == ("residual", None)


def test_another_norm_is_another_model(former_demo: Path) -> None:
    weights = dict(companion_arrays(former_demo))
    weights["mtp.pre_fc_norm_hidden.weight"] = mx.where(
        mx.arange(128) == 5, 1.0, weights["mtp.pre_fc_norm_hidden.weight"]
    )
    mx.eval(weights)
    mx.save_safetensors(str(former_demo / "mlx-qwen.safetensors"), weights, metadata={"format": "mlx"})
    model = loaded(former_demo)
    assert model.mtp_reads == "normed" and model.mtp_unsettled is not None


def test_a_checkpoint_is_known_by_its_config_and_its_weight_files(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = says(checkpoint("dense", with_mtp=True), tmp_path / "folder", None)
    first, again = loaded(folder).mtp_unsettled, loaded(folder).mtp_unsettled
    assert first is not None and first == again
    (folder / "README.md").write_text("A word more.")
    assert loaded(folder).mtp_unsettled == first
    os.utime(folder / "model-mtp.safetensors", (1, 1))
    second = loaded(folder).mtp_unsettled
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "1"}))
    assert len({first, second, loaded(folder).mtp_unsettled}) == 3
