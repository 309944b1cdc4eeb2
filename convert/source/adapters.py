"""Adapters of a fine-tuning, as PEFT and mlx-lm write them: which tensors they change, and by what.

PEFT: a module with N outputs and K inputs has `lora_A.weight` [r, K] and `lora_B.weight` [N, r], W becoming
W + s · B A with s = alpha / r, or alpha / √r (rsLoRA); an embedding [V, K] has `lora_embedding_A` [r, V] and
`lora_embedding_B` [K, r]; `lora_magnitude_vector` [N] is the length that each row has afterwards (DoRA). All E experts
of a layer may share `lora_A` [E r, K], expert by expert, and `lora_B` [N, r E], rank by rank. Whole tensors
(`modules_to_save`) replace those of the model.

mlx-lm: `lora_a` [K, r] (an embedding's [V, r], of experts [E, r, K]) and `lora_b` [r, N] ([E, N, r]), s being
`lora_parameters.scale`, and DoRA's lengths as `m`.

Source: https://github.com/huggingface/peft (`src/peft/tuners/lora`) and https://github.com/ml-explore/mlx-lm
(`mlx_lm/tuner`).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlx_qwen.checkpoint.adapters import ADAPTER_FILES
from mlx_qwen.checkpoint.shards import TensorInfo, read_header
from mlx_qwen.checkpoint.stored_names import mlx_name
from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import CheckpointError
from mlx_qwen.fields import Fields
from mlx_qwen.json_files import ADAPTER_CONFIG, read_json_object

_PEFT_FILE, _MLX_FILE = ADAPTER_FILES
_FLOATS = ("BF16", "F16", "F32", "F64")
_PARTS = "lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
_PEFT = re.compile(rf"(?P<module>.+)\.(?P<part>{_PARTS})(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.weight)?")
_MLX = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b|m)")
_SAVED = r"modules_to_save(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?"
_REPLACED = re.compile(rf"(?P<module>.+?)\.(?:original_module|{_SAVED})\.(?P<leaf>.+)")
_BASE = re.compile(r"\.base_layer(?=\.|$)")
# What changes more of the model than its weights, or weights by another rule than the one above.
_OTHER_RULES = (
    *("layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config"),
    *("monteclora_config", "trainable_token_indices"),
)
# Ways to begin that leave the model's own weights as they are.
_PLAIN_BEGINNINGS = ("gaussian", "eva", "orthogonal", "mica")
_WITH_PEFT = (
    "Merge it with `peft` and transformers: PeftModel.from_pretrained(base, adapter).merge_and_unload(), then "
    "save_pretrained(folder); give that folder."
)


@dataclass(frozen=True, slots=True)
class Pair:
    """The two stored factors of one module's change, before it is known what the module is; `name` is as stored."""

    name: str
    a: TensorInfo
    b: TensorInfo
    scale: float
    rank: int
    magnitude: TensorInfo | None = None
    is_mlx: bool = False


@dataclass(frozen=True, slots=True)
class Adapter:
    """What `folder` changes: `pairs` by the MLX name of the weight, `whole` tensors by their own MLX names.

    `experts` are pairs of all experts of a layer, by the MLX name of what holds these. `is_mlx` says in which layout
    whole tensors are, `ties` that a change of the embedding is one of the head that is tied to it.
    """

    folder: Path
    pairs: Mapping[str, Pair]
    experts: Mapping[str, tuple[Pair, ...]]
    whole: Mapping[str, TensorInfo]
    is_mlx: bool = False
    ties: bool = False

    @property
    def count(self) -> int:
        """How many stored modules and tensors it has."""
        return len(self.pairs) + len(self.whole) + sum(map(len, self.experts.values()))


