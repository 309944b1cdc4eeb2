"""What a checkpoint's weights say where its config.json is silent, or says what they are not."""

import warnings
from collections.abc import Mapping
from dataclasses import replace

from mlx_qwen.checkpoint.names import MTP_PREFIX, text_prefix
from mlx_qwen.checkpoint.shards import TensorInfo
from mlx_qwen.config import Json, ModelConfig

_PARTS = ("weight", "scales", "biases")
_COMPARED_BYTES = 32 << 20


def settled(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> tuple[ModelConfig, dict[str, TensorInfo]]:
    """`config` as the tensors, by MLX name, have it, and these as the config then asks for them.

    A head of its own is used where it differs from the embedding that it is said to be tied to, as transformers 5 does;
    an equal one is left, and the only copy of both may be either. An MTP layer that nobody mentions is one.
    """
    config, tensors = _with_head(config, dict(tensors))
    return _with_mtp(config, tensors), tensors


def is_said_to_be_tied(config: ModelConfig) -> bool:
    """Whether config.json ties head and embedding at its top or in its text_config."""
    places: tuple[Json, ...] = (config.raw, config.raw.get("text_config") or {})
    return any(place.get("tie_word_embeddings") is True for place in places)


def _with_head(config: ModelConfig, tensors: dict[str, TensorInfo]) -> tuple[ModelConfig, dict[str, TensorInfo]]:
    if not is_said_to_be_tied(config):
        return config, tensors
    prefix = text_prefix(config)
    head, embedding = f"{prefix}lm_head.", f"{prefix}model.embed_tokens."
    heads, embeddings = ({part: tensors.get(f"{base}{part}") for part in _PARTS} for base in (head, embedding))
    if heads["weight"] is None:
        return _tied(config, True), tensors
    if embeddings["weight"] is None:
        for part, info in heads.items():
            if info is not None:
                tensors[f"{embedding}{part}"] = tensors.pop(f"{head}{part}")
        return _tied(config, True), tensors
    if all(are_equal(heads[part], embeddings[part]) for part in _PARTS):
        return _tied(config, True), {name: info for name, info in tensors.items() if not name.startswith(head)}
    warnings.warn(
        "config.json says that the head is tied to the embeddings, but the checkpoint has a head of its own, which is "
        "used.",
        stacklevel=4,
    )
    return _tied(config, False), tensors


def _tied(config: ModelConfig, tied: bool) -> ModelConfig:
    return replace(config, text=replace(config.text, tie_word_embeddings=tied))


def are_equal(a: TensorInfo | None, b: TensorInfo | None) -> bool:
    """Whether two stored tensors hold the same bytes; what is not on this machine counts as different."""
    if a is None or b is None or a.is_computed or b.is_computed:
        return a is b
    if (a.dtype, a.shape) != (b.dtype, b.shape) or not (a.file.is_file() and b.file.is_file()):
        return False
    for start in range(0, a.nbytes, _COMPARED_BYTES):
        count = min(_COMPARED_BYTES, a.nbytes - start)
        if a.load("u1", count, a.offset + start).tobytes() != b.load("u1", count, b.offset + start).tobytes():
            return False
    return True


def _with_mtp(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> ModelConfig:
    text: Json = config.raw.get("text_config") or config.raw
    is_silent = text.get("mtp_num_hidden_layers") is None
    if not is_silent or not {f"{MTP_PREFIX}fc.weight", f"{MTP_PREFIX}norm.weight"} <= tensors.keys():
        return config
    return replace(config, text=replace(config.text, mtp_num_hidden_layers=1))
