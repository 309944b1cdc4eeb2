"""`plan`: from a model and a machine to what fits and how fast it could be at most."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from mlx_qwen.config import TextConfig
from mlx_qwen.declared import check_keywords, check_value, chosen, takes
from mlx_qwen.errors import PlanningError, ShardingError
from mlx_qwen.model.network import Network, traffic
from mlx_qwen.model.sharding import Share

from .bounds import bound, work_of
from .chips import CHIPS, Chip
from .described import Described, describe
from .machine import machine
from .memory import Needs, held_kv_bytes, state_bytes
from .options import PlanKeywords, PlanOptions
from .planned import Plan, resident_bytes, size
from .weight_sizes import LADDER, recipe_named, weights_of

DEFAULT_CONTEXT = 32768


@takes(PlanOptions)
def plan(model: str | Path, **options: Unpack[PlanKeywords]) -> Plan:
    """Work out the memory of a model, whether it fits, and bounds of its speed, without loading it.

    Weights are counted as the converter would write them. Bounds are what bandwidth and arithmetic allow at most; they
    are no measurements.

    Args:
        model: a released size such as "35B-A3B", a model folder, or a Hub repository, of which only the configuration
            is read.
        {options}

    Raises:
        PlanningError: the model, bits, recipe, context, chip or memory cannot be planned for, or an option is unknown
            or of the wrong type.
        PromptError: the model's keys and values cannot be packed to `kv_bits`.
        ShardingError: the ranks do not divide the model.
        ConfigError, CheckpointError: the model's configuration or files cannot be used.
    """
    check_value("model", model, str | Path, error=PlanningError)
    check_keywords(options, PlanOptions, error=PlanningError)
    asked = chosen(PlanOptions, options)
    target = machine(asked.chip, asked.memory)
    described = describe(model, revision=asked.revision)
    whole, step, kv_bits = described.config.text, asked.prefill_step_size, asked.kv_bits
    tokens = _checked(asked.context, step, whole)
    recipe = recipe_named(asked.recipe, asked.bits)
    weights = weights_of(described, recipe, ranks=asked.ranks)
    text = Share(whole, 0, asked.ranks).text
    needs = Needs(text, step, kv_bits)
    room = target.usable - resident_bytes(weights, vision=asked.vision)
    work = work_of(
        replace(text, vocab_size=text.vocab_size // asked.ranks), weights, tokens, step=step, kv_bits=kv_bits
    )
    chips = CHIPS if target.chip is None else (target.chip,)
    return Plan(
        model=str(model),
        context=tokens,
        prefill_step_size=step,
        weights=weights,
        kv=held_kv_bytes(text, tokens, kv_bits=kv_bits),
        kv_bits=kv_bits,
        state=state_bytes(text),
        activations=needs.activations(tokens),
        vision=asked.vision,
        ranks=asked.ranks,
        network=_waiting(whole, asked),
        stored=weights if asked.ranks == 1 else weights_of(described, recipe),
        machine=target,
        largest_context=_largest(needs.beside_weights, room, text.max_position_embeddings),
        best_recipe=_best(described, target.usable - needs.beside_weights(tokens), asked),
        work=work,
        bounds=tuple(bound(work, _with_rate(each, asked.tflops)) for each in chips),
        has_files=described.has_files,
    )


def room_for_weights(
    model: str | Path,
    *,
    memory: int | str,
    context: int | None = None,
    kv_bits: int | None = None,
    prefill_step_size: int = 2048,
    revision: str | None = None,
) -> int:
    """Bytes that a model's weights may take on a Mac of this memory: what its GPU may use, less all else that is there.

    All else are keys, values and state at the end of the context and activations while the prompt is read. Arguments
    are those of `plan`.

    Raises:
        PlanningError: as `plan` does, and when not even the context fits.
    """
    target = machine(None, memory)
    text = describe(model, revision=revision).config.text
    tokens = _checked(context, prefill_step_size, text)
    beside = Needs(text, prefill_step_size, kv_bits).beside_weights(tokens)
    if beside >= target.usable:
        raise PlanningError(
            f"A context of {tokens:,} tokens takes {size(beside)} without any weights, but of {size(target.memory)} of "
            f"memory {size(target.usable)} are for the model. Ask for a shorter context or more memory."
        )
    return target.usable - beside


def _best(described: Described, room: int, asked: PlanOptions) -> str | None:
    """The recipe of the ladder with the most bytes that still has room; None when not even the smallest has."""
    sizes = {}
    for name in LADDER:
        with suppress(ShardingError):  # its groups are larger than what a rank would hold of a row
            sizes[name] = resident_bytes(weights_of(described, name, ranks=asked.ranks), vision=asked.vision)
    return max((name for name in sizes if sizes[name] <= room), key=lambda name: sizes[name], default=None)


def _checked(context: int | None, step: int, text: TextConfig) -> int:
    """The context in tokens; raises PlanningError for one that the model was not made for, or an impossible step."""
    limit = text.max_position_embeddings
    tokens = min(DEFAULT_CONTEXT, limit) if context is None else context
    if not 1 <= tokens <= limit:
        raise PlanningError(f"context is {tokens:,}, expected between 1 and this model's limit of {limit:,} tokens.")
    if step < 1:
        raise PlanningError(f"prefill_step_size is {step}, expected at least 1 token.")
    return tokens


def _largest(needed: Callable[[int], int], room: int, limit: int) -> int | None:
    """The most tokens, up to `limit`, whose `needed` bytes are no more than `room`; `needed` never falls."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle) <= room else (low, middle - 1)
    return low or None


def _with_rate(chip: Chip, tflops: float | None) -> Chip:
    return chip if tflops is None else replace(chip, tflops=tflops)


def _waiting(text: TextConfig, asked: PlanOptions) -> float | None:
    """Seconds that ranks wait for each other for each token."""
    if asked.ranks == 1 or asked.latency is None:
        return None
    return traffic(text).seconds(Network(asked.latency / 1e3, asked.link * 1e9), asked.ranks)