@dataclass(slots=True)
class _Parts:
    """The stored parts of one adapter by module, and what is no part."""

    by_module: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    rest: dict[str, TensorInfo] = field(default_factory=dict)

    def pairs(self, parts: tuple[str, str, str]) -> Iterable[tuple[str, TensorInfo, TensorInfo, TensorInfo | None]]:
        """Module, both factors and the rows' lengths; raises CheckpointError for what is no pair of matrices."""
        first, second, length = parts
        for module, found in self.by_module.items():
            factors = [found[part] for part in (first, second) if part in found]
            sound = all(len(info.shape) > 1 and 0 not in info.shape and info.dtype in _FLOATS for info in factors)
            if len(factors) == 1 or not sound:
                info = factors[0]
                raise CheckpointError(
                    f"{info.file} holds {info.name}, {info.dtype} {list(info.shape)}, expected two matrices of floats, "
                    f"{first} and {second}. Save the adapter again, or download it."
                )
            if factors:
                yield module, found[first], found[second], found.get(length)


def read_adapter(folder: Path, config: ModelConfig) -> Adapter:
    """The adapter in `folder`, for a model of `config`.

    Raises:
        ConfigError: adapter_config.json holds impossible values.
        CheckpointError: it is no adapter, of another kind than LoRA, or its tensors are missing or damaged.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no {ADAPTER_CONFIG}. Expected a folder as PEFT or mlx-lm save adapters in."
        )
    settings = read_json_object(file)
    is_mlx = "lora_parameters" in settings or "fine_tune_type" in settings
    weights = folder / (_MLX_FILE if is_mlx else _PEFT_FILE)
    if not weights.is_file():
        raise CheckpointError(
            f"{folder} has no {weights.name}, which its {ADAPTER_CONFIG} belongs to. Save the adapter as safetensors, "
            "or download it again."
        )
    tensors = read_header(weights)
    return (_mlx_adapter if is_mlx else _peft_adapter)(folder, settings, tensors, config)


def unmerged(
    folder: Path, tensors: Mapping[str, TensorInfo], config: ModelConfig
) -> tuple[dict[str, TensorInfo], Adapter | None]:
    """The tensors of a model and the adapter that was saved within them; None where there is none that is whole."""
    file = folder / ADAPTER_CONFIG
    names = [found["adapter"] for name in tensors if (found := _PEFT.fullmatch(name))]
    if not names or not file.is_file():
        return dict(tensors), None
    if len(set(names)) > 1:
        several = ", ".join(sorted(map(str, set(names))))
        raise CheckpointError(
            f"{folder} holds several adapters, {several}, and does not say which are to be used. {_WITH_PEFT}"
        )
    plain, own = {}, {}
    wrapped = {name: found for name in tensors if (found := _REPLACED.fullmatch(name))}
    trained = {found["module"] for name, found in wrapped.items() if "original_module" not in name}
    for name, info in tensors.items():
        if _PEFT.fullmatch(name):
            own[name] = info
        elif name not in wrapped:
            plain[_BASE.sub("", name)] = info
        elif "original_module" not in name or wrapped[name]["module"] not in trained:
            plain[f"{wrapped[name]['module']}.{wrapped[name]['leaf']}"] = info
    return plain, _peft_adapter(folder, read_json_object(file), own, config)


def _peft_adapter(
    folder: Path, settings: dict[str, object], tensors: Mapping[str, TensorInfo], config: ModelConfig
) -> Adapter:
    fields = Fields(settings, ADAPTER_CONFIG)
    _check_rules(folder, settings)
    parts = _sorted(tensors, _PEFT)
    pairs: dict[str, Pair] = {}
    experts: dict[str, tuple[Pair, ...]] = {}
    for names in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        for module, a, b, magnitude in parts.pairs((*names, "lora_magnitude_vector")):
            base = _BASE.sub("", module)
            is_shared = base.endswith(".experts")
            scale, rank = _scale(fields, base, a.shape[0], is_shared)
            pair = Pair(a.name, a, b, scale, rank, magnitude)
            if is_shared:
                name = mlx_name(f"{base}.weight", config).removesuffix(".weight")
                experts[name] = (*experts.get(name, ()), pair)
            else:
                pairs[mlx_name(f"{base}.weight", config)] = pair
    whole = {mlx_name(_BASE.sub("", _saved(name)), config): info for name, info in parts.rest.items()}
    return Adapter(folder, pairs, experts, whole, ties=settings.get("ensure_weight_tying") is True)


def _mlx_adapter(
    folder: Path, settings: dict[str, object], tensors: Mapping[str, TensorInfo], config: ModelConfig
) -> Adapter:
    fields = Fields(settings, ADAPTER_CONFIG)
    if settings.get("fine_tune_type", "lora") == "full":
        whole = {mlx_name(name, config): info for name, info in tensors.items()}
        return Adapter(folder, {}, {}, whole, is_mlx=True, ties=True)
    scale = fields.object("lora_parameters").number("scale", 0)
    parts = _sorted(tensors, _MLX)
    pairs = {
        mlx_name(f"{module}.weight", config): Pair(a.name, a, b, scale, a.shape[-1], magnitude, is_mlx=True)
        for module, a, b, magnitude in parts.pairs(("lora_a", "lora_b", "m"))
    }
    whole = {mlx_name(name, config): info for name, info in parts.rest.items()}
    return Adapter(folder, pairs, {}, whole, is_mlx=True, ties=True)


def _sorted(tensors: Mapping[str, TensorInfo], pattern: re.Pattern[str]) -> _Parts:
    parts = _Parts()
    for name, info in tensors.items():
        found = pattern.fullmatch(name)
        if found is None:
            parts.rest[name] = info
        else:
            parts.by_module.setdefault(found["module"], {})[found["part"]] = info
    return parts


def _saved(name: str) -> str:
    """The name of a tensor of `modules_to_save`, which older versions of PEFT write with the wrapper's."""
    found = _REPLACED.fullmatch(name)
    return name if found is None else f"{found['module']}.{found['leaf']}"


