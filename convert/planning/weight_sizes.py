"""Bytes of a model's weights, as the converter would write them."""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from mlx_qwen.checkpoint.names import MTP_PREFIX, Role, TensorSpec
from mlx_qwen.errors import PlanningError
from mlx_qwen.model.sharding import Share, check_groups, check_ranks

from ..choices.fitting import fitted_recipe
from ..options import DescriptionOptions, check_settings
from ..outputs import plan_outputs
from ..recipes import DEFAULT_RECIPE, RECIPES
from ..settings import Settings
from ..work.write import source_bytes
from .described import Described

UNPACKED = "unpacked"
UNPACKED_BITS = 16
# Those that "best" chooses from: the more bytes, the closer to the original.
LADDER = (UNPACKED, "8bit", "6bit", "5bit", "mixed-4-8", DEFAULT_RECIPE, "4bit", "mixed-3-6", "3bit", "2bit")


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of the tensors of a converted checkpoint, by part.

    Attributes:
        recipe: how it is quantized; "unpacked" leaves all in the source's dtype.
        text: the language model, with the companion's exact norms.
        mtp: the layer for multi-token prediction.
        vision: the vision tower.
        source: the tensors before conversion, None where only a quantized model's configuration is known.
        per_token: what decoding a token has to read of them: everything but the embedding's other rows, the experts
            that are not chosen, MTP and vision.
        active: how many weights those are.
        parameters: how many weights there are in all.
        text_parameters: how many of them are in the language model, without MTP.
    """

    recipe: str
    text: int
    mtp: int
    vision: int
    source: int | None
    per_token: int
    active: int
    parameters: int
    text_parameters: int

    @property
    def text_bits(self) -> float:
        """Bits a weight of the language model, without MTP and vision."""
        return 8 * self.text / self.text_parameters

    @property
    def total(self) -> int:
        """Bytes of all parts: the tensors on the disk."""
        return self.text + self.mtp + self.vision

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.total / self.parameters


def recipe_named(recipe: str | None, bits: int | None) -> str:
    """The recipe that is asked for by name or by the bits of all matrices alike, 16 packing none; else the converter's.

    Raises PlanningError for unknown ones and for both at once.
    """
    if recipe is not None and bits is not None:
        raise PlanningError(
            f"recipe is {recipe!r} and bits is {bits}, but each decides about every matrix. Choose one."
        )
    if bits is not None:
        names = {int(name.removesuffix("bit")): name for name in RECIPES if name.endswith("bit")}
        names[UNPACKED_BITS] = UNPACKED
        if bits not in names:
            raise PlanningError(f"bits is {bits}, expected one of {', '.join(map(str, sorted(names)))}.")
        return names[bits]
    known = (DEFAULT_RECIPE, *RECIPES, UNPACKED)
    if recipe is not None and recipe not in known:
        raise PlanningError(f"recipe is {recipe!r}, expected one of {', '.join(known)}.")
    return recipe or DEFAULT_RECIPE


@lru_cache(maxsize=256)
def weights_of(model: Described, recipe: str = DEFAULT_RECIPE, *, ranks: int = 1) -> Weights:
    """What the converter would write of `model` with a recipe of this name, one of `RECIPES`, "balanced" or "unpacked".

    No weights are read: bits that go by errors go by those to be expected. Of several `ranks` it is what one of them
    holds, but for `source`.

    Raises:
        ShardingError: the ranks do not divide the model, or cut through the groups of this recipe.
    """
    settings = _settings(recipe)
    plan = model.tensors(settings)
    if settings.is_open:
        settings = replace(settings, recipe=fitted_recipe(plan, settings, expected=True))
    text = plan.config.text
    outputs, share = plan_outputs(plan, settings), Share(text, 0, ranks)
    check_ranks(text, ranks)
    check_groups(text, (replace(output.target, quantization=output.quantization) for output in outputs.all), ranks)
    parts = {"text": 0, "mtp": 0, "vision": 0}
    for output in outputs.all:
        parts[_part(output.target.spec)] += _held(output.nbytes, output.target.spec, share)
    specs = [target.spec for target in plan.targets]
    read = [output for output in outputs.main if _part(output.target.spec) == "text"]
    return Weights(
        recipe=recipe,
        **parts,
        source=source_bytes(plan) if model.is_published else None,
        per_token=sum(_read(output.nbytes, output.target.spec, share) for output in read),
        active=sum(_read(prod(output.target.spec.shape), output.target.spec, share) for output in read),
        parameters=sum(_held(prod(spec.shape), spec, share) for spec in specs),
        text_parameters=sum(_held(prod(spec.shape), spec, share) for spec in specs if _part(spec) == "text"),
    )


def _settings(recipe: str) -> Settings:
    """What `convert` makes of the recipe; its own counts as not asked for, which keeps what a source has already."""
    if recipe == UNPACKED:
        return check_settings(DescriptionOptions(quantize=False))
    return check_settings(DescriptionOptions(recipe=None if recipe == DEFAULT_RECIPE else recipe))


def _part(spec: TensorSpec) -> str:
    if spec.role is Role.VISION:
        return "vision"
    return "mtp" if spec.name.startswith(MTP_PREFIX) else "text"


def _held(amount: int, spec: TensorSpec, share: Share) -> int:
    """How much one rank holds of `amount` of this tensor."""
    cut = share.cut(spec)
    return amount if cut is None else amount * prod(share.shape(spec)) // prod(spec.shape)


def _read(amount: int, spec: TensorSpec, share: Share) -> int:
    """How much of `amount` of this tensor one token needs on one rank."""
    amount, text = _held(amount, spec, share), share.whole
    if spec.role is Role.EXPERT and text.moe is not None:
        return amount * text.moe.num_experts_per_tok // text.moe.num_experts
    if spec.role is Role.EMBEDDING and not text.tie_word_embeddings:
        return amount // text.vocab_size
    return amount
