"""States as tensors by name, and a state in one safetensors file, read back bit for bit."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_qwen.engine import sealed
from mlx_qwen.errors import PromptError
from mlx_qwen.model import Model
from mlx_qwen.model.cache import HybridCache
from mlx_qwen.model.chain import Chain, Packing, Quantized, Rows
from mlx_qwen.model.state import LinearState, State

FORMAT = "mlx-qwen prompt cache"
VERSION = 1
_IDS = "ids"


class Saved(NamedTuple):
    """A state, and the token ids that led to it."""

    state: State
    ids: list[int]


def save_state(path: str | Path, state: State, ids: Sequence[int], *, identity: str = "") -> None:
    """Write a state of at least one token into one safetensors file, which has its name only once it is whole.

    Args:
        path: the file, as a rule `*.safetensors`.
        state: of one sequence, or of a batch.
        ids: the tokens that led to it, as far as they are known.
        identity: of the model, from `model_identity`; `load_state` compares it.

    Raises:
        PromptError: the state is empty, or the file cannot be written.
    """
    path = Path(path)
    if not state.offset:
        raise PromptError("The prompt cache is empty: nothing was read yet that could be saved.")
    tensors = {_IDS: mx.array(list(ids), mx.int64)} if len(ids) else {}
    tensors |= {**fixed_tensors(state), **row_tensors(state, 0, state.offset)}
    metadata = {"format": FORMAT, "version": str(VERSION), "identity": identity, "state": json.dumps(described(state))}
    try:
        sealed.write(path, tensors, metadata)
    except OSError as error:
        raise PromptError(f"The prompt cache cannot be written to {path} ({error}). Choose another file.") from error


def load_state(path: str | Path, *, identity: str | None = None) -> Saved:
    """Read what `save_state` wrote.

    Raises PromptError for a file that is missing, damaged, of a newer version, or, where `identity` is given, of
    another model.
    """
    path = Path(path)
    try:
        tensors, metadata = sealed.read(path)
    except OSError as error:
        raise PromptError(f"The prompt cache {path} cannot be read ({error}). Check the path.") from error
    except sealed.DamagedError as error:
        raise PromptError(f"{path} is no prompt cache of mlx-qwen, or damaged: {error}. Make it again.") from error
    if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
        found = f"{metadata.get('format')!r} in version {metadata.get('version')}"
        raise PromptError(f"{path} holds {found}, expected {FORMAT!r} in version {VERSION}. Make it again.")
    if identity is not None and metadata["identity"] != identity:
        raise PromptError(f"The prompt cache {path} is of another model, or of another precision. Make it again.")
    ids: list[int] = tensors.pop(_IDS).tolist() if _IDS in tensors else []  # type: ignore[assignment]
    return Saved(rebuilt(json.loads(metadata["state"]), {name: [part] for name, part in tensors.items()}), ids)


def save_prompt_cache(path: str | Path, cache: HybridCache) -> None:
    """Write a cache from `model.make_cache()`, and the tokens it knows, into one safetensors file.

    Args:
        path: the file, as a rule `*.safetensors`; it has its name only once it is whole.
        cache: what a prompt has been read into.

    Raises:
        PromptError: the cache is empty or its model cannot be told from others, or the file cannot be written.
    """
    if cache.offset and not cache.identity:
        raise PromptError(
            "This prompt cache cannot be saved: its model was not loaded from a folder, or its weights were changed "
            "since, so that nothing tells whom it belongs to. Save the model, and load it from there."
        )
    save_state(path, cache.state, cache.tokens[: cache.offset], identity=cache.identity)


def load_prompt_cache(path: str | Path, model: Model) -> HybridCache:
    """Read what `save_prompt_cache` wrote, to be given as `prompt_cache`: the next prompt goes on after it.

    Raises PromptError for a file that is missing, damaged, of a newer version, or of another model or precision.
    """
    saved = load_state(path, identity=model.identity)
    cache = HybridCache(saved.state, model.config.text, model.identity)
    cache.tokens = saved.ids
    return cache


def described(state: State) -> dict[str, Any]:
    """What a state's tensors do not tell, for JSON."""
    packing = state.chains[0].packing
    return {
        "chains": [[chain.length, _layers(chain)] for chain in state.chains],
        "mtp": [[chain.length, 1] for chain in state.mtp],
        "packing": None if packing is None else list(packing),
        "rope_delta": None if state.rope_delta is None else list(state.rope_delta),
        "linear": len(state.linear),
    }


def fixed_tensors(state: State) -> dict[str, mx.array]:
    """The tensors whose size does not grow."""
    tensors = {f"linear.{i}.{name}": part for i, entry in enumerate(state.linear) for name, part in _named(entry)}
    optional = {"last": state.last, "padding": state.padding}
    return tensors | {name: part for name, part in optional.items() if part is not None}


def row_tensors(state: State, start: int, end: int) -> dict[str, mx.array]:
    """Keys and values of the tokens `start` to `end`, [2, B, Hkv, tokens, D] a layer, as views."""
    tensors: dict[str, mx.array] = {}
    for name, chains in (("chains", state.chains), ("mtp", state.mtp)):
        for i, chain in enumerate(chains):
            for layer in range(_layers(chain)):
                rows = chain.read(layer)
                if rows is not None and start < chain.length:
                    stored = rows._asdict() if isinstance(rows, Quantized) else {"rows": rows}
                    tensors |= {f"{name}.{i}.{layer}.{part}": held[..., start:end, :] for part, held in stored.items()}
    return tensors


def rebuilt(description: Mapping[str, Any], tensors: Mapping[str, Sequence[mx.array]]) -> State:
    """The state that `described` and the tensors make; rows may come in several parts, one after the other.

    Raises KeyError where a tensor is missing, and ValueError where one holds other than all tokens.
    """
    packing = None if description["packing"] is None else Packing(*description["packing"])

    def rows(prefix: str, length: int) -> Rows:
        if packing is None:
            return _joined(tensors[f"{prefix}.rows"], length)
        return Quantized(*(_joined(tensors[f"{prefix}.{part}"], length) for part in Quantized._fields))

    def chains(name: str) -> Iterator[Chain]:
        for i, (length, layers) in enumerate(description[name]):
            held = [rows(f"{name}.{i}.{layer}", length) if length else None for layer in range(layers)]
            yield Chain.holding(held, length, packing)

    linear = [
        LinearState(*(tensors[f"linear.{i}.{part}"][0] for part in LinearState._fields))
        for i in range(description["linear"])
    ]
    delta = description["rope_delta"]
    last, padding = (tensors[name][0] if name in tensors else None for name in ("last", "padding"))
    state = State(
        tuple(chains("chains")),
        tuple(linear),
        None if delta is None else tuple(delta),
        padding,
        last,
        tuple(chains("mtp")),
    )
    mx.eval(state.arrays())
    return state


def _layers(chain: Chain) -> int:
    return len(chain.buffers()) // (1 if chain.packing is None else len(Quantized._fields))


def _named(entry: LinearState) -> list[tuple[str, mx.array]]:
    return list(entry._asdict().items())


def _joined(parts: Sequence[mx.array], length: int) -> mx.array:
    joined = parts[0] if len(parts) == 1 else mx.concatenate(list(parts), axis=-2)
    if joined.shape[-2] != length:
        raise ValueError(f"rows of {joined.shape[-2]} tokens, expected {length}")
    mx.eval(joined)
    return joined
