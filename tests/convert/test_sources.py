"""Sources of every kind: damaged ones are one clear error, quantized ones are unpacked or carried over."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mlx_qwen.convert import convert
from mlx_qwen.errors import CheckpointError, ConfigError, ConversionError
from tests.conftest import CheckpointFactory
from tests.support.mlx_folders import equal, main_arrays

EMBEDDING = "language_model.model.embed_tokens"


@pytest.fixture
def source(checkpoint: CheckpointFactory, tmp_path: Path) -> Path:
    """A dense fp32 checkpoint that a test may damage."""
    return shutil.copytree(checkpoint("dense"), tmp_path / "source")


def rewrite(source: Path, name: str, tensor: torch.Tensor) -> None:
    file = source / "model.safetensors"
    save_file(load_file(file) | {name: tensor}, file)


def test_a_truncated_shard_is_an_error(source: Path, tmp_path: Path) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read .* download it again"):
        convert(source, tmp_path / "out")


def test_a_missing_shard_is_named(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint("dense", shard_size="200KB"), tmp_path / "source")
    lost = sorted(source.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name):
        convert(source, tmp_path / "out")


def test_a_tensor_of_the_wrong_shape_is_named(source: Path, tmp_path: Path) -> None:
    rewrite(source, "model.layers.1.mlp.up_proj.weight", torch.zeros(7, 64))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight .* shape \[7, 64\]"):
        convert(source, tmp_path / "out")


def test_a_config_of_another_family_is_named(source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="llama"):
        convert(source, tmp_path / "out")


def test_weights_that_a_narrower_dtype_cannot_hold_are_warned_of(source: Path, tmp_path: Path) -> None:
    rewrite(source, "model.layers.2.mlp.up_proj.weight", torch.full((128, 64), 1e5))
    with pytest.warns(UserWarning, match=r"layers\.2\.mlp\.up_proj\.weight\. The dtype is too narrow"):
        report = convert(source, tmp_path / "out", quantize=False, dtype="float16")
    assert report.non_finite == ("language_model.model.layers.2.mlp.up_proj.weight",)


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4", "mxfp8"])
def test_dequantizing_gives_what_the_packed_weights_mean(
    mode: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    convert(checkpoint("moe"), tmp_path / "packed", mode=mode)
    convert(tmp_path / "packed", tmp_path / "plain", dequantize=True)
    packed, plain = main_arrays(tmp_path / "packed"), main_arrays(tmp_path / "plain")
    settings = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization"]
    for base in (EMBEDDING, "language_model.model.layers.1.mlp.switch_mlp.up_proj"):
        dense = mx.dequantize(
            packed[f"{base}.weight"],
            packed[f"{base}.scales"],
            packed.get(f"{base}.biases"),
            settings["group_size"],
            settings["bits"],
            mode,
            dtype=mx.float32,
        )
        assert mx.array_equal(plain[f"{base}.weight"], dense)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_mean_scale_times_code_plus_bias_in_fp32(
    bits: int, dtype: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    convert(checkpoint("moe"), tmp_path / "packed", bits=bits, dtype=dtype)  # type: ignore[arg-type]
    convert(tmp_path / "packed", tmp_path / "plain", dequantize=True, dtype="float32")
    packed, plain = main_arrays(tmp_path / "packed"), main_arrays(tmp_path / "plain")
    for base in (EMBEDDING, "language_model.model.layers.1.mlp.switch_mlp.up_proj"):
        words = np.array(packed[f"{base}.weight"])
        fields = (words[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)) & np.uint32((1 << bits) - 1)
        scales, biases = (np.array(packed[f"{base}.{part}"].astype(mx.float32)) for part in ("scales", "biases"))
        codes = fields.reshape(*scales.shape, -1).astype(np.float64)
        exact = (codes * scales[..., None] + biases[..., None]).reshape(*words.shape[:-1], -1)
        written = np.array(plain[f"{base}.weight"])
        assert np.abs(written - exact).max() <= 2.0**-23 * np.abs(codes * scales[..., None]).max()


def test_packing_again_starts_from_the_same_fp32_values(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    convert(checkpoint("dense"), tmp_path / "eight", bits=8, dtype="bfloat16")
    convert(tmp_path / "eight", tmp_path / "plain", dequantize=True, dtype="float32")
    with pytest.warns(UserWarning, match="packed again"):
        convert(tmp_path / "eight", tmp_path / "four", bits=4, dtype="float32")
    convert(tmp_path / "plain", tmp_path / "expected", bits=4)
    four, expected = main_arrays(tmp_path / "four"), main_arrays(tmp_path / "expected")
    assert all(mx.array_equal(four[f"{EMBEDDING}.{part}"], expected[f"{EMBEDDING}.{part}"]) for part in _PARTS)


def test_dequantizing_what_is_not_quantized_is_refused(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="nothing to dequantize"):
        convert(checkpoint("dense"), tmp_path / "out", dequantize=True)


def test_packing_a_packed_source_differently_is_warned_of(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    convert(checkpoint("dense"), tmp_path / "eight", bits=8)
    with pytest.warns(UserWarning, match="packed again"):
        convert(tmp_path / "eight", tmp_path / "four", bits=4, quantizer="rtn")
    dense = mx.dequantize(*(main_arrays(tmp_path / "eight")[f"{EMBEDDING}.{part}"] for part in _PARTS), bits=8)
    assert mx.array_equal(main_arrays(tmp_path / "four")[f"{EMBEDDING}.weight"], mx.quantize(dense)[0])


_PARTS = ("weight", "scales", "biases")


def test_norms_already_shifted_are_not_shifted_again(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = checkpoint("dense", dtype="bfloat16")
    convert(source, tmp_path / "once", quantize=False)
    convert(tmp_path / "once", tmp_path / "twice", quantize=False, dtype="float32")
    stored = load_file(source / "model.safetensors")["model.norm.weight"].float()
    assert equal(main_arrays(tmp_path / "twice")["language_model.model.norm.weight"], stored + 1)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"bits": 7}, "bits is 7"),
        ({"group_size": 16}, "group_size is 16"),
        ({"mode": "mxfp4", "bits": 8}, "bits is 8, but mxfp4 has only 4"),
        ({"mode": "int4"}, "mode is 'int4'"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"quantize": False, "bits": 4}, "bits only matters when quantizing"),
        ({"dequantize": True, "mode": "mxfp4"}, "mode only matters"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, object], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=complaint):
        convert(tmp_path / "source", tmp_path / "out", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("part", "array"),
    [
        ("scales", mx.array(1.0)),
        ("scales", mx.zeros(0)),
        ("scales", mx.zeros((64, 1))),
        ("scales", mx.zeros((5, 2))),
        ("scales", mx.zeros((64, 2), dtype=mx.uint16)),
        ("scales", mx.zeros((64, 2), dtype=mx.uint8)),
        ("biases", mx.zeros((64, 1))),
        ("biases", mx.zeros((64, 2), dtype=mx.uint8)),
        ("biases", None),
        ("weight", mx.array(3, dtype=mx.uint32)),
        ("weight", mx.zeros((128, 14), dtype=mx.uint32)),
        ("weight", mx.zeros((128, 64), dtype=mx.uint32)),
        ("weight", mx.zeros((128, 8))),
    ],
)
def test_packed_matrices_that_mlx_cannot_have_written_are_named(
    part: str, array: mx.array | None, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    convert(checkpoint("dense"), tmp_path / "packed", bits=4, group_size=32)
    arrays = main_arrays(tmp_path / "packed")
    name = f"language_model.model.layers.0.mlp.up_proj.{part}"
    del arrays[name]
    if array is not None:
        arrays[name] = array
    mx.save_safetensors(str(tmp_path / "packed" / "model.safetensors"), arrays)
    if array is None:
        (tmp_path / "packed" / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\."):
        convert(tmp_path / "packed", tmp_path / "out", dequantize=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "config.json", "README.md"])
def test_a_link_out_of_the_folder_is_refused(name: str, source: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    (source / name).touch()
    (source / name).rename(secret)
    (source / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"is a link to .*secret, outside of"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_of_the_hubs_cache_are_followed(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "c0ffee"
    shutil.copytree(checkpoint("dense"), blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    convert(snapshot, tmp_path / "out")
    convert(blobs, tmp_path / "plain")
    assert main_arrays(tmp_path / "out").keys() == main_arrays(tmp_path / "plain").keys()


def test_a_disk_that_refuses_large_files_is_one_clear_error(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    code = (
        "import resource, sys; from mlx_qwen.convert import convert;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); convert(*sys.argv[1:])"
    )
    paths = (str(checkpoint("dense")), str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=False)
    assert "ConversionError" in done.stderr
    assert "takes no files as large as 5 GB" in done.stderr
    assert not list(tmp_path.rglob("config.json"))


def linked_into(folder: Path, source: Path, blobs: dict[str, Path]) -> Path:
    """A folder of links to files of `source`, which lie at the places that `blobs` gives for their names."""
    folder.mkdir()
    for file in source.iterdir():
        place = blobs.get(file.name, blobs[""])
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place / file.name)
        (folder / file.name).symlink_to(place / file.name)
    return folder


def test_a_folder_of_links_to_the_blobs_of_one_repository_is_read(source: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "hub" / "models--a--b" / "blobs"
    convert(linked_into(tmp_path / "linked", source, {"": blobs}), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_links_to_the_blobs_of_two_repositories_or_to_other_folders_are_not(source: Path, tmp_path: Path) -> None:
    one, other = (tmp_path / "hub" / f"models--a--{name}" / "blobs" for name in "bc")
    elsewhere = tmp_path / "hub" / "private" / "blobs"
    for index, places in enumerate(
        ({"": one, "config.json": other}, {"": elsewhere}, {"": one, "README.md": elsewhere})
    ):
        (source / "README.md").write_text("words")
        folder = linked_into(tmp_path / f"linked{index}", source, places)
        with pytest.raises(CheckpointError, match="is a link to"):
            convert(folder, tmp_path / "out")
