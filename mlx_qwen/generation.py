"""Writing one answer: `stream_generate` token by token, `generate` at once."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mlx_qwen.answer.response import GenerationResponse
from mlx_qwen.engine.caching import kv_cache_summary
from mlx_qwen.json_types import Tools
from mlx_qwen.model import Model
from mlx_qwen.model.cache import HybridCache
from mlx_qwen.options import GenerationOptions, LogitsProcessor, Progress, Sampler
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.inputs import Prompt, prompt_inputs
from mlx_qwen.prompt.placed import describe
from mlx_qwen.requests import stream_answer, write_batch

if TYPE_CHECKING:
    from mlx_qwen.media.image_sources import ImageSource
    from mlx_qwen.media.video_sources import VideoSource


def stream_generate(
    model: Model,
    processor: Processor,
    prompt: Prompt,
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
    prompt_cache: HybridCache | None = None,
    prefill_step_size: int = 2048,
    kv_bits: int | None = None,
    images: "Sequence[ImageSource] | None" = None,
    videos: "Sequence[VideoSource] | None" = None,
    max_pixels: int | None = None,
    min_pixels: int | None = None,
    total_pixels: int | None = None,
    fps: float | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    progress: Progress | bool = False,
) -> Iterator[GenerationResponse]:
    """Writes an answer and yields a response for each of its tokens.

    Args:
        model: from `load`.
        processor: from `load`.
        prompt: text, used as it stands; token ids; or chat messages, to which the chat template is applied. Messages
            may hold images: {"type": "image", "image": a path, URL, data URL, bytes, pillow image or array}, and
            videos: {"type": "video", "video": a path, URL, data URL, bytes, list of frames or array [T, H, W, 3]},
            each with choices of its own such as "max_pixels", "fps" or "max_frames".
        max_tokens: most tokens to generate; fewer where the model's context ends.
        temperature: 0 takes the likeliest token. Sampling options left at None take Qwen's recommendation for the
            model's size and mode, or greedy decoding where generation_config.json says `do_sample: false`.
        top_p: keep the likeliest tokens that together reach this probability; 1 keeps all.
        top_k: keep this many of the likeliest tokens; 0 keeps all.
        min_p: keep tokens with at least this fraction of the likeliest one's probability; 0 keeps all.
        presence_penalty: subtracted from the logits of every token that is already in the answer.
        repetition_penalty: divides positive logits of tokens in cache, prompt and answer, and multiplies negative ones.
        seed: makes sampling repeatable; None draws one from `mx.random`.
        tools: functions that the model may call, as JSON descriptions; used with chat messages.
        enable_thinking: whether a chat answer begins with reasoning; None takes the default of the model's size.
        thinking_budget: most tokens of reasoning; after them it is closed, and the answer follows.
        preserve_thinking: whether earlier turns keep their reasoning, for templates that know the choice.
        stop: text that ends the answer and is not part of it.
        sampler: draws the token instead: log-probabilities fp32 [1, V] to a token [1].
        logits_processors: each maps all tokens so far [n] and logits fp32 [1, V] to logits, after the penalties.
        prompt_cache: from `model.make_cache()`: the prompt goes on after what it has seen, and it is updated.
        prefill_step_size: prompt tokens that are read at once.
        kv_bits: 8 or 4 packs keys and values of the attention layers.
        images: go in front of the last user's words in chat messages, or to the prompt's own placeholders.
        videos: go behind the images. Files need the extra `video`; animations and lists of frames do not.
        max_pixels: area to which larger images, and larger frames of a video, are shrunk. This and the following
            choices are the checkpoint's own when left at None.
        min_pixels: area to which smaller images and frames are enlarged.
        total_pixels: area of all frames of a video together.
        fps: frames taken from a second of video; a list of frames counts as taken at this rate already.
        min_frames: fewest frames taken from a video that has as many.
        max_frames: most frames taken from a video.
        progress: called with (done, total) prompt tokens, or True for a line on stderr, in a notebook an output.

    Raises:
        PromptError: an option or the prompt cannot be used (at once, before anything is computed).
        MLXQwenError: the model's logits are not numbers.
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
        prompt_cache=prompt_cache,
        prefill_step_size=prefill_step_size,
        kv_bits=kv_bits,
        images=images,
        videos=videos,
        max_pixels=max_pixels,
        min_pixels=min_pixels,
        total_pixels=total_pixels,
        fps=fps,
        min_frames=min_frames,
        max_frames=max_frames,
        progress=progress,
    )
    return stream_answer(model, processor, prompt, options)


def generate(
    model: Model,
    processor: Processor,
    prompt: Prompt,
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
    prompt_cache: HybridCache | None = None,
    prefill_step_size: int = 2048,
    kv_bits: int | None = None,
    images: "Sequence[ImageSource] | None" = None,
    videos: "Sequence[VideoSource] | None" = None,
    max_pixels: int | None = None,
    min_pixels: int | None = None,
    total_pixels: int | None = None,
    fps: float | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    progress: Progress | bool = False,
    verbose: bool = False,
) -> str:
    """Writes an answer and returns its whole raw text, reasoning tags and tool calls included.

    Options and errors are those of `stream_generate`; `verbose` prints what images and videos became, the text as it
    comes, then statistics.
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
        prompt_cache=prompt_cache,
        prefill_step_size=prefill_step_size,
        kv_bits=kv_bits,
        images=images,
        videos=videos,
        max_pixels=max_pixels,
        min_pixels=min_pixels,
        total_pixels=total_pixels,
        fps=fps,
        min_frames=min_frames,
        max_frames=max_frames,
        progress=progress,
    )
    if verbose and kv_bits is not None:
        print(kv_cache_summary(model, kv_bits))
    inputs = prompt_inputs(processor, prompt, options)
    for one in inputs.media if verbose else ():
        print(describe(processor, one.patches))
    pieces = []
    for response in stream_answer(model, processor, inputs, options):
        pieces.append(response.text)
        if verbose:
            print(response.text, end="", flush=True)
    if verbose:
        print(f"\n{'=' * 10}\n{response.statistics()}")
    return "".join(pieces)


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
    return [response.text for response in write_batch(model, processor, prompts, options)]
