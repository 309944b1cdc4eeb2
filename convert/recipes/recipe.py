"""Which matrix gets how many bits: recipes by name, and what makes one up."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

from mlx_qwen.checkpoint.layout import Mode, Quantization
from mlx_qwen.checkpoint.names import TensorSpec
from mlx_qwen.errors import ConversionError

from .kinds import Kind, can_pack, kind_of
from .precisions import AFFINE_BITS, precision
from .rules import Rule

# What a conversion is without further words: bits by each matrix's error, so many a weight in all.
DEFAULT_RECIPE = "balanced"
BALANCED_BITS = 4.6

_MIXED: dict[str, tuple[int, int]] = {
    "mixed-4-8": (4, 8),
    "mixed-4-6": (4, 6),
    "mixed-3-8": (3, 8),
    "mixed-3-6": (3, 6),
    "mixed-2-6": (2, 6),
}
_MIXED_MODES: dict[str, Mode] = {"mixed-mxfp4-8": "mxfp4", "mixed-nvfp4-8": "nvfp4"}
_MODES: tuple[Mode, ...] = ("mxfp4", "nvfp4", "mxfp8")
_UNIFORM = {f"{bits}bit": bits for bits in AFFINE_BITS}
RECIPES = (*_MIXED, *_MIXED_MODES, *_UNIFORM, *_MODES)

# The rest, MLPs and experts, hold most weights and bear rounding best.
_SENSITIVE = (
    Kind.EMBEDDING,
    Kind.HEAD,
    Kind.ATTENTION_IN,
    Kind.ATTENTION_OUT,
    Kind.LINEAR_IN,
    Kind.LINEAR_OUT,
    Kind.SHARED_EXPERT,
    Kind.MTP,
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """The precision of every matrix: the last of `rules` that takes its name decides, then `by_name`, then `by_kind`.

    All others get `default`. None stands for a matrix that is left unpacked.
    """

    name: str
    default: Quantization
    by_kind: Mapping[Kind, Quantization] = field(default_factory=dict)
    by_name: Mapping[str, Quantization | None] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()

    def wanted(self, spec: TensorSpec) -> Quantization | None:
        """The precision that the tensor would get if the columns of every matrix divided into groups."""
        kind = kind_of(spec)
        if can_pack(spec) and (rule := self.rule_for(spec)) is not None:
            return rule.quantization
        if not kind.is_matrix:
            return None
        if spec.name in self.by_name:
            return self.by_name[spec.name]
        return self.by_kind.get(kind, self.default)

    def precision(self, spec: TensorSpec) -> Quantization | None:
        """The precision that the tensor gets; a matrix whose columns do not divide into groups is left unpacked."""
        wanted = self.wanted(spec)
        return wanted if wanted is not None and spec.shape[-1] % wanted.group_size == 0 else None

    def rule_for(self, spec: TensorSpec) -> Rule | None:
        """The rule that decides about the tensor, if there is one."""
        return next((rule for rule in reversed(self.rules) if rule.takes(spec.name)), None)

    def with_rules(self, rules: tuple[Rule, ...]) -> "Recipe":
        """The recipe with rules that go before it."""
        return replace(self, name=f"{self.name} with patterns", rules=rules) if rules else self


def uniform(asked: Quantization, name: str | None = None) -> Recipe:
    """Most matrices get `asked`.

    The router and the gate of the shared expert choose paths, and the MTP layer is useless once its guesses are
    rejected: both are small and get 8 bits.
    """
    careful = precision(8)
    name = name or (f"{asked.bits}bit" if asked.mode == "affine" else asked.mode)
    return Recipe(name, asked, {Kind.ROUTER: careful, Kind.MTP: careful})


def named(name: str, group_size: int | None = None) -> Recipe:
    """The recipe of this name, its affine precisions in groups of `group_size`, 64 by default.

    Raises ConversionError for an unknown name, and for a group size that its precisions do not have.
    """
    if name in _MIXED:
        low, high = _MIXED[name]
        return _mixed(name, precision(low, group_size), precision(high, group_size))
    if name in _MIXED_MODES:
        return _mixed(name, precision(mode=_MIXED_MODES[name]), precision(8, group_size))
    if name in _UNIFORM:
        return uniform(precision(_UNIFORM[name], group_size), name)
    for mode in _MODES:
        if name == mode:
            return uniform(precision(None, group_size, mode), name)
    known = (DEFAULT_RECIPE, *RECIPES)
    near = get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConversionError(f"recipe is {name!r}, expected one of {', '.join(known)}.{hint}")


def _mixed(name: str, low: Quantization, high: Quantization) -> Recipe:
    """`high` for what is sensitive in this family, `low` for the rest.

    By public studies of these models tensor by tensor, the output of linear attention suffers most, then all other
    matrices of attention, linear or not, while experts are robust.
    """
    return Recipe(name, low, {**dict.fromkeys(_SENSITIVE, high), Kind.ROUTER: precision(8)})
