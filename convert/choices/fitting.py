"""Bits for each matrix so that the whole meets a size, spent where measured harm falls most for a byte."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_qwen.checkpoint.layout import Plan, Quantization
from mlx_qwen.errors import ConversionError

from ..measures import readable_size
from ..outputs import Output, plan_outputs
from ..recipes.kinds import Kind, joined_with, kind_of
from ..recipes.precisions import AFFINE_BITS, precision
from ..recipes.recipe import Recipe, uniform
from ..settings import Settings
from .sensitivity import Sensitivity, measure


@dataclass(frozen=True, slots=True)
class _Option:
    """One precision of a unit: the bytes it takes and the harm it does."""

    quantization: Quantization | None
    nbytes: int
    harm: float


@dataclass(slots=True)
class _Unit:
    """Matrices that get the same precision, as the loader joins them into one; `options` from small to large."""

    names: tuple[str, ...]
    options: tuple[_Option, ...]
    chosen: int = 0

    @property
    def option(self) -> _Option:
        return self.options[self.chosen]


def fitted_recipe(
    plan: Plan,
    settings: Settings,
    *,
    importance: Mapping[str, mx.array] | None = None,
    progress: bool | None = None,
) -> Recipe:
    """The recipe whose weight files are as large as `settings.target_size` allows, and no larger.

    Every matrix that no rule decides about gets 2, 3, 4, 5, 6 or 8 bits or stays unpacked, those that the loader joins
    (q, k and v, gate and up) alike; routers keep 8 bits. Steps from precision to precision are taken in the order of
    harm avoided per byte, as long as they fit: the same source and size always give the same bits. `importance` is as
    in `measure`.

    Raises ConversionError, with the least possible size, when the target is smaller.
    """
    assert settings.target_size is not None and settings.recipe is not None, "a size is asked for"
    asked = settings.recipe
    choices = tuple(precision(bits, asked.default.group_size) for bits in AFFINE_BITS)
    packed = plan_outputs(plan, replace(settings, recipe=uniform(choices[-1], asked.name).with_rules(asked.rules)))
    opened = [output for output in packed.all if _is_open(output, asked)]
    measured = measure([output.target for output in opened], choices, importance=importance, progress=progress)
    units = _units(opened, measured)
    # Headers are longest when all is packed.
    fixed = packed.file_bytes - sum(output.nbytes for output in opened)
    room = settings.target_size - fixed - sum(unit.option.nbytes for unit in units)
    if room < 0:
        raise ConversionError(
            f"target_size is {readable_size(settings.target_size)}, but the smallest possible is "
            f"{readable_size(settings.target_size - room)}, with 2 bits wherever they can be."
        )
    _spend(units, room)
    by_name = {name: unit.option.quantization for unit in units for name in unit.names}
    return Recipe(asked.name, _most_common(units), {Kind.ROUTER: precision(8)}, by_name, asked.rules)


def _is_open(output: Output, recipe: Recipe) -> bool:
    spec = output.target.spec
    return output.quantization is not None and kind_of(spec) is not Kind.ROUTER and recipe.rule_for(spec) is None


def _units(outputs: list[Output], measured: list[Sensitivity]) -> list[_Unit]:
    groups: dict[str, list[tuple[Output, Sensitivity]]] = {}
    for output, sensitivity in zip(outputs, measured, strict=True):
        groups.setdefault(joined_with(output.name), []).append((output, sensitivity))
    return [_unit(members) for members in groups.values()]


def _unit(members: list[tuple[Output, Sensitivity]]) -> _Unit:
    options = [
        _Option(
            choice,
            nbytes=sum(replace(output, quantization=choice).nbytes for output, _ in members),
            harm=sum(sensitivity.harm[choice] for _, sensitivity in members),
        )
        for choice in members[0][1].harm
    ]
    return _Unit(tuple(output.name for output, _ in members), tuple(_worthwhile(options)))


def _worthwhile(options: list[_Option]) -> list[_Option]:
    """Options from small to large, without those that cost more and do no less harm."""
    kept: list[_Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.harm)):
        if not kept or option.harm < kept[-1].harm:
            kept.append(option)
    return kept


def _spend(units: list[_Unit], room: int) -> None:
    """Give units more bits within `room` bytes, always by the step that avoids most harm per byte and fits."""
    while (best := max(_steps(units, room), default=None, key=lambda step: step[0])) is not None:
        _, unit, index = best
        room -= unit.options[index].nbytes - unit.option.nbytes
        unit.chosen = index


def _steps(units: list[_Unit], room: int) -> Iterator[tuple[float, _Unit, int]]:
    """Every possible step: harm avoided per byte, the unit and the option it would take."""
    for unit in units:
        for index in range(unit.chosen + 1, len(unit.options)):
            extra = unit.options[index].nbytes - unit.option.nbytes
            if extra <= room:
                yield (unit.option.harm - unit.options[index].harm) / extra, unit, index


def _most_common(units: list[_Unit]) -> Quantization:
    """The precision of most bytes, which config.json names as that of all modules without their own.

    Where no unit is packed that is the routers', which always are.
    """
    sizes: dict[Quantization, int] = {}
    for unit in units:
        if unit.option.quantization is not None:
            sizes[unit.option.quantization] = sizes.get(unit.option.quantization, 0) + unit.option.nbytes
    return max(sizes, key=lambda each: sizes[each], default=precision(8))
