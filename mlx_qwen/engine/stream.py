"""The path that every single answer takes, from the Python functions and from the command line."""

from collections.abc import Iterator

import mlx.core as mx

from mlx_qwen.answer.response import Clock, GenerationResponse
from mlx_qwen.engine.caching import check_cache, new_cache, note_tokens
from mlx_qwen.engine.embedding import embedded
from mlx_qwen.engine.prefill import prefill, progress_callback
from mlx_qwen.engine.sequence import Request, prepare_request
from mlx_qwen.engine.step import Step, decode
from mlx_qwen.engine.transcript import Answer
from mlx_qwen.engine.wired import wired_memory
from mlx_qwen.model import Model
from mlx_qwen.model.state import HybridCache
from mlx_qwen.options import EngineSettings, GenerationOptions
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.inputs import Prompt, PromptInputs


def stream_answer(
    model: Model,
    processor: Processor,
    prompt: Prompt | PromptInputs,
    options: GenerationOptions,
    settings: EngineSettings,
    prompt_cache: HybridCache | None = None,
) -> Iterator[GenerationResponse]:
    """As `stream_generate`, with options and settings as values. Prompt and cache are checked before this returns."""
    check_cache(model, prompt_cache, settings.kv_bits)
    request = prepare_request(model, processor, prompt, options, cache=prompt_cache)
    cache = prompt_cache if prompt_cache is not None else new_cache(model, settings.kv_bits)
    return _responses(model, cache, request, Answer(processor, request, options), settings)


def _responses(
    model: Model, cache: HybridCache, request: Request, answer: Answer, settings: EngineSettings
) -> Iterator[GenerationResponse]:
    cached, clock = cache.offset, Clock()
    with wired_memory():
        tokens = mx.array([request.ids])
        note_tokens(cache, request.ids)
        logits = prefill(
            model,
            tokens,
            cache,
            embedded=embedded(model, tokens, cache, [request]),
            step_size=settings.prefill_step_size,
            progress=progress_callback(settings.progress),
        )
        clock.prompt_done()
        for step in decode(model, cache, logits, [request.row], max_tokens=request.max_tokens):
            cache.tokens += step.tokens
            text = answer.push(step.tokens[0])
            yield response(text, step, request, answer, clock, cached=cached)
            if answer.finish_reason:
                return


def response(
    text: str, step: Step, request: Request, answer: Answer, clock: Clock, *, row: int = 0, cached: int = 0
) -> GenerationResponse:
    """What one row of a step adds to its answer."""
    parsed = answer.parsed() if answer.finish_reason else None
    return GenerationResponse(
        text=text,
        token=step.tokens[row],
        logprobs=step.logprobs[row][0],
        from_draft=False,
        prompt_tokens=len(request.ids),
        prompt_tps=clock.prompt_tps(len(request.ids)),
        generation_tokens=answer.num_tokens,
        generation_tps=clock.generation_tps(answer.num_tokens),
        peak_memory=mx.get_peak_memory() / 1e9,
        finish_reason=answer.finish_reason,
        cached_tokens=cached,
        reasoning=parsed.reasoning if parsed else None,
        tool_calls=parsed.tool_calls if parsed else (),
    )
