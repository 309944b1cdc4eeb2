"""Every field of quantization_config that a format reads: another type is one clear error, wherever it stands."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mlx_qwen.checkpoint.shards import TensorInfo, checkpoint_tensors
from mlx_qwen.config import ModelConfig
from mlx_qwen.convert.formats import decodable
from mlx_qwen.convert.formats.stated import STATED, Each, Fields
from mlx_qwen.errors import CheckpointError, MLXQwenError
from tests.support.configs import text_config

N, K = 64, 64
MODULE = "model.layers.0.mlp.up_proj"


def words(*shape: int) -> Tensor:
    return torch.full(shape, 0x12345678, dtype=torch.int32)


def scales(*shape: int) -> Tensor:
    return torch.full(shape, 0.5, dtype=torch.float16)


CODES = {"bits": 4, "group_size": 32, "sym": False}
AS_GPTQ = {"qweight": words(K // 8, N), "qzeros": words(2, N // 8), "scales": scales(2, N)}
AS_AWQ = {"qweight": words(K, N // 8), "qzeros": words(2, N // 8), "scales": scales(2, N)}
AS_GEMV = {"qweight": words(N, K // 8), "qzeros": words(N, 1), "scales": scales(N, 8)}
PACKED = {"weight_packed": words(N, K // 8), "weight_scale": scales(N, 2), "weight_shape": torch.tensor([N, K])}
BLOCKS = torch.ones(N, K).to(torch.float8_e4m3fn)
ROTATION = {"apply": [{"location": "weight_input"}]}
GROUP = {"format": "pack-quantized", "weights": {"num_bits": 4, "group_size": 32}}

# A method, settings with every field that it reads, and a module that they describe.
FULL: dict[str, tuple[str, dict[str, Any], dict[str, Tensor]]] = {
    "gptq": (
        "gptq",
        {
            **CODES,
            "desc_act": False,
            "checkpoint_format": "gptq",
            "format": "gptq",
            "dynamic": {"-:lm_head": None, "+:m.*": CODES},
        },
        AS_GPTQ,
    ),
    "awq": ("awq", {"bits": 4, "group_size": 32, "version": "gemm"}, AS_AWQ),
    "llm-awq": ("awq", {"w_bit": 4, "q_group_size": 32, "version": "gemv"}, AS_GEMV),
    "auto-round": (
        "auto-round",
        {**CODES, "packing_format": "auto_round:auto_gptq", "extra_config": {"m.*": CODES}},
        AS_GPTQ,
    ),
    "auto-round as awq": ("auto-round", {**CODES, "packing_format": "auto_round:awq"}, AS_AWQ),
    "compressed-tensors": (
        "compressed-tensors",
        {
            "format": "pack-quantized",
            "config_groups": {"group_0": GROUP},
            "transform_config": {"config_groups": {"R1": ROTATION}},
        },
        PACKED,
    ),
    "compressed-tensors in blocks": (
        "compressed-tensors",
        {"format": "float-quantized", "config_groups": {"group_0": {"weights": {"block_structure": [32, 16]}}}},
        {"weight": BLOCKS, "weight_scale": scales(2, 4)},
    ),
    "fp8": ("fp8", {"weight_block_size": [32, 16]}, {"weight": BLOCKS, "weight_scale_inv": scales(2, 4)}),
}
FREE = {"-:lm_head", "+:m.*", "m.*", "group_0", "R1"}
WRONG: list[object] = [
    *(5, -3, 2.5, True, "many", 10**400, float("inf"), float("nan")),
    *([], ["x"], [5], [[1, 2]], [128, "x"], {"x": 1}, {"x": ["y"]}),
]


def places(held: object, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every field of settings, and every entry of their lists, by the way to it."""
    for key, value in held.items() if isinstance(held, dict) else enumerate(held) if isinstance(held, list) else ():
        yield (*at, key)
        yield from places(value, (*at, key))


WALK = [
    (name, place) for name, (_, settings, _) in FULL.items() for place in places(settings) if place[-1] != "-:lm_head"
]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of each module, in a file."""
    made = {}
    for name, (_, _, parts) in FULL.items():
        folder = tmp_path_factory.mktemp("stored")
        save_file({f"{MODULE}.{part}": tensor for part, tensor in parts.items()}, folder / "model.safetensors")
        made[name] = checkpoint_tensors(folder)
    return made


def read(settings: dict[str, Any], method: str, tensors: dict[str, TensorInfo]) -> mx.array:
    """The module's weight as these settings have it."""
    settings.setdefault("quant_method", method)
    config = ModelConfig.from_dict(text_config(quantization_config=settings))
    return decodable(config, tensors, lambda grid: False)[f"{MODULE}.weight"].read()


