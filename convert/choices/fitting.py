"""Bits for each matrix so that the whole meets a size or bits a weight, spent where harm falls most for a byte."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from math import prod

import mlx.core as mx

from mlx_qwen.checkpoint.layout import Plan, Quantization
from mlx_qwen.errors import ConversionError

from ..formats import keeps_codes
from ..measures import readable_size
from ..outputs import Output, Outputs, plan_outputs
from ..recipes.kinds import Kind, joined_with, kind_of
from ..recipes.precisions import AFFINE_BITS, precision
from ..recipes.recipe import Recipe, uniform
from ..settings import Settings
from .sensitivity import Sensitivity, expect, measure

_LEAST_BITS = 4


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
    expected: bool = False,
) -> Recipe:
    """The recipe that spends the size or the bits a weight that `settings` allow, and no more.

    Every matrix that no rule decides about gets 2, 3, 4, 5, 6 or 8 bits or stays unpacked, those that the loader joins
    (q, k and v, gate and up) alike; routers keep 8 bits. Steps from precision to precision are taken in the order of
    harm avoided per byte, as long as they fit: the same source and size always give the same bits. `importance` is as
    in `measure`. With `expected` no weights are read, and errors are those of normally distributed ones.

    With `target_bits`, the MTP layer gets 8 bits, codes of another runtime are kept, and MLX's own get no wider; all of
    these, and what rules decide about, neither take from the bits of the rest nor add to them.

    Raises ConversionError, with the least possible size, when the target size is smaller.
    """
    assert settings.recipe is not None, "bits are asked for"
    asked = settings.recipe
    choices = tuple(precision(bits, asked.default.group_size) for bits in AFFINE_BITS)
    packed = plan_outputs(plan, replace(settings, recipe=uniform(choices[-1], asked.name).with_rules(asked.rules)))
    opened = [output for output in packed.all if _is_open(output, settings)]
    targets = [output.target for output in opened]
    measured = (
        expect(targets, choices) if expected else measure(targets, choices, importance=importance, progress=progress)
    )
    units = _units(opened, measured, widest=choices[-1])
    least = sum(unit.option.nbytes for unit in units)
    if settings.target_size is not None:
        # Headers are longest when all is packed.
        fixed = packed.file_bytes - sum(output.nbytes for output in opened)
        room = settings.target_size - fixed - least
        if room < 0:
            raise ConversionError(
                f"target_size is {readable_size(settings.target_size)}, but the smallest possible is "
                f"{readable_size(settings.target_size - room)}, with 2 bits wherever they can be."
            )
    else:
        room = _balanced_bytes(packed, opened, settings) - least
    _spend(units, room)
    by_name = {name: unit.option.quantization for unit in units for name in unit.names}
    careful = precision(8)
    return Recipe(asked.name, _most_common(units), {Kind.ROUTER: careful, Kind.MTP: careful}, by_name, asked.rules)


def _balanced_bytes(packed: Outputs, opened: list[Output], settings: Settings) -> int:
    """What the open matrices may take so that these, routers and what is never packed have `target_bits` a weight.

    That is at least 4 bits for each of them: very small models have more beside their matrices than in them.
    """
    assert settings.target_bits is not None and settings.recipe is not None, "bits a weight are asked for"
    beside = [output for output in packed.main if kind_of(output.target.spec) in (Kind.EXACT, Kind.ROUTER)]
    weights = sum(prod(output.target.spec.shape) for output in opened)
    shared = int(settings.target_bits * (weights + sum(prod(output.target.spec.shape) for output in beside)) / 8)
    least = precision(_LEAST_BITS, settings.recipe.default.group_size)
    at_least = sum(replace(output, quantization=least).nbytes for output in opened)
    return max(shared - sum(output.nbytes for output in beside), at_least)


def _is_open(output: Output, settings: Settings) -> bool:
    assert settings.recipe is not None, "bits are asked for"
    spec = output.target.spec
    if output.quantization is None or settings.recipe.rule_for(spec) is not None:
        return False
    fixed = (Kind.ROUTER,) if settings.target_bits is None else (Kind.ROUTER, Kind.MTP)
    return kind_of(spec) not in fixed and (settings.target_bits is None or not keeps_codes(output.target))


def _units(outputs: list[Output], measured: list[Sensitivity], widest: Quantization) -> list[_Unit]:
    groups: dict[str, list[tuple[Output, Sensitivity]]] = {}
    for output, sensitivity in zip(outputs, measured, strict=True):
        groups.setdefault(joined_with(output.name), []).append((output, sensitivity))
    return [_unit(members, widest) for members in groups.values()]


def _unit(members: list[tuple[Output, Sensitivity]], widest: Quantization) -> _Unit:
    options = [
        _Option(
            choice,
            nbytes=sum(replace(output, quantization=choice).nbytes for output, _ in members),
            harm=sum(sensitivity.harm[choice] for _, sensitivity in members),
        )
        for choice in members[0][1].harm
    ]
    held = [output.quantization for output, _ in members if output.quantization == output.target.quantization]
    if len(held) == len(members):  # as they are is the most that they can be, which the widest stands for
        most = min(quantization.bits for quantization in held if quantization is not None)
        options = [option for option in options if option.quantization and option.quantization.bits < most]
        options.append(_Option(widest, nbytes=sum(output.nbytes for output, _ in members), harm=0.0))
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
    steps = [step for at, unit in enumerate(units) if (step := _best_step(at, unit, room)) is not None]
    heapify(steps)
    while steps:
        _, at, index = heappop(steps)
        unit = units[at]
        extra = unit.options[index].nbytes - unit.option.nbytes
        if extra <= room:
            room -= extra
            unit.chosen = index
        if (step := _best_step(at, unit, room)) is not None:
            heappush(steps, step)


def _best_step(at: int, unit: _Unit, room: int) -> tuple[float, int, int] | None:
    """Harm avoided per byte, negated, the place of the unit, and the option that its best step within `room` takes."""
    steps = []
    for index in range(unit.chosen + 1, len(unit.options)):
        extra = unit.options[index].nbytes - unit.option.nbytes
        if extra <= room:
            steps.append(((unit.options[index].harm - unit.option.harm) / extra, at, index))
    return min(steps, default=None)


def _most_common(units: list[_Unit]) -> Quantization:
    """The precision of most bytes, which config.json names as that of all modules without their own.

    Where no unit is packed that is the routers', which always are.
    """
    sizes: dict[Quantization, int] = {}
    for unit in units:
        if unit.option.quantization is not None:
            sizes[unit.option.quantization] = sizes.get(unit.option.quantization, 0) + unit.option.nbytes
    return max(sizes, key=lambda each: sizes[each], default=precision(8))
