"""Adapters are merged by their published definitions while a checkpoint is converted, or refused."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model as load_with_mlx_lm
from safetensors.torch import save_file
from torch import Tensor

from mlx_qwen.cli import main
from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import compare, convert, describe
from mlx_qwen.convert.work import pieces
from mlx_qwen.errors import CheckpointError, MLXQwenError
from mlx_qwen.loading import load_model
from tests.conftest import CheckpointFactory
from tests.convert.conftest import Interrupt
from tests.support.checkpoints import stored_tensors
from tests.support.foreign import INPUT_IDS, edit_tensors, foreign_checkpoint, logits
from tests.support.hub import REPOSITORY, MakeHub
from tests.support.integer_codes import symmetric_gptq
from tests.support.mlx_folders import dequantized, digests, equal, expected_arrays, main_arrays

LAYER = "language_model.model.layers.0"
MODULES = ("linear_attn.in_proj_qkv", "linear_attn.out_proj", "mlp.down_proj")
SETTINGS = {"peft_type": "LORA", "r": 4, "lora_alpha": 6}

Tensors = dict[str, Tensor]


def random_adapter(source: Path, *, rank: int = 4, dtype: torch.dtype = torch.float32) -> Tensors:
    """Factors for three matrices of the first layer, under PEFT's names."""
    generator = torch.Generator().manual_seed(3)
    adapter: Tensors = {}
    for name, weight in stored_tensors(source).items():
        if "layers.0." in name and name.removesuffix(".weight").endswith(MODULES):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            adapter[f"{module}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator).to(dtype)
            adapter[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator).to(dtype)
    return adapter


def written(folder: Path, tensors: Tensors, settings: dict[str, object] | None = None) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**SETTINGS, **(settings or {})}))
    return folder


