"""A prompt and its options, made ready for the decoding loop."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_qwen.engine.caching import seen_tokens
from mlx_qwen.engine.rules import ThinkingBudget
from mlx_qwen.engine.sampling import TokenSampler
from mlx_qwen.engine.step import Row
from mlx_qwen.errors import PromptError
from mlx_qwen.model import Model
from mlx_qwen.model.qwen import NO_VISION
from mlx_qwen.model.state import HybridCache
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.inputs import Prompt, PromptInputs, check_fits, prompt_inputs, room_for_answer
from mlx_qwen.recommended import GREEDY, SamplingParameters, recommended_sampling


@dataclass(frozen=True, slots=True)
class Request:
    """One answer to write: what to read first, what chooses its tokens, and how many there may be at most."""

    inputs: PromptInputs
    row: Row
    max_tokens: int
    inside_thinking: bool

    @property
    def ids(self) -> list[int]:
        """The prompt's tokens."""
        return self.inputs.ids


def prepare_request(
    model: Model,
    processor: Processor,
    prompt: Prompt | PromptInputs,
    options: GenerationOptions,
    *,
    cache: HybridCache | None = None,
    index: int = 0,
) -> Request:
    """Encodes a prompt that goes on after `cache` and checks it (PromptError); row `index` draws by `seed + index`."""
    text = model.config.text
    cached, seen = (0, []) if cache is None else (cache.offset, seen_tokens(cache))
    inputs = prompt if isinstance(prompt, PromptInputs) else prompt_inputs(processor, prompt, options)
    ids = inputs.ids
    if inputs.media and model.vision is None:
        raise PromptError(NO_VISION)
    check_fits(ids, text, cached=cached)
    inside = processor.opens_thinking(ids)
    sampler = TokenSampler(
        sampling_parameters(model, processor, options, thinking=inside),
        prompt=mx.array([*seen, *ids]),
        vocab_size=text.vocab_size,
        seed=None if options.seed is None else options.seed + index,
        sampler=options.sampler,
        logits_processors=options.logits_processors or (),
    )
    return Request(
        inputs=inputs,
        row=Row(sampler, ThinkingBudget.for_prompt(options.thinking_budget, processor, inside=inside)),
        max_tokens=room_for_answer(ids, text, options.max_tokens, cached=cached),
        inside_thinking=inside,
    )


def sampling_parameters(
    model: Model, processor: Processor, options: GenerationOptions, *, thinking: bool
) -> SamplingParameters:
    """The caller's choices, completed by Qwen's for the size and mode; greedy where the checkpoint asks for it."""
    greedy = processor.generation_config.get("do_sample") is False and options.temperature is None
    return options.sampling(GREEDY if greedy else recommended_sampling(model.config.text, thinking=thinking))
