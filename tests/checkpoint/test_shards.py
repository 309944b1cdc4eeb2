"""Damaged, incomplete and foreign folders are refused before anything is read."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_qwen.checkpoint import shards as checkpoint_shards
from mlx_qwen.checkpoint.shards import INDEX_NAME, checkpoint_tensors, read_header
from mlx_qwen.errors import CheckpointError

Checkpoint = Callable[..., Path]


@pytest.fixture
def sharded(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A writable copy of a checkpoint of several shards."""
    return shutil.copytree(checkpoint("dense", shard_size="100KB"), tmp_path / "sharded")


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint_tensors(folder)
    return str(caught.value)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.int8, mx.uint32, mx.int64, mx.bool_])
def test_any_slice_of_a_tensor_is_read_as_mlx_reads_it(tmp_path: Path, dtype: mx.Dtype) -> None:
    arrays = {
        "pad": mx.zeros(3, dtype=mx.uint8),
        "x": (8 * mx.random.normal((6, 5, 3))).astype(dtype),
        "s": mx.array(2.5),
    }
    file = tmp_path / "model.safetensors"
    mx.save_safetensors(str(file), arrays)
    header = read_header(file)
    assert header["x"].shape == (6, 5, 3)
    assert mx.array_equal(header["x"].read(), arrays["x"])
    assert mx.array_equal(header["x"].read(2, 5), arrays["x"][2:5])
    assert header["x"].read(2, 5).dtype == dtype
    assert header["s"].read().item() == 2.5


@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 20])
def test_columns_of_a_matrix_are_those_of_the_whole(
    block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_shards, "_BLOCK_BYTES", block_bytes)
    array = mx.random.normal((7, 11)).astype(mx.bfloat16)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"pad": mx.zeros(3), "x": array})
    info = read_header(tmp_path / "model.safetensors")["x"]
    for start, stop in ((0, 11), (3, 4), (2, 9), (10, 11)):
        assert mx.array_equal(info.read_columns(start, stop), array[:, start:stop])


@pytest.mark.parametrize("keep", [0, 4, 100, -1000])
def test_a_truncated_shard_is_named(sharded: Path, keep: int) -> None:
    shard = shards(sharded)[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    message = refusal(sharded)
    assert shard.name in message
    assert "truncated" in message


def tensor(begin: int, end: int, shape: object = None, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (b"", "header would take 0 bytes"),
        (b"{", "cannot be read as safetensors"),
        (b"\xff\xfe{}", "cannot be read as safetensors"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"x":' * 100_000, "nested too deeply"),
        (b"[1]", "is a list, expected an object"),
        ({"x": tensor(0, 4), "y": tensor(2, 8)}, "y begins at byte"),
        ({"x": tensor(0, 4), "y": tensor(6, 8)}, "y begins at byte"),
        ({"x": tensor(0, 4)}, "the file at"),
        ({"x": tensor(0, 8), "y": tensor(8, 1 << 40)}, "the file at"),
        ({"x": tensor(0, 8, [3])}, "which its shape and dtype do not make"),
        ({"x": tensor(0, 8, [1 << 32, 1 << 32])}, "do not make"),
        ({"x": tensor(0, 8, [-2, -4])}, "no shape"),
        ({"x": tensor(0, 8, [1] * 100_000)}, "no shape of at most"),
        ({"x": tensor(0, 8, [2.0, 4])}, "no shape"),
        ({"x": tensor(0, 8, [True, 8])}, "no shape"),
        ({"x": {"dtype": "U8", "shape": [8]}}, "no two data_offsets"),
        ({"x": 3}, "no two data_offsets"),
        (b'{"x":%b,"x":%b}' % ((json.dumps(tensor(0, 8)).encode(),) * 2), "has x twice"),
        (b'{"x":{"dtype":"U8","dtype":"I8","shape":[8],"data_offsets":[0,8]}}', "has dtype twice"),
        ({"\x1b[2J" + "x" * 10_000: tensor(0, 7)}, r"\?\[2Jx{50,200} takes|the file at"),
    ],
)
def test_a_header_that_lies_is_one_clear_error(
    header: bytes | dict[str, object], complaint: str, tmp_path: Path
) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    message = refusal(tmp_path)
    assert "model.safetensors" in message and "download it again" in message
    assert re.search(complaint, message)
    assert len(message) < 600 and message.isprintable()


def test_a_header_that_claims_gigabytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    assert "damaged" in refusal(tmp_path)


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="it is no file"):
        read_header(tmp_path / "model.safetensors")


def test_an_index_that_puts_a_tensor_into_another_shard_is_refused(sharded: Path) -> None:
    index = json.loads((sharded / INDEX_NAME).read_text())
    first, second = (shard.name for shard in shards(sharded)[:2])
    moved = next(name for name, shard in sorted(index["weight_map"].items()) if shard == first)
    index["weight_map"][moved] = second
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    message = refusal(sharded)
    assert f"{moved} in {second}: {first} holds it" in message


def test_a_missing_shard_is_named(sharded: Path) -> None:
    lost = shards(sharded)[2]
    lost.unlink()
    assert lost.name in refusal(sharded)


def test_a_tensor_that_only_the_index_knows_is_named(sharded: Path) -> None:
    index = json.loads((sharded / INDEX_NAME).read_text())
    index["weight_map"]["model.layers.9.ghost"] = shards(sharded)[0].name
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    assert "model.layers.9.ghost" in refusal(sharded)


@pytest.mark.parametrize("content", ["", "{}", '{"weight_map": 3}', "[1]", "[" * 100_000])
def test_an_index_that_is_none_is_refused(sharded: Path, content: str) -> None:
    (sharded / INDEX_NAME).write_text(content)
    message = refusal(sharded)
    assert INDEX_NAME in message
    assert "Download it again" in message


def test_an_index_that_leads_out_of_the_folder_is_refused(sharded: Path) -> None:
    (sharded / INDEX_NAME).write_text(json.dumps({"weight_map": {"x": "../../secret.safetensors"}}))
    assert "plain file names" in refusal(sharded)


def test_the_same_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for name in ("model-a.safetensors", "model-b.safetensors"):
        mx.save_safetensors(str(tmp_path / name), {"x": mx.zeros(2)})
    assert "model-a.safetensors" in refusal(tmp_path)


def test_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "save_pretrained" in refusal(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert "no *.safetensors" in refusal(tmp_path)


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F8_E5M2", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    assert "F8_E5M2" in refusal(tmp_path)
