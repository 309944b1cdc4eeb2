"""Hub repositories are read by their headers, and shard by shard, never whole."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mlx_qwen.checkpoint import remote as repository
from mlx_qwen.convert import convert
from mlx_qwen.convert.work import supply
from mlx_qwen.convert.work import write as weights
from mlx_qwen.convert.work.supply import Supply
from mlx_qwen.convert.writing import staging
from mlx_qwen.errors import CheckpointError, ConversionError
from tests.conftest import CheckpointFactory
from tests.support.foreign import Encoder, Values, foreign_checkpoint
from tests.support.hub import REPOSITORY, MakeHub
from tests.support.integer_codes import little_endian, nearest, symmetric_gptq
from tests.support.mlx_folders import digests


def weight_bytes(folder: Path) -> int:
    """Bytes of the shards below `folder`, of which some may go while they are counted."""
    total = 0
    for file in folder.rglob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def unpublished(folder: Path) -> dict[str, str]:
    """Checksums of what does not name where the model came from."""
    return {name: digest for name, digest in digests(folder).items() if name != "README.md"}


def test_what_is_streamed_is_what_is_converted_from_a_folder(sharded: Path, tmp_path: Path, hub: MakeHub) -> None:
    convert(sharded, tmp_path / "local", recipe="mixed-4-8")
    fake = hub(sharded)
    convert(REPOSITORY, tmp_path / "streamed", recipe="mixed-4-8", stream_from_hub=True)
    assert unpublished(tmp_path / "streamed") == unpublished(tmp_path / "local")
    assert REPOSITORY in (tmp_path / "streamed" / "README.md").read_text()
    assert fake.served_weights() >= weight_bytes(sharded)
    assert not (tmp_path / "streamed.partial").exists()


def test_the_disk_never_holds_more_than_two_shards_and_the_output(
    sharded: Path, tmp_path: Path, hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(sharded)
    produce, held = weights.produce, []

    def looking(piece: weights.Piece, *how: object) -> object:
        held.append(weight_bytes(tmp_path / "out.partial" / "downloads"))
        return produce(piece, *how)

    monkeypatch.setattr(weights, "produce", looking)
    convert(REPOSITORY, tmp_path / "out", stream_from_hub=True)
    sizes = sorted(file.stat().st_size for file in sharded.glob("*.safetensors"))
    assert 0 < max(held) <= sum(sizes[-2:]) < sum(sizes) / 2
    assert weight_bytes(tmp_path / "cache") == 0


@pytest.mark.parametrize("dry", ["dry run", "streaming"])
def test_room_is_checked_for_the_output_and_two_shards(
    dry: str, sharded: Path, tmp_path: Path, hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = hub(sharded)
    size = convert(sharded, tmp_path / "local", recipe="mixed-4-8").output_bytes
    usage = shutil.disk_usage(tmp_path)._replace(free=size + 50_000)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConversionError, match="are free in"):
        convert(REPOSITORY, tmp_path / "out", recipe="mixed-4-8", stream_from_hub=True, dry_run=dry == "dry run")
    assert fake.served_weights() < weight_bytes(sharded) / 2


def test_a_dry_run_reads_only_headers(checkpoint: CheckpointFactory, tmp_path: Path, hub: MakeHub) -> None:
    source = checkpoint("dense", dtype="bfloat16", with_mtp=True)
    fake = hub(source)
    dry = convert(REPOSITORY, tmp_path / "out", recipe="mixed-4-8", dry_run=True)
    whole = convert(source, tmp_path / "local", recipe="mixed-4-8")
    assert (dry.output_bytes, dry.parameters) == (whole.output_bytes, whole.parameters)
    assert 0 < fake.served_weights() < weight_bytes(source) / 4
    assert weight_bytes(tmp_path / "cache") == 0
    assert not (tmp_path / "out").exists()


def with_groups(weight: Tensor) -> tuple[dict[str, Tensor], Values]:
    """GPTQ's words and `g_idx`, which is not asked for where config.json says that it is in order."""
    tensors, values = symmetric_gptq(weight)
    return {**tensors, "g_idx": torch.from_numpy(np.arange(weight.shape[1], dtype=np.int32) // 32)}, values


def packed(weight: Tensor) -> tuple[dict[str, Tensor], Values]:
    """Words of compressed-tensors, and `weight_shape`, which is not asked for where config.json says how many bits."""
    found = nearest(weight, np.arange(weight.shape[1]) // 32, bits=4, symmetric=True)
    return {
        "weight_packed": torch.from_numpy(little_endian(found.codes, 4)),
        "weight_scale": found.scales,
        "weight_shape": torch.tensor(weight.shape),
    }, found.values


GPTQ = {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 4, "desc_act": False}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4}}},
}


