"""Which tokens a cache has seen, and which parts of it are packed."""

from collections.abc import Sequence

from mlx_qwen.errors import PromptError
from mlx_qwen.model import Model
from mlx_qwen.model.cache import HybridCache
from mlx_qwen.value_types import shown

_UNKNOWN = -1


def check_cache(model: Model, cache: HybridCache | None, kv_bits: int | None) -> None:
    """Raises PromptError for what is no cache of this model, or was to be packed after it was made."""
    if cache is None:
        return
    if not isinstance(cache, HybridCache):
        raise PromptError(f"prompt_cache is {shown(cache)}; expected what model.make_cache() returns, or None.")
    if cache.text != model.config.text:
        raise PromptError("prompt_cache is of another model; expected what make_cache() of this one returns.")
    if kv_bits is not None:
        raise PromptError("kv_bits belongs to the cache: pass model.make_cache(kv_bits=...) as prompt_cache.")


def seen_tokens(cache: HybridCache) -> list[int]:
    """The ids behind `cache.offset`, without those that the model was called with directly: they are not known."""
    return [token for token in cache.tokens[: cache.offset] if token != _UNKNOWN]


def note_tokens(cache: HybridCache, ids: Sequence[int]) -> None:
    """Remembers the ids that are read next, after as many as the cache has seen now."""
    del cache.tokens[cache.offset :]
    cache.tokens += [_UNKNOWN] * (cache.offset - len(cache.tokens))
    cache.tokens += ids


def kv_cache_summary(model: Model, kv_bits: int) -> str:
    """Which layers' caches `kv_bits` packs, in one line."""
    layers = [i for i, kind in enumerate(model.config.text.layer_types) if kind == "full_attention"]
    named = ", ".join(str(index) for index in layers[:2]) + (", …" if len(layers) > 2 else "")
    rest = len(model.layers) - len(layers)
    return (
        f"KV cache: {kv_bits} bits in {len(layers)} attention layers ({named}); "
        f"the {rest} linear-attention layers keep fp32 state"
    )
