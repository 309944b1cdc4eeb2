"""From a prompt and its options to a sequence of the engine, and from its tokens to responses."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TypedDict

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_qwen.answer import AnswerDelta
from mlx_qwen.answer.response import Clock, GenerationResponse
from mlx_qwen.drafting import draft_model_of, drafting_of, drafts_of, lookup_of, vocabulary_of
from mlx_qwen.engine.anchors import Marks, Span, anchors, question_end
from mlx_qwen.engine.caching import check_cache, seen_tokens
from mlx_qwen.engine.constraint import constraint_of
from mlx_qwen.engine.emission import Emission
from mlx_qwen.engine.engine import Engine, engine_of
from mlx_qwen.engine.prefix import prefix_key
from mlx_qwen.engine.prefix_files import PrefixFiles
from mlx_qwen.engine.rules import Rules
from mlx_qwen.engine.sampling import TokenSampler
from mlx_qwen.engine.sequence import Medium
from mlx_qwen.engine.sequence import Sequence as Answering
from mlx_qwen.engine.thinking import Thinking
from mlx_qwen.engine.token_names import TokenNames
from mlx_qwen.engine.transcript import Answer
from mlx_qwen.errors import PromptError
from mlx_qwen.forked import note_computing
from mlx_qwen.model import Model
from mlx_qwen.model.cache import HybridCache, kv_packing
from mlx_qwen.model.multimodal import Pixels
from mlx_qwen.model.qwen import NO_VISION
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.effort import thinking_budget
from mlx_qwen.prompt.inputs import Prompt, PromptInputs, check_fits, prompt_inputs, room_for_answer
from mlx_qwen.prompt.placed import Placed, feature_count
from mlx_qwen.recommended import GREEDY, SamplingParameters, recommended_sampling, stated_sampling
from mlx_qwen.settings import EngineSettings, Progress
from mlx_qwen.status_line import StatusLine


class _Kept(TypedDict, total=False):
    """Fields of a sequence whose states are kept for others; one without them is read without cuts at anchors."""

    key: npt.NDArray[np.int64]
    find_anchors: Callable[[int], list[int]]
    answer_from: int
    folder: PrefixFiles | None
    prefix_bytes: int | None


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request was made of: it makes the same one where the same model is."""

    inputs: PromptInputs
    options: GenerationOptions
    settings: EngineSettings
    index: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """An answer that is asked for: its sequence, the text made of its tokens, and their names where asked for."""

    sequence: Answering
    answer: Answer
    named: TokenNames | None = None


def prepare_request(
    model: Model,
    processor: Processor,
    prompt: Prompt | PromptInputs,
    options: GenerationOptions,
    settings: EngineSettings,
    *,
    cache: HybridCache | None = None,
    index: int = 0,
) -> Request:
    """Encodes a prompt that goes on after `cache` and checks it (PromptError); row `index` draws by `seed + index`."""
    note_computing()
    model.notice_changes()
    text = model.config.text
    check_cache(model, cache, settings.kv_bits)
    cached, seen = (0, []) if cache is None else (cache.offset, seen_tokens(cache))
    inputs = prompt if isinstance(prompt, PromptInputs) else prompt_inputs(processor, prompt, options)
    ids = inputs.ids
    if inputs.media and model.vision is None:
        raise PromptError(NO_VISION)
    check_fits(ids, text, cached=cached)
    kv_packing(text, settings.kv_bits)
    inside = processor.opens_thinking(ids)
    sampler = TokenSampler(
        sampling_parameters(model, processor, options, thinking=inside, pictures=bool(inputs.media)),
        prompt=mx.array([*seen, *ids]),
        vocab_size=text.vocab_size,
        seed=None if options.seed is None else options.seed + index,
        sampler=options.sampler,
        logits_processors=options.logits_processors or (),
        logit_bias=options.logit_bias,
        top_logprobs=options.logprobs or 0,
        spared_by_xtc=[*processor.encode("\n"), *processor.end_token_ids],
    )
    max_tokens = room_for_answer(ids, text, options.max_tokens, cached=cached)
    constraint = constraint_of(options, processor, text.vocab_size, inside=inside)
    most_thinking = thinking_budget(processor, options, max_tokens=max_tokens)
    if constraint.whole and inside and most_thinking is None:
        most_thinking = max_tokens // 2
    thinking = Thinking.of(processor, most_thinking, inside=inside, loops=options.close_loops)
    answer = Answer(
        processor.stream(),
        end_token_ids=processor.end_token_ids,
        max_tokens=max_tokens,
        inside_thinking=inside,
        tools=options.tools,
        stop=options.stop_strings,
        stop_in_reasoning=options.stop_in_reasoning,
        thinking=None if constraint.whole else thinking,
        most_calls=constraint.most_calls,
    )
    sequence = Answering(
        ids=ids,
        sampler=sampler,
        rules=Rules([one for one in (thinking, constraint.rule) if one], constrain=constraint.rule is not None),
        follower=answer,
        max_tokens=max_tokens,
        drafts=drafts_of(settings, sampler),
        draft_model=draft_model_of(model, processor, settings.draft_model),
        lookup=lookup_of(settings, sampler),
        vocabulary=vocabulary_of(settings, processor, text.vocab_size),
        media=[_medium(one) for one in inputs.media],
        **(_kept(model, processor, inputs, settings) if settings.prefix_cache and cache is None else {}),
        prompt_cache=cache,
        earlier=seen,
        step_size=settings.prefill_step_size,
        kv_bits=settings.kv_bits,
        progress=progress_callback(settings.progress),
        asked=Asked(inputs, options, settings, index),
    )
    engine_of(model).check(sequence)
    named = None if options.logprobs is None else TokenNames(processor.tokenizer)
    return Request(sequence, answer, named)


