"""A calibration text says which inputs of a matrix are strong, and a size is then met with that in mind."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from torch import nn

from mlx_qwen.checkpoint.layout import Plan, plan_checkpoint
from mlx_qwen.checkpoint.shards import checkpoint_tensors
from mlx_qwen.config import ModelConfig
from mlx_qwen.convert.choices.choose import choose
from mlx_qwen.convert.choices.fitting import fitted_recipe
from mlx_qwen.convert.choices.importance import input_squares
from mlx_qwen.convert.choices.sensitivity import measure, sampled_rows
from mlx_qwen.convert.options import DescriptionOptions, check_settings
from tests.conftest import CheckpointFactory
from tests.support.checkpoints import reference_model

WINDOWS = np.array([[5, 117, 42, 42, 260, 9], [31, 208, 77, 150, 3, 8]])


def planned(folder: Path) -> tuple[ModelConfig, Plan]:
    config = ModelConfig.from_directory(folder)
    return config, plan_checkpoint(config, checkpoint_tensors(folder))


def test_squares_are_those_that_enter_the_reference_model(checkpoint: CheckpointFactory) -> None:
    expected: dict[str, np.ndarray] = {}

    def keep(name: str) -> object:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            expected[f"language_model.{name}.weight"] = inputs[0].double().square().flatten(0, -2).sum(0).numpy()

        return hook

    model = reference_model(checkpoint("dense"))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(keep(name))  # type: ignore[arg-type]
    with torch.no_grad():
        model(input_ids=torch.tensor(WINDOWS), use_cache=False)
    found = input_squares(*planned(checkpoint("dense")), WINDOWS)
    assert found.keys() == expected.keys()
    for name, squares in found.items():
        np.testing.assert_allclose(np.array(squares), expected[name], rtol=2e-3, err_msg=name)


def test_errors_of_strong_inputs_count_more(checkpoint: CheckpointFactory) -> None:
    _, plan = planned(checkpoint("dense"))
    target = next(target for target in plan.targets if target.spec.name.endswith("layers.0.mlp.down_proj.weight"))
    (kind,) = {check_settings(DescriptionOptions(bits=3)).quantization}
    assert kind is not None
    rows = sampled_rows(target)
    restored = mx.dequantize(*mx.quantize(rows, 64, 3), 64, 3)
    worst = int((rows - restored).square().sum(axis=0).argmax())
    strong = {target.spec.name: mx.array(np.eye(rows.shape[1], dtype=np.float32)[worst])}
    (plain,), (weighed,) = (measure([target], (kind,), importance=h, progress=False) for h in (None, strong))
    lost, held = (rows - restored)[:, worst].square().sum(), rows[:, worst].square().sum()
    assert weighed.harm[kind] / plain.harm[kind] > 1
    np.testing.assert_allclose(weighed.harm[kind] / 2, float(lost / held), rtol=1e-4)


def test_a_size_is_met_by_errors_on_the_calibration_text(checkpoint: CheckpointFactory) -> None:
    config, plan = planned(checkpoint("moe"))
    importance = input_squares(config, plan, WINDOWS)
    differing = []
    for size in range(420_000, 620_000, 40_000):
        settings = check_settings(DescriptionOptions(target_size=size, calibration="default"))
        weighed, plain = (fitted_recipe(plan, settings, importance=h, progress=False) for h in (importance, None))
        assert choose(settings, config, plan, WINDOWS, progress=False).settings.recipe == weighed
        differing.append(weighed != plain)
    assert any(differing)
