"""What `quantization_config` may state: the type of each field that a format reads, wherever it stands."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from mlx_qwen.errors import CheckpointError
from mlx_qwen.fields import MOST


@dataclass(frozen=True, slots=True)
class Kind:
    """One value: what to call it, and how it is told."""

    expected: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class Each:
    """An object, or a list, of objects with these fields; those whose names begin with `but` hold anything."""

    fields: "Fields"
    is_list: bool = False
    but: str | None = None


Fields: TypeAlias = Mapping[str, "Kind | Each | Fields"]


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -MOST < value < MOST


_WHOLE = Kind("a whole number", _is_whole)
_FLAG = Kind("true or false", lambda value: isinstance(value, bool))
_TEXT = Kind("a text", lambda value: isinstance(value, str))
_SIZES = Kind(
    "two sizes such as [128, 128]",
    lambda value: isinstance(value, list) and len(value) == 2 and all(_is_whole(each) and each > 0 for each in value),
)

_CODES: Fields = {"bits": _WHOLE, "group_size": _WHOLE, "sym": _FLAG}
_GROUP: Fields = {"format": _TEXT, "weights": {"num_bits": _WHOLE, "group_size": _WHOLE, "block_structure": _SIZES}}
_ROTATIONS: Fields = {"config_groups": Each({"apply": Each({"location": _TEXT}, is_list=True)})}
STATED: dict[str, Fields] = {
    "fp8": {"weight_block_size": _SIZES},
    "gptq": {
        **_CODES,
        **{"desc_act": _FLAG, "checkpoint_format": _TEXT, "format": _TEXT, "dynamic": Each(_CODES, but="-:")},
    },
    "awq": {"version": _TEXT, "bits": _WHOLE, "w_bit": _WHOLE, "group_size": _WHOLE, "q_group_size": _WHOLE},
    "auto-round": {**_CODES, "packing_format": _TEXT, "extra_config": Each(_CODES)},
    "compressed-tensors": {"format": _TEXT, "config_groups": Each(_GROUP), "transform_config": _ROTATIONS},
}


def check_stated(method: str, settings: Mapping[str, object]) -> None:
    """Raises CheckpointError for the first field of another type; one that is null is not stated."""
    _check(settings, STATED.get(method, {}), "quantization_config")


def _check(held: Mapping[str, object], fields: Fields, place: str) -> None:
    for name, expected in fields.items():
        value, where = held.get(name), f"{place}.{name}"
        if value is None:
            continue
        if isinstance(expected, Kind):
            if not expected.fits(value):
                raise _wrong(where, value, expected.expected)
        elif isinstance(expected, Each):
            for place_of_one, one in _listed(value, expected, where):
                _check(_object(one, place_of_one), expected.fields, place_of_one)
        else:
            _check(_object(value, where), expected, where)


def _listed(value: object, expected: Each, where: str) -> list[tuple[str, object]]:
    """What is in a list or an object, with its place."""
    if expected.is_list:
        if not isinstance(value, list):
            raise _wrong(where, value, "a list of objects")
        return [(f"{where}[{i}]", each) for i, each in enumerate(value)]
    held = _object(value, where)
    return [
        (f"{where}.{key}", each) for key, each in held.items() if not (expected.but and key.startswith(expected.but))
    ]


def _object(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise _wrong(where, value, "an object")
    return value


def _wrong(where: str, value: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{where} is {value!r:.200}, expected {expected}. Correct it in config.json, or download the folder again."
    )
