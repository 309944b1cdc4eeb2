"""Writing answers: `stream_generate` token by token, `generate` at once, `batch_generate` several together."""

from collections.abc import Iterator, Sequence
from typing import Literal, Unpack, overload

from mlx_qwen.answer.response import GenerationResponse
from mlx_qwen.declared import takes
from mlx_qwen.engine.caching import kv_cache_summary
from mlx_qwen.errors import PromptError
from mlx_qwen.keywords import OptionKeywords, options_and_settings
from mlx_qwen.model import Model
from mlx_qwen.model.cache import HybridCache
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.inputs import Prompt, prompt_inputs
from mlx_qwen.prompt.placed import describe
from mlx_qwen.requests import stream_answer, write_batch
from mlx_qwen.settings import EngineSettings
from mlx_qwen.value_types import shown


@takes(GenerationOptions, EngineSettings)
def stream_generate(
    model: Model,
    processor: Processor,
    prompt: Prompt,
    *,
    prompt_cache: HybridCache | None = None,
    **options: Unpack[OptionKeywords],
) -> Iterator[GenerationResponse]:
    """Writes an answer and yields a response for each of its tokens.

    Args:
        model: from `load`.
        processor: from `load`.
        prompt: text, used as it stands, control tokens in it included; token ids; or chat messages, to which the chat
            template is applied, and in which special tokens that people typed are text. Messages may have the shapes
            of OpenAI's chat and Responses, Anthropic and Hugging Face. They may hold images: {"type": "image", "image":
            a path, URL, data URL, bytes, pillow image or array}, and videos: {"type": "video", "video": a path, URL,
            data URL, bytes, list of frames or array [T, H, W, 3]}, each with choices of its own such as "max_pixels",
            "fps" or "max_frames". What responses hold goes back into them: {"role": "assistant", "content": ...,
            "tool_calls": response.tool_calls}.
        prompt_cache: from `model.make_cache()`: the prompt goes on after what it has seen, and it is updated.
        {options}

    Raises:
        PromptError: an option or the prompt cannot be used (at once, before anything is computed).
        MLXQwenError: the model's logits are not numbers.
    """
    choices, settings = options_and_settings(options)
    check_loaded(model, processor)
    return stream_answer(model, processor, prompt, choices, settings, prompt_cache)


@takes(GenerationOptions, EngineSettings)
def generate(
    model: Model,
    processor: Processor,
    prompt: Prompt,
    *,
    verbose: bool = False,
    prompt_cache: HybridCache | None = None,
    **options: Unpack[OptionKeywords],
) -> str:
    """Writes an answer and returns its whole raw text, reasoning tags and tool calls included.

    `model`, `processor`, `prompt`, `prompt_cache` and errors are those of `stream_generate`.

    Args:
        verbose: print what images and videos became, the text as it comes, then statistics.
        {options}
    """
    choices, settings = options_and_settings(options)
    check_loaded(model, processor)
    if verbose and settings.kv_bits is not None:
        print(kv_cache_summary(model, settings.kv_bits))
    inputs = prompt_inputs(processor, prompt, choices)
    for one in inputs.media if verbose else ():
        print(describe(processor, one.patches))
    pieces = []
    for response in stream_answer(model, processor, inputs, choices, settings, prompt_cache):
        pieces.append(response.text)
        if verbose:
            print(response.text, end="", flush=True)
    if verbose:
        print(f"\n{'=' * 10}\n{response.statistics()}")
    return "".join(pieces)


@overload
def batch_generate(
    model: Model,
    processor: Processor,
    prompts: Sequence[Prompt],
    *,
    return_responses: Literal[False] = False,
    **options: Unpack[OptionKeywords],
) -> list[str]: ...


@overload
def batch_generate(
    model: Model,
    processor: Processor,
    prompts: Sequence[Prompt],
    *,
    return_responses: Literal[True],
    **options: Unpack[OptionKeywords],
) -> list[GenerationResponse]: ...


@takes(GenerationOptions, EngineSettings)
def batch_generate(
    model: Model,
    processor: Processor,
    prompts: Sequence[Prompt],
    *,
    return_responses: bool = False,
    **options: Unpack[OptionKeywords],
) -> list[str] | list[GenerationResponse]:
    """Writes one answer for each prompt, all at the same time, and returns their raw texts in the prompts' order.

    Options hold for every row, `images` and `videos` too; a row's own stand in its messages. Every row stops, is
    penalized and draws on its own: row i equals `generate` with its prompt alone and, when sampling, `seed + i`.
    `model`, `processor`, each prompt and errors are those of `stream_generate`.

    Args:
        return_responses: return each row's last response instead, whose `text` is the whole raw answer.
        {options}
    """
    choices, settings = options_and_settings(options)
    check_loaded(model, processor)
    responses = write_batch(model, processor, prompts, choices, settings)
    return responses if return_responses else [response.text for response in responses]


def check_loaded(model: object, processor: object) -> None:
    """Raises PromptError unless these are a model and a processor, in this order."""
    for name, value, kind in (("model", model, Model), ("processor", processor, Processor)):
        if not isinstance(value, kind):
            raise PromptError(
                f"{name} is {shown(value)}; expected what load gives: model, processor = mlx_qwen.load(...), passed in "
                "this order."
            )
