"""Writing several answers at once."""

from collections.abc import Mapping, Sequence

import mlx.core as mx

from mlx_qwen.engine.caching import new_cache
from mlx_qwen.engine.embedding import embedded
from mlx_qwen.engine.prefill import prefill, progress_callback
from mlx_qwen.engine.sequence import Request, prepare_request
from mlx_qwen.engine.step import decode
from mlx_qwen.engine.transcript import Answer
from mlx_qwen.engine.wired import wired_memory
from mlx_qwen.errors import PromptError
from mlx_qwen.json_types import Tools
from mlx_qwen.model import Model
from mlx_qwen.options import GenerationOptions, LogitsProcessor, Progress, Sampler
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.inputs import Prompt


def batch_generate(
    model: Model,
    processor: Processor,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 2048,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    presence_penalty: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    tools: Tools | None = None,
    enable_thinking: bool | None = None,
    thinking_budget: int | None = None,
    preserve_thinking: bool | None = None,
    stop: str | Sequence[str] | None = None,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    prefill_step_size: int = 2048,
    kv_bits: int | None = None,
    max_pixels: int | None = None,
    min_pixels: int | None = None,
    total_pixels: int | None = None,
    fps: float | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    progress: Progress | bool = False,
) -> list[str]:
    """Writes one answer for each prompt, all at the same time, and returns their raw texts in the prompts' order.

    Options are those of `stream_generate` and hold for every row. Every row stops, is penalized and draws on its own:
    row i equals `generate` with its prompt alone and, when sampling, `seed + i`. Raises as `stream_generate` does.
    """
    options = GenerationOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        presence_penalty=presence_penalty,
        repetition_penalty=repetition_penalty,
        seed=seed,
        tools=tools,
        enable_thinking=enable_thinking,
        thinking_budget=thinking_budget,
        preserve_thinking=preserve_thinking,
        stop=stop,
        sampler=sampler,
        logits_processors=logits_processors,
        prefill_step_size=prefill_step_size,
        kv_bits=kv_bits,
        max_pixels=max_pixels,
        min_pixels=min_pixels,
        total_pixels=total_pixels,
        fps=fps,
        min_frames=min_frames,
        max_frames=max_frames,
        progress=progress,
    )
    if isinstance(prompts, str):
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
        _write(model, requests, answers, options)
    return [answer.text for answer in answers]


def _write(model: Model, requests: list[Request], answers: list[Answer], options: GenerationOptions) -> None:
    tokens, mask = left_padded([request.ids for request in requests])
    cache = new_cache(model, options.kv_bits)
    logits = prefill(
        model,
        tokens,
        cache,
        mask=mask,
        embedded=embedded(model, tokens, cache, requests, mask=mask),
        step_size=options.prefill_step_size,
        progress=progress_callback(options.progress),
    )
    longest = max(request.max_tokens for request in requests)
    for step in decode(model, cache, logits, [request.row for request in requests], max_tokens=longest):
        for answer, token in zip(answers, step.tokens, strict=True):
            if not answer.finish_reason:
                answer.push(token)
        if all(answer.finish_reason for answer in answers):
            return


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[mx.array, mx.array | None]:
    """Token ids [B, T] with shorter rows padded at the left, and the mask [B, T], False there; None without padding."""
    T = max(len(row) for row in rows)
    tokens = mx.array([[0] * (T - len(row)) + list(row) for row in rows])
    if all(len(row) == T for row in rows):
        return tokens, None
    return tokens, mx.array([[False] * (T - len(row)) + [True] * len(row) for row in rows])