def product(adapter: Tensors, module: str) -> Tensor:
    """B · A of the module, in fp32."""
    a, b = (next(t for n, t in adapter.items() if n.endswith(f"{module}.lora_{part}.weight")) for part in "AB")
    return b.float() @ a.float()


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 6 / 4),
        ({"use_rslora": True}, 6 / math.sqrt(4)),
        ({"lora_alpha": 5, "alpha_pattern": {r"layers\.0\..*": 3}}, 3 / 4),
        ({"r": 2, "rank_pattern": {"linear_attn.*": 4, "down_proj": 4}}, 6 / 4),
        ({"init_lora_weights": "gaussian", "lora_dropout": 0.1, "target_modules": ["q_proj"], "bias": "none"}, 6 / 4),
    ],
)
def test_a_matrix_becomes_itself_and_the_scaled_product_of_its_factors(
    settings: dict[str, object], scale: float, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = checkpoint("dense")
    adapter = random_adapter(source)
    convert(source, tmp_path / "out", adapter_path=written(tmp_path / "a", adapter, settings), quantize=False)
    expected, actual = expected_arrays(source), main_arrays(tmp_path / "out")
    for module in MODULES:
        name = f"{LAYER}.{module}.weight"
        merged = expected.pop(name) + scale * product(adapter, module)
        assert np.abs(np.array(actual.pop(name)) - merged.numpy()).max() < 1e-5
    assert all(equal(array, expected[name]) for name, array in actual.items() if name in expected)


def test_dora_gives_each_row_its_length(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source, lengths = checkpoint("dense"), {}
    adapter = random_adapter(source)
    for name in list(adapter):
        if name.endswith("lora_B.weight"):
            lengths[name] = torch.rand(adapter[name].shape[0]) + 0.5
            adapter[name.replace("lora_B.weight", "lora_magnitude_vector")] = lengths[name]
    folder = written(tmp_path / "a", adapter, {"use_dora": True})
    convert(source, tmp_path / "out", adapter_path=folder, quantize=False)
    for module in MODULES:
        merged = expected_arrays(source)[f"{LAYER}.{module}.weight"] + 1.5 * product(adapter, module)
        length = next(value for name, value in lengths.items() if f"{module}.lora_B" in name)
        expected = merged / merged.norm(dim=1, keepdim=True) * length[:, None]
        actual = np.array(main_arrays(tmp_path / "out")[f"{LAYER}.{module}.weight"])
        assert np.abs(actual - expected.numpy()).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_merged_in_fp32_and_rounded_once(
    dtype: torch.dtype, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = checkpoint("dense", dtype="bfloat16")
    adapter = random_adapter(source, dtype=dtype)
    convert(source, tmp_path / "out", adapter_path=written(tmp_path / "a", adapter), quantize=False)
    actual = main_arrays(tmp_path / "out")
    for module in MODULES:
        merged = expected_arrays(source)[f"{LAYER}.{module}.weight"].float() + 1.5 * product(adapter, module)
        name = f"{LAYER}.{module}.weight"
        assert actual[name].dtype == mx.bfloat16
        stored = torch.from_numpy(np.array(actual[name].astype(mx.float32)))
        # Half a step of bf16 from the exact sum; a sum in bf16 would be up to two off.
        assert bool(((stored - merged).abs() <= merged.abs() * 2**-8 * 1.001).all())


def test_pieces_smaller_than_a_matrix_merge_to_the_same_files(
    checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("moe", fused_experts=True)
    folder = written(tmp_path / "a", of_all_experts(source) | random_adapter(source))
    convert(source, tmp_path / "whole", adapter_path=folder, recipe="4bit")
    monkeypatch.setattr(pieces, "PIECE_BYTES", 3000)
    convert(source, tmp_path / "cut", adapter_path=folder, recipe="4bit")
    assert digests(tmp_path / "whole") == digests(tmp_path / "cut")


def of_all_experts(source: Path) -> Tensors:
    """Factors that the eight experts of layer 0 share, as PEFT nests them: of `down_proj` outside of `gate_up_proj`."""
    name = next(name for name in stored_tensors(source) if "layers.0.mlp.experts" in name)
    module = f"base_model.model.{name.partition('.experts.')[0]}.experts"
    inner, outer = f"{module}.base_layer", module
    return {
        f"{inner}.lora_A.weight": torch.randn(4 * 8, 64),
        f"{inner}.lora_B.weight": torch.randn(2 * 64, 4 * 8),
        f"{outer}.lora_A.weight": torch.randn(4 * 8, 64),
        f"{outer}.lora_B.weight": torch.randn(64, 4 * 8),
    }


@pytest.mark.parametrize("fused", [False, True])
def test_experts_get_what_is_theirs_of_shared_factors(
    fused: bool, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = checkpoint("moe", fused_experts=fused)
    adapter = of_all_experts(source)
    convert(source, tmp_path / "out", adapter_path=written(tmp_path / "a", adapter), quantize=False)
    up_a, up_b, down_a, down_b = adapter.values()
    changes = {
        "gate_proj": torch.einsum("ore,eri->eoi", up_b.reshape(128, 4, 8), up_a.reshape(8, 4, 64))[:, :64],
        "up_proj": torch.einsum("ore,eri->eoi", up_b.reshape(128, 4, 8), up_a.reshape(8, 4, 64))[:, 64:],
        "down_proj": torch.einsum("ore,eri->eoi", down_b.reshape(64, 4, 8), down_a.reshape(8, 4, 64)),
    }
    for projection, change in changes.items():
        name = f"{LAYER}.mlp.switch_mlp.{projection}.weight"
        expected = expected_arrays(source)[name] + 1.5 * change
        assert np.abs(np.array(main_arrays(tmp_path / "out")[name]) - expected.numpy()).max() < 1e-4


def test_single_experts_are_changed_alone(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = checkpoint("moe", fused_experts=True)
    module = "base_model.model.model.layers.0.mlp.experts.5.up_proj"
    adapter = {f"{module}.lora_A.weight": torch.randn(4, 64), f"{module}.lora_B.weight": torch.randn(64, 4)}
    convert(source, tmp_path / "out", adapter_path=written(tmp_path / "a", adapter), quantize=False)
    name = f"{LAYER}.mlp.switch_mlp.up_proj.weight"
    expected = expected_arrays(source)[name].clone()
    expected[5] += 1.5 * product(adapter, "up_proj")
    assert np.abs(np.array(main_arrays(tmp_path / "out")[name]) - expected.numpy()).max() < 1e-5


def test_packed_sources_are_unpacked_where_they_are_changed(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = checkpoint("dense")
    adapter = random_adapter(source)
    convert(source, tmp_path / "packed", recipe="4bit", dtype="float32")
    folder = written(tmp_path / "a", adapter)
    convert(tmp_path / "packed", tmp_path / "out", adapter_path=folder, dequantize=True)
    packed, actual = main_arrays(tmp_path / "packed"), main_arrays(tmp_path / "out")
    for module in MODULES:
        name = f"{LAYER}.{module}.weight"
        expected = np.array(dequantized(packed, name, 4)) + 1.5 * product(adapter, module).numpy()
        assert np.abs(np.array(actual[name]) - expected).max() < 1e-5


def test_codes_of_other_runtimes_are_kept_only_where_nothing_changes(
    checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    source, plain = foreign_checkpoint(checkpoint("dense"), tmp_path / "made", settings, symmetric_gptq)
    adapter = random_adapter(plain)
    report = convert(source, tmp_path / "out", adapter_path=written(tmp_path / "a", adapter), dtype="float32")
    changed = {f"{LAYER}.{module}.weight" for module in MODULES}
    assert report.kept_codes and not changed & {*report.kept_codes}
    convert(source, tmp_path / "dense", adapter_path=tmp_path / "a", quantize=False, dtype="float32")
    for module in MODULES:
        name = f"{LAYER}.{module}.weight"
        expected = expected_arrays(plain)[name] + 1.5 * product(adapter, module)
        assert np.abs(np.array(main_arrays(tmp_path / "dense")[name]) - expected.numpy()).max() < 1e-5


@pytest.mark.parametrize("way", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["dense", "moe", "next"])
def test_adapters_of_mlx_lm_are_merged_as_it_runs_them(
    kind: str, way: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source, base = checkpoint(kind), tmp_path / "base"
    convert(source, base, quantize=False)
    keys = ["self_attn.q_proj", "linear_attn.out_proj", "mlp.gate", "mlp.shared_expert.up_proj"]
    keys += ["mlp.switch_mlp.up_proj", "mlp.switch_mlp.down_proj"] if way == "lora" else []
    settings = {"rank": 4, "scale": 3.0, "dropout": 0.0, "keys": keys}
    model, _ = load_with_mlx_lm(base)
    linear_to_lora_layers(model, 4, settings, use_dora=way == "dora")
    trained = [(n, x) for n, x in tree_flatten(model.parameters()) if n.endswith((".lora_a", ".lora_b", ".m"))]
    mx.random.seed(2)
    tensors = {name: array + 0.2 * mx.random.normal(array.shape) for name, array in trained}
    folder = tmp_path / "a"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    config = {"fine_tune_type": way, "num_layers": 4, "lora_parameters": settings, "model": "someone/tiny"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    expected = np.array(load_adapters(load_with_mlx_lm(base)[0], str(folder))(mx.array(INPUT_IDS)))
    convert(source, tmp_path / "out", adapter_path=folder, quantize=False)
    assert np.abs(logits(tmp_path / "out") - expected).max() <= 1e-3 * np.abs(expected).max()
    assert np.abs(logits(source) - expected).max() > 0.02 * np.abs(expected).max()


def no_factor(adapter: Tensors) -> Tensors:
    return {name: tensor for name, tensor in adapter.items() if not name.endswith("out_proj.lora_B.weight")}


def of_another_model(adapter: Tensors) -> Tensors:
    return {name.replace("layers.0", "layers.40"): tensor for name, tensor in adapter.items()}


def wider(adapter: Tensors) -> Tensors:
    return {name: torch.cat([tensor, tensor], 1) if "A" in name else tensor for name, tensor in adapter.items()}


def not_finite(adapter: Tensors) -> Tensors:
    return {name: tensor.index_fill(0, torch.tensor([1]), math.nan) for name, tensor in adapter.items()}


def with_bias(adapter: Tensors) -> Tensors:
    return adapter | {"base_model.model.model.layers.0.linear_attn.out_proj.lora_B.bias": torch.ones(64)}


@pytest.mark.parametrize(
    ("settings", "change", "words"),
    [
        ({"peft_type": "LOHA"}, None, "peft_type 'LOHA'.*merge_and_unload"),
        ({"init_lora_weights": "pissa"}, None, "'pissa', which changes the model's own weights"),
        ({"layer_replication": [[0, 2], [1, 3]]}, None, "layer_replication.*merge_and_unload"),
        ({"r": 8}, None, "factors of rank 4, adapter_config.json says 8"),
        ({"r": "4"}, None, "adapter_config.json.r is '4'"),
        ({"lora_alpha": [6]}, None, r"lora_alpha is \[6\]"),
        ({"rank_pattern": {"(": 4}}, None, "no regular expression"),
        ({"alpha_pattern": 4}, None, "alpha_pattern is 4, expected an object"),
        ({}, no_factor, "out_proj.lora_A.weight.*expected two matrices of floats, lora_A and lora_B"),
        ({}, of_another_model, "changes 3 tensors that the model does not have.*layers.40"),
        ({}, wider, r"changes a matrix .* expected .* The adapter belongs to another model"),
        ({}, with_bias, "1 tensors that the model does not have.*lora_B.bias"),
        ({}, not_finite, "adapter_model.safetensors is damaged.*Download the adapter again"),
        ({"lora_parameters": {"rank": 4}}, None, "no adapters.safetensors"),
    ],
)
def test_what_is_not_merged_rightly_is_refused(
    settings: dict[str, object],
    change: Callable[[Tensors], Tensors] | None,
    words: str,
    checkpoint: CheckpointFactory,
    tmp_path: Path,
) -> None:
    source = checkpoint("dense")
    adapter = random_adapter(source)
    folder = written(tmp_path / "a", adapter if change is None else change(adapter), settings)
    with pytest.raises(MLXQwenError, match=words):
        convert(source, tmp_path / "out", adapter_path=folder, recipe="4bit")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_an_adapter_says_what_was_expected(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json\. Expected a folder as PEFT or mlx-lm"):
        convert(checkpoint("dense"), tmp_path / "out", adapter_path=checkpoint("dense"))


def unmerged(source: Path, folder: Path, adapter: Tensors, *names: str) -> Path:
    """A copy of `source` that was saved with its adapter in it, under each of `names`."""
    shutil.copytree(source, folder)

    def wrap(tensors: Tensors) -> None:
        for name, tensor in adapter.items():
            own = name.removeprefix("base_model.model.")
            base = own.rpartition(".lora_")[0]
            if f"{base}.weight" in tensors:
                tensors[f"{base}.base_layer.weight"] = tensors.pop(f"{base}.weight")
            for each in names:
                tensors[f"{own.removesuffix('.weight')}.{each}.weight"] = tensor.clone()

    edit_tensors(folder, wrap)
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS))
    return folder


def test_an_adapter_within_the_model_is_merged_as_one_beside_it(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = checkpoint("dense")
    adapter = random_adapter(source)
    convert(source, tmp_path / "beside", adapter_path=written(tmp_path / "a", adapter), recipe="4bit")
    convert(unmerged(source, tmp_path / "source", adapter, "default"), tmp_path / "within", recipe="4bit")
    weights = "model.safetensors"
    assert (tmp_path / "beside" / weights).read_bytes() == (tmp_path / "within" / weights).read_bytes()
    assert not (tmp_path / "within" / "adapter_config.json").exists()


def test_of_several_adapters_within_a_model_none_is_guessed(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = unmerged(checkpoint("dense"), tmp_path / "source", random_adapter(checkpoint("dense")), "chat", "code")
    with pytest.raises(CheckpointError, match="several adapters, chat, code"):
        convert(source, tmp_path / "out")


def test_an_adapter_beside_a_whole_model_is_spoken_of(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint("dense"), tmp_path / "source")
    adapter = random_adapter(source)
    convert(source, tmp_path / "without", quantize=False)
    shutil.copytree(written(tmp_path / "a", adapter), source, dirs_exist_ok=True)
    with pytest.warns(UserWarning, match=r"an adapter beside the model, which is left out.*--adapter-path"):
        convert(source, tmp_path / "out", quantize=False)
    assert digests(tmp_path / "out") == digests(tmp_path / "without")
    with pytest.warns(UserWarning, match="an adapter beside the model"):
        load_model(source, ModelConfig.from_directory(source))
    convert(source, tmp_path / "merged", adapter_path=source, quantize=False)
    assert digests(tmp_path / "merged") != digests(tmp_path / "without")


def test_a_conversion_goes_on_only_with_the_same_adapter(
    checkpoint: CheckpointFactory, tmp_path: Path, interrupt_after: Interrupt
) -> None:
    source = checkpoint("dense")
    adapter = random_adapter(source)
    folder = written(tmp_path / "a", adapter)
    interrupt_after(20)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", adapter_path=folder, recipe="4bit")
    interrupt_after(0)
    shutil.rmtree(folder)
    written(
        folder,
        {name: -tensor for name, tensor in adapter.items() if "lora_A" in name}
        | {name: tensor for name, tensor in adapter.items() if "lora_B" in name},
    )
    with pytest.warns(UserWarning, match="start"):
        convert(source, tmp_path / "out", adapter_path=folder, recipe="4bit")
    convert(source, tmp_path / "fresh", adapter_path=folder, recipe="4bit")
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


def test_shards_stream_from_the_hub_while_the_adapter_is_merged(sharded: Path, tmp_path: Path, hub: MakeHub) -> None:
    folder = written(tmp_path / "a", random_adapter(sharded))
    convert(sharded, tmp_path / "local", recipe="mixed-4-8", adapter_path=folder)
    hub(sharded)
    convert(REPOSITORY, tmp_path / "streamed", recipe="mixed-4-8", adapter_path=folder, stream_from_hub=True)
    for file in (tmp_path / "local").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "streamed" / file.name).read_bytes()


def test_a_merged_conversion_is_compared_with_the_merged_source(chat_folder: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / "a", random_adapter(chat_folder))
    text = tmp_path / "text.txt"
    text.write_text("A short text of some words. " * 8)
    report = convert(chat_folder, tmp_path / "out", adapter_path=folder, quantize=False, verify=True, verify_text=text)
    assert report.quality is not None
    assert report.quality.mean_divergence < 1e-5
    assert compare(chat_folder, tmp_path / "out", tokens=64).mean_divergence > 1e-3
    assert "the adapter a, merged" in (tmp_path / "out" / "README.md").read_text()


def test_the_command_merges_and_says_so(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    folder = written(tmp_path / "a", random_adapter(checkpoint("dense")))
    words = ["convert", "--hf-path", str(checkpoint("dense")), "--mlx-path", str(tmp_path / "out"), "--dry-run"]
    result = CliRunner().invoke(main, [*words, "--adapter-path", str(folder)])
    assert result.exit_code == 0, result.output
    assert "The adapter a is merged, which changes 3 tensors." in result.output
    assert describe(checkpoint("dense"), adapter_path=folder).remarks