def changed(settings: dict[str, Any], place: tuple[str | int, ...], value: object) -> dict[str, Any]:
    settings = copy.deepcopy(settings)
    inner: Any = settings
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    return settings


def is_alike(value: object, usual: object, name: str | int) -> bool:
    """Whether a value is of the type that a field has, so that another complaint, or none, is right."""
    if isinstance(usual, dict):
        by_name = name in ("dynamic", "extra_config", "config_groups")
        return isinstance(value, dict) and not (by_name and any(not isinstance(each, dict) for each in value.values()))
    if isinstance(usual, list):
        return isinstance(value, list) and (not value or [*map(type, value)] == [*map(type, usual)])
    return type(value) is type(usual) and not (isinstance(value, int) and value > 1 << 48)


@pytest.mark.parametrize(
    ("name", "place"), WALK, ids=lambda part: part if isinstance(part, str) else ".".join(map(str, part))
)
def test_another_type_is_one_clear_error_that_names_the_field(
    name: str, place: tuple[str | int, ...], stored: dict[str, dict[str, TensorInfo]]
) -> None:
    method, settings, _ = FULL[name]
    usual: Any = settings
    for step in place:
        usual = usual[step]
    named = next(step for step in reversed(place) if isinstance(step, str))
    for value in WRONG:
        try:
            read(changed(settings, place, value), method, stored[name])
        except MLXQwenError as error:
            assert named in str(error) or is_alike(value, usual, place[-1]), value
            assert len(str(error)) < 600
        else:
            assert is_alike(value, usual, place[-1]), value


@pytest.mark.parametrize(
    ("name", "place"), WALK, ids=lambda part: part if isinstance(part, str) else ".".join(map(str, part))
)
def test_null_is_read_as_left_out(
    name: str, place: tuple[str | int, ...], stored: dict[str, dict[str, TensorInfo]]
) -> None:
    method, settings, _ = FULL[name]
    if isinstance(place[-1], int) or place[-1] in FREE or place[-1] == "weight_block_size":
        return  # an entry cannot be left out, and null is one block for all
    without = copy.deepcopy(settings)
    inner: Any = without
    for step in place[:-1]:
        inner = inner[step]
    del inner[place[-1]]

    def outcome(tried: dict[str, Any]) -> object:
        try:
            return read(tried, method, stored[name]).tolist()
        except CheckpointError as error:
            return str(error)

    assert outcome(changed(settings, place, None)) == outcome(without)


class Watched(dict[str, Any]):
    """Settings that note which of their fields are asked for."""

    def __init__(self, held: dict[str, Any], asked: set[str]) -> None:
        super().__init__({key: watched(value, asked) for key, value in held.items()})
        self.asked = asked

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)


def watched(value: Any, asked: set[str]) -> Any:
    if isinstance(value, dict):
        return Watched(value, asked)
    return [watched(each, asked) for each in value] if isinstance(value, list) else value


def names_of(fields: Fields) -> Iterator[str]:
    for name, expected in fields.items():
        yield name
        inner = expected.fields if isinstance(expected, Each) else expected
        yield from names_of(inner) if isinstance(inner, dict) else ()


@pytest.mark.parametrize("name", FULL)
def test_every_field_that_a_format_asks_for_has_a_type_and_its_turn(
    name: str, stored: dict[str, dict[str, TensorInfo]]
) -> None:
    method, settings, _ = FULL[name]
    asked: set[str] = set()
    read(Watched({"quant_method": method, **settings}, asked), method, stored[name])
    assert asked - FREE - {"quant_method", "packing_format"} <= set(names_of(STATED[method]))
    turns = {step for other, place in WALK if FULL[other][0] == method for step in place if isinstance(step, str)}
    assert set(names_of(STATED[method])) == turns - FREE


@pytest.mark.parametrize("name", ["gptq", "awq", "llm-awq"])
def test_a_group_that_is_longer_than_the_inputs_ends_with_them(
    name: str, stored: dict[str, dict[str, TensorInfo]], tmp_path: Path
) -> None:
    method, settings, parts = FULL[name]
    key = "q_group_size" if name == "llm-awq" else "group_size"
    one = {part: tensor[:1] if tensor.shape[0] == 2 else tensor for part, tensor in parts.items()}
    save_file({f"{MODULE}.{part}": tensor.contiguous() for part, tensor in one.items()}, tmp_path / "model.safetensors")
    tensors, stated = checkpoint_tensors(tmp_path), {name: settings[name] for name in settings if name != "dynamic"}
    found = [read({**stated, key: size}, method, tensors) for size in (-1, K, 1 << 47)]
    assert found[0].shape == (N, K)
    assert all(mx.array_equal(one, found[0]) for one in found[1:])
