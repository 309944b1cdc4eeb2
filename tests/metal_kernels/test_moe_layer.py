"""A whole sparse layer, through kernels and through the reference, against transformers' own."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeSparseMoeBlock

from metal_kernels import reset_stats, stats
from mlx_qwen.config import MoEConfig
from mlx_qwen.model.mlp import MLP, SparseMoE
from tests.metal_emulator import emulated
from tests.metal_kernels.moe_layers import normal, relative_error

HIDDEN, NUM_EXPERTS, CHOSEN, INNER, SHARED_INNER = 64, 12, 3, 48, 80


@pytest.fixture(autouse=True)
def _fresh_counts():
    reset_stats()


@pytest.fixture(scope="module")
def transformers_block():
    torch.manual_seed(0)
    config = Qwen3_5MoeTextConfig(
        hidden_size=HIDDEN,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=CHOSEN,
        moe_intermediate_size=INNER,
        shared_expert_intermediate_size=SHARED_INNER,
    )
    block = Qwen3_5MoeSparseMoeBlock(config).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return block


@pytest.fixture(scope="module")
def layer(transformers_block):
    """Ours with the same weights."""
    weights = {name: mx.array(tensor.numpy()) for name, tensor in transformers_block.state_dict().items()}
    layer = SparseMoE(HIDDEN, MoEConfig(NUM_EXPERTS, CHOSEN, INNER, SHARED_INNER, norm_topk_prob=True))
    layer.router.parts[0].weight = mx.concatenate([weights["gate.weight"], weights["shared_expert_gate.weight"]])
    layer.switch_mlp.gate_up_proj.weight = weights["experts.gate_up_proj"]
    layer.switch_mlp.down_proj.weight = weights["experts.down_proj"]
    shared = [weights[f"shared_expert.{name}_proj.weight"] for name in ("gate", "up")]
    layer.shared_expert.gate_up_proj.parts[0].weight = mx.concatenate(shared)
    layer.shared_expert.down_proj.weight = weights["shared_expert.down_proj.weight"]
    return layer


def expected(block, x):
    with torch.no_grad():
        return block(torch.from_numpy(np.array(x))).double().numpy()


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1, 16), (1, 17), (3, 30)])
def test_layer_of_the_reference_equals_transformers(monkeypatch, transformers_block, layer, shape):
    monkeypatch.setenv("MLX_QWEN_KERNELS", "reference")
    x = normal(*shape, HIDDEN)
    assert relative_error(layer(x), expected(transformers_block, x)) < 2e-6


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1, 16), (1, 17), (3, 30)])
def test_layer_of_kernels_equals_transformers(monkeypatch, transformers_block, layer, shape):
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    x = normal(*shape, HIDDEN)
    with emulated() as report:
        assert relative_error(layer(x), expected(transformers_block, x)) < 2e-6
    assert all(not calls.reference for calls in stats().values())
    few = shape[0] * shape[1] <= 16
    assert [launch.kernel.removeprefix("mlx_qwen_") for launch in report.launches] == (
        ["routed_gate_up", "expert_down_combine"]
        if few
        else ["route", "sort_by_expert", "swiglu_rows", "swiglu_rows", "combine"]
    )


def test_kernels_run_in_the_order_of_the_batch(monkeypatch, layer):
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    x = normal(2, 4, HIDDEN)
    with emulated():
        together = layer(x)
        for i in range(2):
            for t in range(4):
                assert mx.allclose(layer(x[i : i + 1, t : t + 1]), together[i : i + 1, t : t + 1], rtol=1e-5, atol=1e-6)


def test_the_activation_of_a_dense_layer_is_one_launch(monkeypatch):
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    mlp, x = MLP(32, 48), normal(2, 3, 32)
    with emulated() as report:
        found = mlp(x)
    monkeypatch.setenv("MLX_QWEN_KERNELS", "reference")
    assert mx.allclose(found, mlp(x), rtol=1e-5, atol=1e-6)
    assert report.count() == report.count("mlx_qwen_swiglu_rows") == 1
