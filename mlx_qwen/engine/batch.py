"""Writing several answers at once."""

from collections.abc import Mapping, Sequence

import mlx.core as mx

from mlx_qwen.answer.response import Clock, GenerationResponse
from mlx_qwen.engine.caching import new_cache
from mlx_qwen.engine.embedding import embedded
from mlx_qwen.engine.prefill import prefill, progress_callback
from mlx_qwen.engine.sequence import Request, prepare_request
from mlx_qwen.engine.step import decode
from mlx_qwen.engine.stream import response
from mlx_qwen.engine.transcript import Answer
from mlx_qwen.engine.wired import wired_memory
from mlx_qwen.errors import PromptError
from mlx_qwen.model import Model
from mlx_qwen.options import EngineSettings, GenerationOptions
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.inputs import Prompt


def write_batch(
    model: Model,
    processor: Processor,
    prompts: Sequence[Prompt],
    options: GenerationOptions,
    settings: EngineSettings,
) -> list[GenerationResponse]:
    """As `batch_generate` with responses, with options and settings as values."""
    if isinstance(prompts, str | bytes) or not hasattr(prompts, "__len__"):
        raise PromptError("batch_generate takes a list of prompts; for a single one use generate.")
    if any(isinstance(prompt, Mapping) for prompt in prompts):
        raise PromptError(
            "batch_generate takes a list of conversations, each a list of messages; this is one conversation. "
            "Put it into a list, or use generate."
        )
    if len(prompts) == 0:
        return []
    requests = [prepare_request(model, processor, prompt, options, index=i) for i, prompt in enumerate(prompts)]
    answers = [Answer(processor, request, options) for request in requests]
    with wired_memory():
        return _write(model, requests, answers, settings)


def _write(
    model: Model, requests: list[Request], answers: list[Answer], settings: EngineSettings
) -> list[GenerationResponse]:
    clock = Clock()
    tokens, mask = left_padded([request.ids for request in requests])
    cache = new_cache(model, settings.kv_bits)
    logits = prefill(
        model,
        tokens,
        cache,
        mask=mask,
        embedded=embedded(model, tokens, cache, requests, mask=mask),
        step_size=settings.prefill_step_size,
        progress=progress_callback(settings.progress),
    )
    clock.prompt_done()
    longest = max(request.max_tokens for request in requests)
    last: dict[int, GenerationResponse] = {}
    for step in decode(model, cache, logits, [request.row for request in requests], max_tokens=longest):
        for row, (request, answer) in enumerate(zip(requests, answers, strict=True)):
            if not answer.finish_reason:
                answer.push(step.tokens[row])
                if answer.finish_reason:
                    last[row] = response(answer.text, step, request, answer, clock, row=row)
        if len(last) == len(answers):
            break
    return [last[row] for row in range(len(answers))]


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[mx.array, mx.array | None]:
    """Token ids [B, T] with shorter rows padded at the left, and the mask [B, T], False there; None without padding."""
    T = max(len(row) for row in rows)
    tokens = mx.array([[0] * (T - len(row)) + list(row) for row in rows])
    if all(len(row) == T for row in rows):
        return tokens, None
    return tokens, mx.array([[False] * (T - len(row)) + [True] * len(row) for row in rows])
