"""`plan`: from a model and a machine to what fits and how fast it could be at most."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mlx_qwen.config import TextConfig
from mlx_qwen.planning.bounds import bound, work_of
from mlx_qwen.planning.chips import CHIPS, Chip, machine
from mlx_qwen.planning.errors import PlanningError
from mlx_qwen.planning.memory import held_kv_bytes, prefill_bytes, state_bytes
from mlx_qwen.planning.report import Plan, resident_bytes
from mlx_qwen.planning.source import describe
from mlx_qwen.planning.weights import PRECISIONS, Weights, weights_of

DEFAULT_CONTEXT = 32768


def plan(
    model: str | Path,
    *,
    bits: int = 4,
    context: int | None = None,
    memory: int | str | None = None,
    chip: str | None = None,
    tflops: float | None = None,
    kv_bits: int | None = None,
    prefill_step_size: int = 2048,
    vision: bool = False,
    revision: str | None = None,
) -> Plan:
    """Work out the memory of a model, whether it fits, and bounds of its speed, without loading it.

    Weights are counted as the converter would write them. Bounds are what bandwidth and arithmetic allow at most; they
    are no measurements.

    Args:
        model: a released size such as "35B-A3B", a model folder, or a Hub repository, of which only the configuration
            is read.
        bits: bits per weight of most matrices: 2, 3, 4, 5, 6 or 8, or 16 to pack none.
        context: tokens of prompt and answer together; by default 32,768, or the model's own limit if that is less.
        memory: of the machine, as "64GB" or in bytes; this machine's when neither it nor `chip` is given.
        chip: an Apple chip such as "M4 Max" for the bounds; with `memory`.
        tflops: the GPU's fp16 arithmetic rate, 10^12 operations a second, for chips without a published one.
        kv_bits: 8 or 4 packs keys and values.
        prefill_step_size: tokens of the prompt read at once.
        vision: count the vision tower, which text alone does not load.
        revision: branch, tag or commit of the Hub repository.

    Raises:
        PlanningError: the model, bits, context, chip or memory cannot be planned for.
        PromptError: the model's keys and values cannot be packed to `kv_bits`.
        ConfigError, CheckpointError: the model's configuration or files cannot be used.
    """
    target = machine(chip, memory)
    described = describe(model, revision=revision)
    text = described.config.text
    tokens = _checked(context, prefill_step_size, text)
    if tflops is not None and tflops <= 0:
        raise PlanningError(f"tflops is {tflops}, expected more than 0.")
    weights = weights_of(described, bits)

    def activations(tokens: int) -> int:
        return prefill_bytes(text, min(tokens, prefill_step_size), tokens, kv_bits=kv_bits)

    def beside(tokens: int) -> int:
        return held_kv_bytes(text, tokens, kv_bits=kv_bits) + state_bytes(text) + activations(tokens)

    def room_beside(weights: Weights) -> int:
        return target.usable - resident_bytes(weights, vision=vision)

    fitting = (each for each in PRECISIONS if beside(tokens) <= room_beside(weights_of(described, each)))
    work = work_of(text, weights, tokens, step=prefill_step_size, kv_bits=kv_bits)
    chips = CHIPS if target.chip is None else (target.chip,)
    return Plan(
        model=str(model),
        context=tokens,
        prefill_step_size=prefill_step_size,
        weights=weights,
        kv=held_kv_bytes(text, tokens, kv_bits=kv_bits),
        kv_bits=kv_bits,
        state=state_bytes(text),
        activations=activations(tokens),
        vision=vision,
        machine=target,
        largest_context=_largest(beside, room_beside(weights), text.max_position_embeddings),
        best_bits=next(fitting, None),
        work=work,
        bounds=tuple(bound(work, _with_rate(each, tflops)) for each in chips),
        has_files=described.has_files,
    )


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
