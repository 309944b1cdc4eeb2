"""What PEFT trains and saves converts to a model with the logits that PEFT's own has.

PEFT is not needed for anything else, so these tests run where it is installed: `pip install --no-deps peft`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mlx_qwen.convert import convert
from tests.conftest import CheckpointFactory
from tests.support.checkpoints import reference_model
from tests.support.foreign import INPUT_IDS, Values, logits

peft: Any = pytest.importorskip("peft")

ATTENTION = ["q_proj", "k_proj", "o_proj", "in_proj_qkv", "in_proj_qkvz", "out_proj", "in_proj_a"]
PATTERNS = {"rank_pattern": {"q_proj": 2, r"layers\.1\..*": 3}, "alpha_pattern": {"layers.3.self_attn.k_proj": 5}}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ATTENTION, "lora_alpha": 7},
    "rank stabilized, with patterns": {"target_modules": ATTENTION, "use_rslora": True, **PATTERNS},
    "dora": {"target_modules": ATTENTION, "use_dora": True},
    "fan in, fan out": {"target_modules": ["q_proj"], "fan_in_fan_out": True},
    "ends": {"target_modules": ["embed_tokens", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head"]},
    "saved ends": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved norms": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "conv1d", "A_log"]},
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adapted(source: Path, folder: Path, settings: dict[str, Any]) -> Any:
    """PEFT's model of the checkpoint `source` with a random adapter, which is saved to `folder`."""
    torch.manual_seed(1)
    model = peft.get_peft_model(reference_model(source), peft.LoraConfig(r=4, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
            elif parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(str(folder))
    return model.eval()


def logits_of(model: nn.Module) -> Values:
    with torch.no_grad():
        found: Values = model(input_ids=torch.tensor(INPUT_IDS), use_cache=False).logits.numpy()
    return found


def assert_same(actual: Values, expected: Values) -> None:
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


def assert_converts(source: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    expected = logits_of(adapted(source, tmp_path / "adapter", settings))
    assert np.abs(expected - logits_of(reference_model(source))).max() > 0.01
    convert(source, tmp_path / "out", adapter_path=tmp_path / "adapter", quantize=False)
    assert_same(logits(tmp_path / "out"), expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_lora_is_merged_as_it_is_trained(
    case: str, tied: bool, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    assert_converts(checkpoint("dense", tied=tied), tmp_path, CASES[case])


@pytest.mark.parametrize("kind", ["moe", "dense_vl", "next"])
def test_every_kind_of_model_is_merged(kind: str, checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    assert_converts(checkpoint(kind), tmp_path, CASES["plain"])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["moe", "next"])
def test_factors_that_all_experts_share_are_merged(
    kind: str, fused: bool, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    settings = {"target_modules": ["q_proj"], "target_parameters": EXPERTS}
    assert_converts(checkpoint(kind, fused_experts=fused), tmp_path, settings)


@pytest.mark.parametrize("case", ["plain", "dora", "saved head", "ends"])
def test_a_model_saved_with_its_adapter_unmerged_is_merged(
    case: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = checkpoint("dense")
    model = adapted(source, tmp_path / "unmerged", CASES[case])
    (tmp_path / "unmerged" / "adapter_model.safetensors").unlink()
    save_whole(model, source, tmp_path / "unmerged")
    convert(tmp_path / "unmerged", tmp_path / "out", quantize=False)
    assert_same(logits(tmp_path / "out"), logits_of(model))


def save_whole(model: Any, source: Path, folder: Path) -> None:
    from safetensors.torch import save_file

    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
