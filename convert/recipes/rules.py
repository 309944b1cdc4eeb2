"""Precision of single tensors by pattern, which goes before every recipe."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher

from mlx_qwen.checkpoint.layout import Quantization
from mlx_qwen.checkpoint.names import VISION_PREFIX, TensorSpec
from mlx_qwen.errors import ConversionError

from .kinds import can_pack, kind_of
from .precisions import written_precision

_SHOWN = 5
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Rule:
    """Matrices whose MLX name holds `pattern` get `quantization`; None leaves them unpacked."""

    pattern: re.Pattern[str]
    quantization: Quantization | None

    def takes(self, name: str) -> bool:
        """Whether the rule decides about the tensor of this name; on the vision tower only a pattern that names it."""
        if name.startswith(VISION_PREFIX) and "vision" not in self.pattern.pattern:
            return False
        return self.pattern.search(name) is not None


def written_rules(bits_for: Mapping[str, int | str], group_size: int | None) -> tuple[Rule, ...]:
    """Rules from patterns and precisions such as {"out_proj": 8, "embed_tokens": "6,32", "mtp": "none"}.

    Raises ConversionError for what is no regular expression or no precision.
    """
    rules = []
    for pattern, text in bits_for.items():
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ConversionError(f"{pattern!r} is no regular expression: {error}.") from error
        try:
            rules.append(Rule(compiled, written_precision(str(text), group_size)))
        except ConversionError as error:
            raise ConversionError(f"The precision for {pattern!r} cannot be used. {error}") from error
    return tuple(rules)


def check_rules(rules: Iterable[Rule], specs: Iterable[TensorSpec]) -> None:
    """Raise ConversionError for a rule that no matrix matches, naming what comes near."""
    specs = list(specs)
    matrices = [spec for spec in specs if can_pack(spec)]
    for rule in rules:
        if any(rule.takes(spec.name) for spec in matrices):
            continue
        pattern = rule.pattern.pattern
        fixed = next((spec.name for spec in specs if rule.takes(spec.name)), None)
        if fixed is not None:
            raise ConversionError(f"{pattern!r} matches only tensors that are never packed, such as {fixed}.")
        near = ", ".join(_near(pattern, matrices))
        raise ConversionError(f"{pattern!r} matches no matrix of this model. Names near it: {near}.")


def _near(pattern: str, matrices: Iterable[TensorSpec]) -> list[str]:
    """The names closest to `pattern`, or of a kind that is called so, with the number of a layer replaced by N."""
    distances: dict[str, float] = {}
    for spec in matrices:
        name = _NUMBER.sub("N", spec.name)
        if name not in distances:
            distances[name] = min(_distance(pattern, text) for text in (kind_of(spec).value, *_ends(name)))
    return sorted(distances, key=lambda name: distances[name])[:_SHOWN]


def _ends(name: str) -> list[str]:
    parts = name.removesuffix(".weight").split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _distance(pattern: str, text: str) -> float:
    return 1 - SequenceMatcher(None, pattern, text).ratio()
