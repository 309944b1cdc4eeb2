"""Which tokens a cache has seen, and which parts of it are packed."""

from collections.abc import Sequence

from mlx_qwen.model import Model
from mlx_qwen.model.cache import HybridCache

_UNKNOWN = -1


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
