"""Observers see what enters every matrix of a layer: the same rows that enter transformers' modules."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mlx_qwen.checkpoint.names import Role
from mlx_qwen.convert.layerwise import LinearInput, open_layerwise
from tests.conftest import CheckpointFactory
from tests.support.checkpoints import reference_model

IDS = np.random.default_rng(1).integers(0, 320, (2, 19))
_MATRICES = (Role.LINEAR, Role.EXPERT, Role.ROUTER, Role.GATE_INPUT)


def observe(folder: Path) -> dict[str, LinearInput]:
    """The input of every matrix of every layer, by tensor name."""
    seen: dict[str, LinearInput] = {}
    with open_layerwise(folder, dtype=mx.float32) as model:
        hidden = model.embed(mx.array(IDS))
        for layer in model.layers():
            hidden = layer(hidden, lambda shown: seen.update(dict.fromkeys(shown.names, shown)))
    return seen


@contextmanager
def hooked(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, ...]]]:
    """The arguments of every module that runs within, by module name."""
    seen: dict[str, tuple[Tensor, ...]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, arguments, name=name: seen.__setitem__(name, arguments))
        for name, module in model.named_modules()
    ]
    yield seen
    for handle in handles:
        handle.remove()


def torch_inputs(folder: Path) -> dict[str, tuple[Tensor, ...]]:
    model = reference_model(folder)
    with hooked(model) as seen, torch.no_grad():
        model(input_ids=torch.from_numpy(IDS), use_cache=False)
    return seen


def assert_same_rows(actual: mx.array, expected: Tensor) -> None:
    rows = expected.reshape(-1, expected.shape[-1]).numpy()
    assert actual.shape == rows.shape
    assert np.abs(np.array(actual) - rows).max() <= 1e-4 * np.abs(rows).max()


@pytest.mark.parametrize("kind", ["dense", "moe", "next"])
def test_every_matrix_of_every_layer_is_shown_once(checkpoint: CheckpointFactory, kind: str) -> None:
    folder = checkpoint(kind)
    shown: list[str] = []
    with open_layerwise(folder) as model:
        hidden = model.embed(mx.array(IDS))
        for layer in model.layers():
            hidden = layer(hidden, lambda inputs: shown.extend(inputs.names))
        matrices = [
            target.spec.name
            for index in range(4)
            for target in model.layer_targets(index)
            if target.spec.role in _MATRICES
        ]
    assert sorted(shown) == sorted(matrices)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_rows_are_those_that_enter_transformers_modules(checkpoint: CheckpointFactory, kind: str) -> None:
    folder = checkpoint(kind)
    expected = torch_inputs(folder)
    compared = 0
    for name, shown in observe(folder).items():
        module = name.removeprefix("language_model.").removesuffix(".weight")
        if shown.experts is None:
            assert_same_rows(shown.x, expected[module][0])
            compared += 1
    assert compared >= 4 * 5


def test_an_expert_is_shown_the_rows_of_the_tokens_that_it_gets(checkpoint: CheckpointFactory) -> None:
    folder = checkpoint("moe")
    hidden, chosen, _ = torch_inputs(folder)["model.layers.1.mlp.experts"]
    shown = observe(folder)["language_model.model.layers.1.mlp.switch_mlp.up_proj.weight"]
    assert shown.x.shape == (IDS.size * 3, 64)
    for expert in range(8):
        assert_same_rows(shown.of_expert(expert), hidden[(chosen == expert).any(dim=-1)])


def test_down_projections_of_experts_are_shown_their_activations(checkpoint: CheckpointFactory) -> None:
    folder = checkpoint("moe")
    seen = observe(folder)
    experts = reference_model(folder).get_submodule("model.layers.1.mlp.experts")
    mlp = "language_model.model.layers.1.mlp.switch_mlp"
    for expert in range(8):
        rows = torch.from_numpy(np.array(seen[f"{mlp}.gate_proj.weight"].of_expert(expert)))
        with torch.no_grad():
            gate, up = (rows @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        assert_same_rows(seen[f"{mlp}.down_proj.weight"].of_expert(expert), nn.functional.silu(gate) * up)


def test_observing_does_not_change_the_result(checkpoint: CheckpointFactory) -> None:
    with open_layerwise(checkpoint("moe")) as model:
        hidden = model.embed(mx.array(IDS))
        for layer in model.layers():
            watched, alone = layer(hidden, lambda _: None), layer(hidden)
            assert mx.allclose(watched.sum(), alone.sum(), rtol=1e-5, atol=1e-5)
            hidden = alone
