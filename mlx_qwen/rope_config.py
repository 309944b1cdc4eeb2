"""The rotary embedding that a configuration asks for: where it stands, how it is scaled, and what cannot be had."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_qwen.errors import ConfigError
from mlx_qwen.fields import Fields

_PLACES = ("rope_parameters", "rope_scaling")
_PLAIN = {"rope_type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved"}
_OF_YARN = {
    *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim", "truncate"),
}
_BY_LAYER_TYPE = {"full_attention", "linear_attention"}


@dataclass(frozen=True, slots=True)
class Yarn:
    """YaRN: slow pairs turn `factor` times slower, fast ones as before, those between by a ramp.

    `beta_fast` and `beta_slow` are the turns within the `original` positions where the ramp begins and ends, at whole
    pairs if it is to `truncate`; cosines and sines are multiplied by `attention_factor`.

    Source: Peng et al., "YaRN", arXiv 2309.00071, with the names of transformers.
    """

    factor: float
    original: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding of the attention layers: interleaved M-RoPE over part of each head."""

    theta: float
    partial_rotary_factor: float
    mrope_section: tuple[int, int, int] | None
    yarn: Yarn | None = None

    @property
    def most_positions(self) -> int:
        """How many positions scaling makes of the original ones; 0 without."""
        return 0 if self.yarn is None else int(self.yarn.factor * self.yarn.original)


def rope_config(fields: Fields, head_dim: int, most_positions: int, *, has_axes: bool) -> RopeConfig:
    """Read the rotary embedding of the text model; `has_axes` says that its family has M-RoPE.

    What stands in `rope_scaling` counts before `rope_parameters`, and both before the text model's own fields. Raises
    ConfigError for anything that would be left out.
    """
    stated = {name: _flat(fields, name) for name in _PLACES}
    place = next((name for name in reversed(_PLACES) if stated[name]), _PLACES[0])
    nested = {key: value for name in _PLACES for key, value in stated[name].items() if value is not None}
    rope = Fields({**fields.values, **nested}, f"{fields.place}.{place}")
    kind = nested.get("rope_type", fields.values.get("rope_type")) or "default"
    if kind not in ("default", "mrope", "yarn"):
        raise ConfigError(f"{rope.place}.rope_type is {kind!r}, expected 'default' or 'yarn'. Remove the rope scaling.")
    unknown = sorted(set(nested) - _PLAIN - (_OF_YARN if kind == "yarn" else set()))
    if unknown:
        raise ConfigError(
            f"{rope.place}.{unknown[0]} is {nested[unknown[0]]!r}, which the rotary embedding {kind!r} does not have. "
            "Remove it, or correct rope_type."
        )
    if not rope.flag("mrope_interleaved", True):
        raise ConfigError(f"{rope.place}.mrope_interleaved is false; every model of this family interleaves the axes.")
    factor = rope.number("partial_rotary_factor", 0.25)
    section = rope.integers("mrope_section")
    if section and (len(section) != 3 or min(section) < 0):
        raise ConfigError(f"{rope.place}.mrope_section is {section}, expected three numbers: temporal, height, width.")
    rotary_dim = int(head_dim * factor)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ConfigError(
            f"{rope.place}.partial_rotary_factor is {factor}, which makes {rotary_dim} of {head_dim} dimensions "
            "rotary; expected an even number of them."
        )
    if not section and has_axes:
        section = (11, 11, 10)
    return RopeConfig(
        theta=rope.number("rope_theta", 1e7),
        partial_rotary_factor=factor,
        mrope_section=(section[0], section[1], section[2]) if section else None,
        yarn=_yarn(rope, most_positions) if kind == "yarn" else None,
    )


def vision_theta(fields: Fields) -> float:
    """The base of the vision tower's rotary embedding, 10,000 by default; raises ConfigError for a scaled one."""
    rope = {key: value for name in _PLACES for key, value in _flat(fields, name).items() if value is not None}
    unknown = sorted(set(rope) - {"rope_type", "rope_theta"})
    if unknown or rope.get("rope_type", "axial") not in ("axial", "default"):
        name = unknown[0] if unknown else "rope_type"
        raise ConfigError(
            f"{fields.place} has the rotary embedding {name} {rope[name]!r}, expected a rope_theta alone."
        )
    return Fields({**fields.values, **rope}, fields.place).number("rope_theta", 10000.0)


def _flat(fields: Fields, name: str) -> dict[str, Any]:
    """The settings under `name`; where they are said of each type of layer, those of full attention."""
    if not fields.values.get(name):
        return {}
    values = fields.object(name).values
    by_type = {key for key, value in values.items() if isinstance(value, dict)}
    if not by_type:
        return _renamed(values)
    other = sorted(set(values) - _BY_LAYER_TYPE)
    if other or "full_attention" not in values:
        raise ConfigError(
            f"{fields.place}.{name} has {', '.join(sorted(values))}, expected the settings of full_attention, or one "
            "set for all."
        )
    return _renamed(Fields(values, f"{fields.place}.{name}").object("full_attention").values)


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with `rope_type` under its newer name."""
    kind = values.get("rope_type", values.get("type"))
    return {**{name: value for name, value in values.items() if name != "type"}, "rope_type": kind}


def _yarn(rope: Fields, most_positions: int) -> Yarn:
    original = rope.integer("original_max_position_embeddings", most_positions)
    if rope.values.get("factor") is None:
        raise ConfigError(
            f"{rope.place}.factor is missing, which rope_type 'yarn' needs. Say it, or remove the scaling."
        )
    factor = rope.number("factor", 1)
    fast, slow = rope.number("beta_fast", 32), rope.number("beta_slow", 1)
    if factor < 1 or fast < slow:
        raise ConfigError(
            f"{rope.place} has factor {factor}, beta_fast {fast} and beta_slow {slow}; expected a factor of at least 1 "
            "and beta_fast above beta_slow."
        )
    attention = rope.number("attention_factor", _attention_factor(rope, factor))
    return Yarn(factor, original, fast, slow, attention, rope.flag("truncate", True))


def _attention_factor(rope: Fields, factor: float) -> float:
    def scale(share: float) -> float:
        return 0.1 * share * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        return scale(rope.number("mscale", 1)) / scale(rope.number("mscale_all_dim", 1))
    return scale(1.0)