def sampling_parameters(
    model: Model, processor: Processor, options: GenerationOptions, *, thinking: bool, pictures: bool = False
) -> SamplingParameters:
    """The caller's choices, completed by the checkpoint's generation_config.json, or else as Qwen recommends."""
    stated = stated_sampling(processor.generation_config)
    if stated is None or (stated == GREEDY and options.temperature is not None):
        config = model.config
        stated = recommended_sampling(
            config.text,
            thinking=thinking,
            pictures=pictures,
            is_next=config.is_next,
            template=processor.chat_template or "",
        )
    return options.sampling(stated)


def stream_answer(
    model: Model,
    processor: Processor,
    prompt: Prompt | PromptInputs,
    options: GenerationOptions,
    settings: EngineSettings,
    prompt_cache: HybridCache | None = None,
) -> Iterator[GenerationResponse]:
    """As `stream_generate`, with options and settings as values. Prompt and cache are checked before this returns."""
    request = prepare_request(model, processor, prompt, options, settings, cache=prompt_cache)
    return responses(engine_of(model), request)


def responses(engine: Engine, request: Request) -> Iterator[GenerationResponse]:
    """Submits a request when the first response is asked for, and yields one for each token."""
    made = ResponseMaker(request)
    own(engine.model, request.sequence)
    try:
        engine.submit(request.sequence)
        for emission in engine.stream(request.sequence):
            yield made(emission)
    except BaseException:
        # An interrupt may come before anybody reads: then nobody else would cancel it.
        request.sequence.cancelled = True
        raise


class ResponseMaker:
    """Makes responses of a request's tokens; its clock starts when it is made, and again when the first token comes."""

    def __init__(self, request: Request) -> None:
        self._request, self._clock = request, Clock()

    def __call__(self, emission: Emission) -> GenerationResponse:
        """The response for a token."""
        if self._clock.prompt_seconds is None:
            self._clock.prompt_done()
        return _response(self._request, emission, self._clock)


def write_batch(
    model: Model,
    processor: Processor,
    prompts: Sequence[Prompt],
    options: GenerationOptions,
    settings: EngineSettings,
) -> list[GenerationResponse]:
    """One answer for each prompt, all at the same time; the last response of each, whose `text` is the whole."""
    if isinstance(prompts, str | bytes) or not hasattr(prompts, "__len__"):
        raise PromptError("batch_generate takes a list of prompts; for a single one use generate.")
    if any(isinstance(prompt, Mapping) for prompt in prompts):
        raise PromptError(
            "batch_generate takes a list of conversations, each a list of messages; this is one conversation. "
            "Put it into a list."
        )
    requests = [
        prepare_request(model, processor, prompt, options, settings, index=i) for i, prompt in enumerate(prompts)
    ]
    engine, clock, last = engine_of(model), Clock(), []
    try:
        for request in requests:
            own(model, request.sequence)
            engine.submit(request.sequence)
        for request in requests:
            emissions = []
            for emission in engine.stream(request.sequence):
                emissions = [emission]
                if clock.prompt_seconds is None:
                    clock.prompt_done()
            last += [_response(request, emission, clock, text=request.answer.text) for emission in emissions]
    finally:
        for request in requests[len(last) :]:
            engine.cancel(request.sequence)
    return last


