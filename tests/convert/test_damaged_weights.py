"""Weights that are NaN or infinite where they are stored show a damaged file, of which nothing is converted."""

import re
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
import torch
from torch import Tensor

from mlx_qwen import load
from mlx_qwen.checkpoint.layout import Mode
from mlx_qwen.convert import convert, describe
from mlx_qwen.convert.settings import DType
from mlx_qwen.convert.work import calibration
from mlx_qwen.errors import ConversionError, MLXQwenError
from tests.conftest import CheckpointFactory
from tests.support.foreign import edit_tensors, foreign_checkpoint
from tests.support.hub import REPOSITORY, MakeHub
from tests.support.mlx_folders import digests
from tests.support.tokenizers import add_tokenizer

PROJECTION = "model.layers.{}.mlp.up_proj.weight"
WORDS = "what is the answer and which tool is the one you talk of to the user " * 20


@pytest.fixture
def source(checkpoint: CheckpointFactory, tmp_path: Path) -> Path:
    """A dense fp32 checkpoint that a test may damage."""
    return shutil.copytree(checkpoint("dense"), tmp_path / "source")


def spoil(folder: Path, *names: str, value: float = float("nan")) -> Path:
    """Put `value` into the middle of each named tensor."""

    def put(tensors: dict[str, Tensor]) -> None:
        for name in names:
            tensors[name].view(-1)[tensors[name].numel() // 2] = value

    edit_tensors(folder, put)
    return folder


def assert_nothing_loads(folder: Path) -> None:
    assert not (folder / "out").exists()
    for left in (folder / "out.partial").rglob("*"):
        if left.is_dir():
            with pytest.raises(MLXQwenError):
                load(left)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_that_are_not_finite_are_refused_by_name(
    value: float, dtype: DType, source: Path, tmp_path: Path
) -> None:
    def narrow(tensors: dict[str, Tensor]) -> None:
        tensors[PROJECTION.format(2)] = tensors[PROJECTION.format(2)].to(getattr(torch, dtype))

    edit_tensors(source, narrow)
    spoil(source, PROJECTION.format(2), value=value)
    told = r"model\.safetensors is damaged: .* in language_model\.model\.layers\.2\.mlp\.up_proj\.weight\..* again"
    with pytest.raises(ConversionError, match=told):
        convert(source, tmp_path / "out", dtype=dtype)
    assert_nothing_loads(tmp_path)


@pytest.mark.parametrize(
    "options",
    [{"quantize": False}, {"bits": 8}, {"bits": 4, "quantizer": "rtn"}, {"mode": "mxfp4"}, {"dtype": "float16"}],
)
def test_whatever_is_made_of_the_weights(options: dict[str, object], source: Path, tmp_path: Path) -> None:
    spoil(source, PROJECTION.format(1))
    with pytest.raises(ConversionError, match=r"damaged: .*layers\.1\.mlp\.up_proj"):
        convert(source, tmp_path / "out", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.0.linear_attn.dt_bias"])
def test_whatever_tensor_it_is(name: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=rf"damaged: .*{name}"):
        convert(spoil(source, name), tmp_path / "out")


def test_five_tensors_are_named_and_that_there_are_more(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError) as caught:
        convert(spoil(source, *(PROJECTION.format(i) for i in range(4))), tmp_path / "out", recipe="mixed-4-8")
    assert str(caught.value).count("up_proj") == 4
    assert "and more" not in str(caught.value)
    spoil(source, *(PROJECTION.format(i).replace("up", "gate") for i in range(4)))
    with pytest.raises(ConversionError) as caught, pytest.warns(UserWarning, match="starts afresh"):
        convert(source, tmp_path / "out", recipe="mixed-4-8")
    assert str(caught.value).count("_proj.weight") == 5
    assert "and more" in str(caught.value)


def test_the_shard_that_is_damaged_is_named(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint("dense", shard_size="200KB"), tmp_path / "source")
    shard = sorted(source.glob("*.safetensors"))[2]
    stored = mx.load(str(shard))
    assert isinstance(stored, dict)
    mx.save_safetensors(str(shard), {name: array * mx.nan for name, array in stored.items()})
    with pytest.raises(ConversionError, match=rf"^{shard.name} is damaged: "):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4"])
def test_scales_of_packed_weights_count_too(mode: Mode, checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    convert(checkpoint("dense"), tmp_path / "packed", mode=mode)
    file = tmp_path / "packed" / "model.safetensors"
    stored = mx.load(str(file))
    assert isinstance(stored, dict)
    scales = "language_model.model.layers.1.mlp.up_proj.scales"
    stored[scales][0, 0] = mx.nan if mode == "affine" else 255
    mx.save_safetensors(str(file), stored)
    for dequantize in (False, True):
        with pytest.raises(ConversionError, match=r"damaged: .*layers\.1\.mlp\.up_proj"):
            convert(tmp_path / "packed", tmp_path / f"out-{dequantize}", dequantize=dequantize)


@pytest.mark.filterwarnings("ignore:.*packed again")
def test_weights_in_fp8_count_by_what_they_stand_for(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    def encode(weight: Tensor) -> tuple[dict[str, Tensor], object]:
        return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1)}, weight.numpy()

    settings: dict[str, object] = {"quant_method": "fp8", "weight_block_size": None}
    foreign, _ = foreign_checkpoint(checkpoint("dense"), tmp_path, settings, encode)  # type: ignore[arg-type]
    edit_tensors(foreign, lambda tensors: tensors[PROJECTION.format(1)].view(torch.uint8)[3].fill_(0xFF))  # type: ignore[arg-type]
    with pytest.raises(ConversionError, match=r"damaged: .*layers\.1\.mlp\.up_proj"):
        convert(foreign, tmp_path / "out")


@pytest.mark.parametrize("name", [PROJECTION.format(2), "model.embed_tokens.weight"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_calibration_meets_no_damaged_weight(
    name: str, tied: bool, checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed: list[int] = []

    class Watched(calibration.StreamedLayer):
        def __init__(self, model: calibration.LayerwiseModel, index: int) -> None:
            observed.append(index)
            super().__init__(model, index)

    monkeypatch.setattr(calibration, "StreamedLayer", Watched)
    (tmp_path / "text.txt").write_text(WORDS)
    source = add_tokenizer(shutil.copytree(checkpoint("dense", tied=tied), tmp_path / "source"))
    with pytest.raises(ConversionError, match=rf"damaged: .*{name}\."):
        convert(spoil(source, name), tmp_path / "out", recipe="mixed-4-8", calibration=tmp_path / "text.txt")
    # Layers before the damaged one run as they are stored and as they are written.
    assert set(observed) == ({0, 1} if name == PROJECTION.format(2) else set())


@pytest.mark.parametrize("calibration", [None, "text.txt"])
def test_bits_are_not_chosen_by_damaged_weights(calibration: str | None, source: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(WORDS)
    add_tokenizer(source)
    stored = PROJECTION.format(2)
    edit_tensors(source, lambda tensors: tensors[stored].fill_(float("nan")))  # type: ignore[arg-type]
    text = None if calibration is None else tmp_path / calibration
    with pytest.raises(ConversionError, match=r"damaged: .*layers\.2\.mlp\.up_proj"):
        describe(source, target_size="10MB", calibration=text)


def test_a_damaged_shard_of_the_hub_is_downloaded_again_by_the_same_command(
    sharded: Path, tmp_path: Path, hub: MakeHub
) -> None:
    source = shutil.copytree(sharded, tmp_path / "source")
    shard = sorted(source.glob("*.safetensors"))[2]
    stored = mx.load(str(shard))
    assert isinstance(stored, dict)
    mx.save_safetensors(str(shard), {name: array * mx.nan for name, array in stored.items()})
    hub(source)
    with pytest.raises(ConversionError, match=rf"{shard.name}.* damaged.* same command again, which downloads"):
        convert(REPOSITORY, tmp_path / "out", stream_from_hub=True)
    assert not (tmp_path / "out.partial" / "downloads" / shard.name).exists()
    assert_nothing_loads(tmp_path)


def test_a_damaged_shard_in_the_cache_is_downloaded_again_once_it_is_removed_as_told(
    sharded: Path, tmp_path: Path, hub: MakeHub
) -> None:
    hub(sharded)
    convert(REPOSITORY, tmp_path / "whole", recipe="mixed-4-8")
    shard = sorted((tmp_path / "cache").rglob("*.safetensors"))[2]
    stored = mx.load(str(shard))
    assert isinstance(stored, dict)
    mx.save_safetensors(str(tmp_path / "nan.safetensors"), {name: array * mx.nan for name, array in stored.items()})
    shutil.copyfile(tmp_path / "nan.safetensors", shard)
    with pytest.raises(ConversionError, match=rf"{shard.name} is damaged") as caught:
        convert(REPOSITORY, tmp_path / "out", recipe="mixed-4-8")
    told = re.search(r"Remove (\S+), and then give the same command", str(caught.value))
    assert told is not None
    Path(told[1]).unlink()
    with pytest.warns(UserWarning, match="starts afresh"):
        convert(REPOSITORY, tmp_path / "out", recipe="mixed-4-8")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