def _check_rules(folder: Path, settings: Mapping[str, object]) -> None:
    """Raise CheckpointError for what is no sum of a matrix and a product of two."""
    kind, beginning = settings.get("peft_type", "LORA"), settings.get("init_lora_weights", True)
    said = f"peft_type {kind!r}" if kind != "LORA" else next((key for key in _OTHER_RULES if settings.get(key)), None)
    if said is None and isinstance(beginning, str) and beginning not in _PLAIN_BEGINNINGS:
        said = f"init_lora_weights {beginning!r}, which changes the model's own weights first"
    if said is not None:
        raise CheckpointError(f"{ADAPTER_CONFIG} of {folder} has {said:.200}, which is not merged here. {_WITH_PEFT}")


def _scale(fields: Fields, module: str, rows: int, is_shared: bool) -> tuple[float, int]:
    """What the product of a module's factors is multiplied by, and their rank; the first of them has `rows`."""
    name = module.removeprefix("base_model.model.")
    ranks, alphas = (
        Fields(_pattern(fields, key, name), f"{fields.place}.{key}") for key in ("rank_pattern", "alpha_pattern")
    )
    rank = ranks.integer("found") if ranks.values else fields.integer("r", 8)
    if rows % rank or (rows != rank and not is_shared):
        raise CheckpointError(
            f"{module} has factors of rank {rows}, {ADAPTER_CONFIG} says {rank}. They are of different adapters: save "
            "or download the adapter again."
        )
    alpha = alphas.number("found", 8) if alphas.values else fields.number("lora_alpha", 8)
    return alpha / (math.sqrt(rank) if fields.flag("use_rslora", False) else rank), rank


def _pattern(fields: Fields, key: str, module: str) -> dict[str, object]:
    """What the patterns under `key` say of a module, as PEFT looks it up; nothing where none fits."""
    patterns = fields.object(key).values if fields.values.get(key) else {}
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return {"found": value}
        except re.error as error:
            raise CheckpointError(
                f"{fields.place}.{key} has {pattern!r:.200}, which is no regular expression ({error}). Correct it."
            ) from error
    return {}