def progress_callback(progress: Progress | bool) -> Progress | None:
    """The caller's own callback, a line on stderr for True, nothing for False."""
    if isinstance(progress, bool):
        return _shown_progress() if progress else None
    return progress


def _spans(processor: Processor, inputs: PromptInputs) -> list[Span]:
    """Where each image and video lies, a video's timestamps included."""
    spans = []
    for placed in inputs.media:
        token = inputs.ids[placed.start]
        count, place = feature_count(processor, placed.patches), placed.start
        while count:
            count -= inputs.ids[place] == token
            place += 1
        spans.append(Span(placed.start, place - placed.start))
    return spans


def _kept(model: Model, processor: Processor, inputs: PromptInputs, settings: EngineSettings) -> _Kept:
    """How the engine finds and keeps states of the prompt."""
    ids, marks, spans = inputs.ids, Marks.of(processor), _spans(processor, inputs)
    folder, store = settings.prefix_cache_dir, engine_of(model).store
    return {
        "key": prefix_key(ids, _digests(inputs, spans)),
        "find_anchors": lambda read: anchors(ids, marks, media=spans, after=read),
        "answer_from": question_end(ids, marks),
        "prefix_bytes": settings.prefix_cache_bytes,
        "folder": None if folder is None else store.folder(Path(folder), settings.prefix_cache_dir_bytes),
    }


def _digests(inputs: PromptInputs, spans: Sequence[Span]) -> list[tuple[int, int, bytes]]:
    """Where each image and video lies, and what tells it from others."""
    digests = []
    for placed, span in zip(inputs.media, spans, strict=True):
        patches = placed.patches
        digest = blake2b(np.array(patches.grid_thw).tobytes())
        digest.update(np.array(patches.pixel_values.view(mx.uint8)).data)
        digests.append((*span, digest.digest()))
    return digests


def _medium(placed: Placed) -> Medium:
    patches = placed.patches
    return Medium(placed.start, Pixels(placed.kind, patches.pixel_values, patches.grid_thw))


def own(model: Model, sequence: Answering) -> None:
    """Evaluate, in the thread that made them, what is lazy: the computing thread cannot.

    To be called before a request is submitted, in the thread that prepared it.
    """
    lazy = [sequence.sampler.prompt]
    lazy += [part for one in sequence.media for part in (one.pixels.values, one.pixels.grid_thw)]
    if sequence.prompt_cache is not None:
        lazy += sequence.prompt_cache.arrays()
    mx.eval(lazy)
    model.materialize(vision=bool(sequence.media))
    if sequence.draft_model is not None:
        sequence.draft_model.model.notice_changes()
        sequence.draft_model.model.materialize(vision=False)


def _response(request: Request, emission: Emission, clock: Clock, *, text: str | None = None) -> GenerationResponse:
    sequence, choice = request.sequence, emission.choice
    delta = emission.added
    assert isinstance(delta, AnswerDelta), "what Answer.push returns"
    read = len(sequence.ids) if sequence.prompt_cache is not None else len(sequence.ids) - sequence.cached
    return GenerationResponse(
        text=delta.text if text is None else text,
        token=emission.token,
        logprobs=choice.logprobs[0],
        from_draft=emission.from_draft,
        prompt_tokens=read,
        prompt_tps=clock.prompt_tps(read),
        generation_tokens=emission.number,
        generation_tps=clock.generation_tps(emission.number),
        peak_memory=mx.get_peak_memory() / 1e9,
        finish_reason=emission.finish_reason,
        cached_tokens=sequence.cached,
        delta=delta,
        own_logprob=request.named.own(emission.token, choice) if request.named else None,
        top_logprobs=request.named.top(choice) if request.named else (),
        answer=request.answer.parsed if emission.finish_reason else None,
        drafting=drafting_of(sequence, emission.number) if emission.finish_reason else None,
        reasoning_tokens=emission.reasoning_tokens,
        thinking_closed_by=emission.thinking_closed_by,
    )


def _shown_progress() -> Progress:
    """A line that counts the tokens, and goes when all are read from where someone watched it."""
    line = StatusLine()

    def show(done: int, total: int) -> None:
        line.show(f"Reading the prompt: {done:,} of {total:,} tokens")
        if done == total:
            line.finish(keep=not line.watched)

    return show
