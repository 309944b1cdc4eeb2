"""Writing answers in an asyncio program: `stream_generate_async` and `generate_async`, and their parts for servers."""

from collections.abc import AsyncIterator
from typing import Unpack

from mlx_qwen.answer.response import GenerationResponse
from mlx_qwen.declared import takes
from mlx_qwen.engine.async_stream import AsyncStream
from mlx_qwen.engine.engine import engine_of
from mlx_qwen.engine.lasting import in_thread
from mlx_qwen.generation import check_loaded
from mlx_qwen.keywords import OptionKeywords, options_and_settings
from mlx_qwen.model import Model
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.inputs import Prompt, PromptInputs
from mlx_qwen.requests import Request, ResponseMaker, own, prepare_request
from mlx_qwen.settings import EngineSettings


@takes(GenerationOptions, EngineSettings)
def stream_generate_async(
    model: Model, processor: Processor, prompt: Prompt, **options: Unpack[OptionKeywords]
) -> AsyncIterator[GenerationResponse]:
    """As `stream_generate`, for asyncio: the event loop goes on while the prompt is prepared and the answer is written.

        async for response in mlx_qwen.stream_generate_async(model, processor, messages):
            print(response.text, end="")

    Many may run at the same time, in one loop or several; they share the model's forward passes. Cancelling the task
    cancels the answer at once, and leaving the loop does so too.

    Args:
        model: from `load`.
        processor: from `load`.
        prompt: as `stream_generate` takes it.
        {options}

    Raises:
        PromptError: an option cannot be used (at once), or the prompt cannot (with the first response).
        MLXQwenError: the model's logits are not numbers.
    """
    choices, settings = options_and_settings(options)
    check_loaded(model, processor)
    return _streamed(model, processor, prompt, choices, settings)


@takes(GenerationOptions, EngineSettings)
async def generate_async(model: Model, processor: Processor, prompt: Prompt, **options: Unpack[OptionKeywords]) -> str:
    """Writes an answer and returns its whole raw text; the event loop goes on meanwhile.

    `model`, `processor`, `prompt` and errors are those of `stream_generate_async`. `asyncio.gather` of several writes
    them together.

    Args:
        {options}
    """
    choices, settings = options_and_settings(options)
    check_loaded(model, processor)
    return "".join([response.text async for response in _streamed(model, processor, prompt, choices, settings)])


async def prepare_async(
    model: Model,
    processor: Processor,
    prompt: Prompt | PromptInputs,
    options: GenerationOptions,
    settings: EngineSettings,
    *,
    index: int = 0,
) -> Request:
    """`prepare_request` in a worker thread: rendering, tokenizing and decoding images leave the event loop free.

    Nothing is submitted yet: a request that is not wanted any more is dropped. Arguments and errors as there.
    """

    def prepare() -> Request:
        request = prepare_request(model, processor, prompt, options, settings, index=index)
        own(model, request.sequence)
        return request

    return await in_thread(prepare)


def responses_async(model: Model, request: Request) -> AsyncStream[GenerationResponse]:
    """Submits a prepared request when the first response is asked for, and gives one for each token."""
    return AsyncStream(engine_of(model), request.sequence, ResponseMaker(request))


async def _streamed(
    model: Model, processor: Processor, prompt: Prompt, options: GenerationOptions, settings: EngineSettings
) -> AsyncIterator[GenerationResponse]:
    request = await prepare_async(model, processor, prompt, options, settings)
    async with responses_async(model, request) as responses:
        async for response in responses:
            yield response
