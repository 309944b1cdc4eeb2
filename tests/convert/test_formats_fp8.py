"""FP8 checkpoints convert to what their weights and block scales stand for."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
import torch
from torch import Tensor

from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert
from mlx_qwen.convert.work import pieces
from mlx_qwen.errors import CheckpointError
from mlx_qwen.loading import load_model
from tests.conftest import CheckpointFactory
from tests.support.checkpoints import stored_tensors
from tests.support.foreign import (
    Encoder,
    Values,
    assert_reference_logits,
    edit_tensors,
    every_projection,
    foreign_checkpoint,
)
from tests.support.mlx_folders import digests, equal, expected_arrays, main_arrays

PROJECTION = "model.layers.0.mlp.up_proj"


def settings(*block: int) -> dict[str, object]:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
        "modules_to_not_convert": ["lm_head", "model.embed_tokens"],
    }


def in_blocks(rows: int, columns: int) -> Encoder:
    """e4m3 weights with one bf16 scale a block, which brings the block's largest value to 448."""

    def encode(weight: Tensor) -> tuple[dict[str, Tensor], Values]:
        N, K = weight.shape
        scales = torch.empty(-(-N // rows), -(-K // columns), dtype=torch.bfloat16)
        codes, values = torch.empty(N, K, dtype=torch.float8_e4m3fn), torch.empty(N, K)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                block = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
                scales[i, j] = weight[block].abs().max() / 400
                codes[block] = (weight[block] / scales[i, j].float()).to(torch.float8_e4m3fn)
                values[block] = codes[block].float() * scales[i, j].float()
        return {"weight": codes, "weight_scale_inv": scales}, values.numpy()

    return encode


@pytest.fixture
def folders(checkpoint: CheckpointFactory, tmp_path: Path) -> tuple[Path, Path]:
    """A small dense FP8 checkpoint that a test may damage, and what it stands for."""
    return foreign_checkpoint(checkpoint("dense"), tmp_path, settings(128, 128), in_blocks(128, 128))


@pytest.mark.parametrize("block", [(128, 128), (48, 40)])
@pytest.mark.parametrize("kind", ["dense", "moe_vl", "next"])
def test_dequantizing_fp8_gives_weight_times_block_scale_exactly(
    kind: str, block: tuple[int, int], checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = checkpoint(kind, with_mtp=True)
    foreign, plain = foreign_checkpoint(source, tmp_path, settings(*block), in_blocks(*block))
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    convert(plain, tmp_path / "expected", quantize=False, dtype="float32")
    assert "mtp.layers.0.mlp.up_proj.weight" not in main_arrays(tmp_path / "out")
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    assert [name for name in written if not equal(written[name], expected[name])] == []
    weights = ("model.safetensors", "mlx-qwen.safetensors", "config.json")
    out, plain_out = digests(tmp_path / "out"), digests(tmp_path / "expected")
    assert [out[name] for name in weights] == [plain_out[name] for name in weights]


@pytest.mark.parametrize("kind", ["dense", "moe", "moe_vl", "next"])
def test_fp8_converted_gives_the_logits_of_the_reference_with_its_values(
    kind: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    foreign, plain = foreign_checkpoint(checkpoint(kind), tmp_path, settings(128, 128), in_blocks(128, 128))
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    assert_reference_logits(tmp_path / "out", plain)


@pytest.mark.parametrize("exponents", [False, True])
def test_fp8_experts_in_one_tensor_are_read_too(exponents: bool, checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    foreign, plain = foreign_checkpoint(checkpoint("moe"), tmp_path, settings(48, 40), in_blocks(48, 40))

    def as_power_of_two(scales: Tensor) -> Tensor:
        return scales.float().log2().floor().exp2()

    def fuse(tensors: dict[str, Tensor], stored: bool) -> None:
        for mlp in {name.partition("experts.")[0] for name in tensors if ".mlp.experts." in name}:
            for fused, names in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
                experts = [
                    torch.cat([tensors.pop(f"{mlp}experts.{i}.{name}.weight").float() for name in names])
                    for i in range(8)
                ]
                encoded = [in_blocks(48, 40)(weight) for weight in experts]
                codes = torch.stack([parts["weight"] for parts, _ in encoded])
                scales = torch.stack([parts["weight_scale_inv"] for parts, _ in encoded])
                scales = as_power_of_two(scales) if exponents else scales
                rows, columns = codes.shape[1:]
                spread = scales.float().repeat_interleave(48, 1).repeat_interleave(40, 2)[:, :rows, :columns]
                tensors[f"{mlp}experts.{fused}"] = codes if stored else codes.float() * spread
                if stored:
                    kind = torch.float8_e8m0fnu if exponents else torch.bfloat16
                    tensors[f"{mlp}experts.{fused}_scale_inv"] = scales.to(kind)

    source = stored_tensors(checkpoint("moe"))
    experts = {name: tensor for name, tensor in source.items() if ".mlp.experts." in name}

    def swap(tensors: dict[str, Tensor], stored: bool) -> None:
        for name in [name for name in tensors if ".mlp.experts." in name]:
            del tensors[name]
        tensors.update(experts)
        fuse(tensors, stored)

    edit_tensors(foreign, lambda tensors: swap(tensors, True))
    edit_tensors(plain, lambda tensors: swap(tensors, False))
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    convert(plain, tmp_path / "expected", quantize=False, dtype="float32")
    assert digests(tmp_path / "out")["model.safetensors"] == digests(tmp_path / "expected")["model.safetensors"]


def test_fp8_packs_like_the_values_it_stands_for(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="packed again"):
        report = convert(folders[0], tmp_path / "out")
    convert(folders[1], tmp_path / "expected")
    out, expected = main_arrays(tmp_path / "out"), main_arrays(tmp_path / "expected")
    assert report.kept_codes == ()
    assert out.keys() == expected.keys()
    assert [name for name in out if not mx.array_equal(out[name], expected[name])] == []


def test_pieces_that_begin_inside_a_block_change_nothing(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(folders[0], tmp_path / "whole", dequantize=True)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 5000)
    convert(folders[0], tmp_path / "pieces", dequantize=True)
    assert digests(tmp_path / "pieces") == digests(tmp_path / "whole")


def test_modules_left_out_of_fp8_stay_as_they_are(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = checkpoint("dense", dtype="bfloat16")
    foreign, _ = foreign_checkpoint(
        source,
        tmp_path,
        settings(128, 128),
        in_blocks(128, 128),
        chosen=lambda name: every_projection(name) and "layers.1." not in name,
    )
    report = convert(foreign, tmp_path / "out", dequantize=True)
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(source)
    untouched = [name for name in written if "layers.1.mlp" in name or "embed" in name or "in_proj_a" in name]
    assert report.dtype == "bfloat16"
    assert len(untouched) > 5
    assert all(equal(written[name], expected[name]) for name in untouched)


def test_the_dtype_is_that_of_what_fp8_leaves_out(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = checkpoint("moe", dtype="bfloat16")
    foreign, _ = foreign_checkpoint(source, tmp_path, settings(128, 128), in_blocks(128, 128))
    assert convert(foreign, tmp_path / "out", dequantize=True, dry_run=True).dtype == "bfloat16"


def test_every_fp8_number_means_what_torch_reads(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = codes[~codes.float().isnan()]
    weight = finite[torch.arange(128 * 64) % finite.numel()].reshape(128, 64)
    foreign, _ = foreign_checkpoint(checkpoint("dense"), tmp_path, settings(128, 128), in_blocks(128, 128))
    edit_tensors(foreign, lambda tensors: tensors.update({f"{PROJECTION}.weight": weight}))
    edit_tensors(foreign, lambda tensors: tensors[f"{PROJECTION}.weight_scale_inv"].fill_(0.5))
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    assert equal(main_arrays(tmp_path / "out")[f"language_model.{PROJECTION}.weight"], weight.float() / 2)


def test_scales_of_the_wrong_shape_are_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    edit_tensors(folders[0], lambda tensors: tensors.update({f"{PROJECTION}.weight_scale_inv": torch.ones(3, 1)}))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_scale_inv .* \[3, 1\], expected \[1, 1\]"):
        convert(folders[0], tmp_path / "out", dequantize=True)


def test_missing_scales_are_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    edit_tensors(folders[0], lambda tensors: tensors.pop(f"{PROJECTION}.weight_scale_inv"))
    with pytest.raises(CheckpointError, match=r"without .*up_proj\.weight_scale_inv"):
        convert(folders[0], tmp_path / "out")


def test_an_unknown_method_names_the_known_ones(folders: tuple[Path, Path], tmp_path: Path) -> None:
    config = json.loads((folders[0] / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "hqq"
    (folders[0] / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"'hqq', which is not read here. Expected one of fp8"):
        convert(folders[0], tmp_path / "out")


def test_a_config_that_promises_fp8_over_plain_weights_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (folders[1] / "config.json").write_text((folders[0] / "config.json").read_text())
    with pytest.raises(CheckpointError, match="'fp8', but no tensor is"):
        convert(folders[1], tmp_path / "out")


def test_loading_fp8_says_how_to_convert_it(folders: tuple[Path, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"quantized with 'fp8'.* mlx-qwen convert --model"):
        load_model(folders[0], ModelConfig.from_directory(folders[0]))