@pytest.mark.parametrize(("settings", "encoder"), [(GPTQ, with_groups), (PACKED, packed)])
def test_packed_modules_of_the_hub_need_no_request_each(
    settings: dict[str, object],
    encoder: Encoder,
    checkpoint: CheckpointFactory,
    tmp_path: Path,
    hub: MakeHub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    foreign, _ = foreign_checkpoint(checkpoint("moe"), tmp_path, settings, encoder)
    fixed: dict[str, int | str] = {"embed_tokens|lm_head": 8}
    local = convert(foreign, tmp_path / "local", bits_for=fixed)
    hub(foreign)
    read, asked = repository.Repository.read, []

    def counting(*what: object) -> bytes:
        asked.append(what)
        return read(*what)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(repository.Repository, "read", counting)
        dry = convert(REPOSITORY, tmp_path / "dry", bits_for=fixed, dry_run=True)
    assert len(asked) <= 2, "the header, in two parts"
    assert dry.kept_codes == local.kept_codes != ()
    convert(REPOSITORY, tmp_path / "streamed", bits_for=fixed, stream_from_hub=True)
    assert unpublished(tmp_path / "streamed") == unpublished(tmp_path / "local")


@pytest.mark.parametrize("stream", [True, False])
def test_groups_that_are_not_what_the_config_says_of_them_are_found(
    stream: bool, checkpoint: CheckpointFactory, tmp_path: Path, hub: MakeHub
) -> None:
    def shuffled(values: Values) -> tuple[dict[str, Tensor], Values]:
        parts, decoded = with_groups(values)
        return {**parts, "g_idx": parts["g_idx"].flip(0)}, decoded

    foreign, _ = foreign_checkpoint(checkpoint("dense"), tmp_path, GPTQ, shuffled)
    hub(foreign)
    with pytest.raises(CheckpointError, match=r"inputs are out of order, config\.json says desc_act: false"):
        convert(REPOSITORY, tmp_path / "out", stream_from_hub=stream)


def test_a_download_that_breaks_off_is_gone_on_with(sharded: Path, tmp_path: Path, hub: MakeHub) -> None:
    convert(sharded, tmp_path / "local", recipe="mixed-4-8")
    fake = hub(sharded)
    fake.breaks_after = weight_bytes(sharded) * 2 // 3
    with pytest.raises(ConversionError, match="goes on where this one stopped"):
        convert(REPOSITORY, tmp_path / "out", recipe="mixed-4-8", stream_from_hub=True)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out.partial/*/config.json"))
    before = fake.served_weights()
    fake.breaks_after = None
    convert(REPOSITORY, tmp_path / "out", recipe="mixed-4-8", stream_from_hub=True)
    assert unpublished(tmp_path / "out") == unpublished(tmp_path / "local")
    assert fake.served_weights() - before < weight_bytes(sharded)


def test_an_interruption_does_not_wait_for_the_download(
    sharded: Path, tmp_path: Path, hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(sharded)
    advance, counted = weights.Progress.advance, []

    def interrupt(line: weights.Progress, nbytes: int) -> None:
        counted.append(nbytes)
        if len(counted) == 5:
            raise KeyboardInterrupt
        advance(line, nbytes)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(weights.Progress, "advance", interrupt)
        convert(REPOSITORY, tmp_path / "out", recipe="mixed-4-8", stream_from_hub=True)
    convert(REPOSITORY, tmp_path / "out", recipe="mixed-4-8", stream_from_hub=True)
    convert(sharded, tmp_path / "local", recipe="mixed-4-8")
    assert unpublished(tmp_path / "out") == unpublished(tmp_path / "local")


def test_the_command_streams_from_the_endpoint_of_the_environment(sharded: Path, tmp_path: Path, hub: MakeHub) -> None:
    fake = hub(sharded)
    environment = {"HF_ENDPOINT": fake.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = ["convert", "--hf-path", REPOSITORY, "--mlx-path", str(tmp_path / "out"), "--stream-from-hub"]
    done = subprocess.run(
        [sys.executable, "-m", "mlx_qwen", *command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "config.json").is_file()
    assert weight_bytes(tmp_path / "home") == 0


def test_a_folder_is_not_streamed(sharded: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="Leave --stream-from-hub out"):
        convert(sharded, tmp_path / "out", stream_from_hub=True)


def test_bits_that_depend_on_the_weights_cannot_be_streamed(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="Leave --stream-from-hub out"):
        convert(REPOSITORY, tmp_path / "out", stream_from_hub=True, target_size="1GB")


def test_a_damaged_header_on_the_hub_is_one_clear_error(
    checkpoint: CheckpointFactory, tmp_path: Path, hub: MakeHub
) -> None:
    source = shutil.copytree(checkpoint("dense"), tmp_path / "source")
    (source / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + bytes(1000))
    hub(source)
    with pytest.raises(CheckpointError, match="of someone/tiny cannot be read as safetensors"):
        convert(REPOSITORY, tmp_path / "out", stream_from_hub=True)
    assert not (tmp_path / "out.partial").exists()


def test_files_that_one_piece_needs_together_are_all_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / name for name in "abc"]
    monkeypatch.setattr(supply, "files_of", lambda piece: frozenset(files))

    class Copies:
        def download(self, name: str, folder: Path, stopped: object) -> None:
            (folder / name).touch()

    with Supply(Copies(), tmp_path, ["piece"]) as shards:  # type: ignore[arg-type, list-item]
        shards.wait("piece")  # type: ignore[arg-type]
        assert all(file.exists() for file in files)
        assert shards.done("piece")  # type: ignore[arg-type]
        shards.remove_finished()
        assert not any(file.exists() for file in files)
