"""What a conversion writes: which arrays of which dtype and shape, in the main files and in the companion."""

from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx

from mlx_qwen.checkpoint.layout import Plan, Quantization, Target
from mlx_qwen.checkpoint.names import EXACT_ROLES, MTP_PREFIX
from mlx_qwen.errors import ConversionError

from .arrays import FLOATS
from .formats import is_encoded, keeps_codes
from .recipes.precisions import shown_precision
from .recipes.recipe import Recipe
from .recipes.rules import check_rules
from .settings import AUTO, DType, Quantizer, Settings
from .writing import writer
from .writing.writer import Entry, header_bytes, split_shards


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor to write: packed with `quantization`, or dense, in `dtype` (which scales and biases have too).

    `quantizer` says how codes, scales and biases are found.
    """

    target: Target
    quantization: Quantization | None
    dtype: DType
    quantizer: Quantizer = "search"

    @property
    def name(self) -> str:
        return self.target.spec.name

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The arrays on disk: weight, and for a packed matrix its scales and, in affine mode, biases."""
        shape, stored = self.target.spec.shape, FLOATS[self.dtype].stored
        if self.quantization is None:
            return (Entry(self.name, stored, shape),)
        base, rows, columns = self.name.removesuffix(".weight"), shape[:-1], shape[-1]
        groups = (*rows, columns // self.quantization.group_size)
        weight = Entry(self.name, "U32", (*rows, columns * self.quantization.bits // 32))
        if self.quantization.mode != "affine":
            return weight, Entry(f"{base}.scales", "U8", groups)
        return weight, Entry(f"{base}.scales", stored, groups), Entry(f"{base}.biases", stored, groups)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


@dataclass(frozen=True, slots=True)
class Outputs:
    """Everything to write. `main` is what every MLX runtime reads; `companion` what only this one does."""

    main: tuple[Output, ...]
    companion: tuple[Output, ...]
    dtype: DType
    indivisible: tuple[str, ...]

    @property
    def all(self) -> tuple[Output, ...]:
        return self.main + self.companion

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.all)

    @property
    def file_bytes(self) -> int:
        """Bytes of the weight files: all tensors, and the headers that list them."""
        parts = ([entry for output in part for entry in output.entries] for part in (self.main, self.companion))
        shards = [shard for part in parts for shard in split_shards(part, writer.SHARD_BYTES)]
        return self.nbytes + sum(len(header_bytes(shard)[0]) for shard in shards)


def plan_outputs(plan: Plan, settings: Settings) -> Outputs:
    """Decide dtype and precision of every tensor of `plan`; reads only the norms and dt_bias.

    Main files hold the norms' factors rounded to the dtype, as other runtimes compute in the dtype of their norms. The
    companion holds them exactly, where rounding lost something, and the MTP layer.
    """
    if settings.dequantize and not any(target.quantization or is_encoded(target) for target in plan.targets):
        raise ConversionError("The source is not quantized, so there is nothing to dequantize. Leave --dequantize out.")
    assert settings.dtype != AUTO, "a dtype was chosen before"
    dtype = settings.dtype or source_dtype(plan.targets)
    recipe = settings.recipe
    if recipe is not None:
        check_rules(recipe.rules, [target.spec for target in plan.targets])
    main, companion, indivisible = [], [], []
    for target in plan.targets:
        spec = target.spec
        quantization = None if recipe is None else _chosen(target, recipe, asked=settings.asked)
        if quantization is None and recipe is not None and recipe.wanted(spec) is not None:
            indivisible.append(spec.name)
        kept: DType = "float32" if spec.name.endswith(".A_log") else dtype
        output = Output(target, quantization, kept, settings.quantizer)
        if spec.name.startswith(MTP_PREFIX):
            companion.append(Output(target, quantization, "float32") if spec.role in EXACT_ROLES else output)
            continue
        main.append(output)
        if spec.role in EXACT_ROLES and _rounds(target, output.dtype):
            companion.append(Output(target, None, "float32"))
    _check_experts([*main, *companion])
    return Outputs(tuple(main), tuple(companion), dtype, tuple(indivisible))


def _chosen(target: Target, recipe: Recipe, *, asked: bool) -> Quantization | None:
    """The recipe's precision, unless codes that the source has are better kept.

    Those of another runtime were checked for that before. MLX's own are kept where nobody asked for a recipe and it
    would spend more bits than they have, which brings nothing back.
    """
    chosen, stored = recipe.precision(target.spec), target.quantization
    if stored is None or recipe.rule_for(target.spec) is not None:
        return chosen
    is_wider = chosen is not None and chosen.bits >= stored.bits
    return stored if keeps_codes(target) or (is_wider and not asked) else chosen


def _check_experts(outputs: Iterable[Output]) -> None:
    """Raise ConversionError when the experts' gate and up, which readers multiply as one, would differ."""
    chosen = {output.name: output.quantization for output in outputs}
    for name, gate in chosen.items():
        if not name.endswith("switch_mlp.gate_proj.weight"):
            continue
        up = chosen[name.replace("gate_proj", "up_proj")]
        if gate != up:
            raise ConversionError(
                f"{name} would be stored as {shown_precision(gate, 'unpacked')} and its up_proj as "
                f"{shown_precision(up, 'unpacked')}, but readers multiply both as one matrix. Use a pattern that takes "
                "both, such as switch_mlp."
            )


def source_dtype(targets: Iterable[Target]) -> DType:
    """The float dtype that most bytes of the source have; packed matrices count by their scales, encoded ones not."""
    sizes: dict[str, int] = dict.fromkeys((kind.stored for kind in FLOATS.values()), 0)
    for target in targets:
        if is_encoded(target):
            continue
        infos = (source.tensor for source in target.sources) if target.quantization is None else (target.scales,)
        for info in infos:
            if info is not None and info.dtype in sizes:
                sizes[info.dtype] += info.nbytes
    stored = max(sizes, key=lambda name: sizes[name])
    return next(name for name, kind in FLOATS.items() if kind.stored == stored)


def _rounds(target: Target, dtype: DType) -> bool:
    """Whether storing this small tensor in `dtype` loses anything of its fp32 value."""
    if dtype == "float32":
        return False
    exact = target.arrange(target.sources[0].tensor.read()).astype(mx.float32)
    return not bool(mx.array_equal(exact, exact.astype(FLOATS[dtype].mlx).astype(mx.float32)))
