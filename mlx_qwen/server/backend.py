"""The engine behind the seam: requests to sequences of a model's engine, and its responses to pieces."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from dataclasses import fields, replace

from mlx_qwen.answer.response import GenerationResponse
from mlx_qwen.async_generation import prepare_async, responses_async
from mlx_qwen.engine.engine import Limits, engine_of
from mlx_qwen.errors import PromptError
from mlx_qwen.model import Model
from mlx_qwen.options import EngineSettings, GenerationOptions
from mlx_qwen.prompt.inputs import PromptInputs, prompt_inputs
from mlx_qwen.requests import Request
from mlx_qwen.server.models import Loaded, Models
from mlx_qwen.server.refusals import Refusal
from mlx_qwen.server.settings import ServerSettings
from mlx_qwen.server.work import Ask, ModelCard, Piece, Progress

_KNOWN = {field.name for field in fields(GenerationOptions)}


class EngineBackend:
    """Answers with models of this machine.

    Args:
        sources: folders and repositories; the bundled demo where there are none.
        settings: the server's.
        options: what holds for requests that say nothing.
        engine: how the engine works.
    """

    def __init__(
        self, sources: Sequence[str], settings: ServerSettings, options: GenerationOptions, engine: EngineSettings
    ) -> None:
        self.models = Models(sources, settings, loaded=self._loaded)
        self._settings, self._options, self._engine = settings, options, engine

    def cards(self) -> list[ModelCard]:
        """The models that can be asked."""
        return self.models.cards()

    def find(self, name: str | None) -> str:
        """The model that a client means by `name`; raises Refusal with 404 for an unknown one."""
        return self.models.find(name).name

    async def prepare(self, ask: Ask, progress: Progress) -> "PreparedRequest":
        """Loads the model if need be, checks the request and tokenizes its prompt; raises Refusal or PromptError."""
        hosted = self.models.find(ask.model)
        async with AsyncExitStack() as stack:
            model, processor = await stack.enter_async_context(self.models.using(hosted))
            options = self._chosen(ask)
            inputs = await asyncio.to_thread(prompt_inputs, processor, ask.prompt, options)
            options = self._limited(options, inputs)
            settings = replace(self._engine, progress=progress)
            requests = [
                await prepare_async(model, processor, inputs, options, settings, index=index)
                for index in range(ask.count)
            ]
            return PreparedRequest(ask.model or hosted.name, (model, processor), inputs, requests, stack.pop_all())

    def _chosen(self, ask: Ask) -> GenerationOptions:
        """The request's choices over the server's."""
        unknown = next((name for name in ask.choices if name not in _KNOWN), None)
        if unknown is not None:
            raise Refusal(400, f"{unknown} is not supported.", param=unknown)
        return replace(self._options, **ask.choices)  # type: ignore[arg-type]

    def _limited(self, options: GenerationOptions, inputs: PromptInputs) -> GenerationOptions:
        """The options with as many tokens as --max-context leaves."""
        most = self._settings.max_context
        if most is None:
            return options
        if len(inputs.ids) >= most:
            raise PromptError(
                f"The prompt has {len(inputs.ids):,} tokens, but this server's context ends at {most:,} "
                "(--max-context). Shorten the prompt."
            )
        return replace(options, max_tokens=min(options.max_tokens, most - len(inputs.ids)))

    def _loaded(self, model: Model) -> None:
        engine_of(model).limits = Limits(most_rows=self._settings.max_batch)


class PreparedRequest:
    """A request that is ready for the engine; its model stays loaded until it is closed."""

    def __init__(
        self, name: str, loaded: Loaded, inputs: PromptInputs, requests: Sequence[Request], stack: AsyncExitStack
    ) -> None:
        self.model = name
        self.prompt_tokens = len(inputs.ids)
        self._model, self._processor = loaded
        self._requests, self._stack = requests, stack

    async def pieces(self, index: int) -> AsyncGenerator[Piece, None]:
        """Answer `index`; leaving the generator stops the work."""
        request, reasoning = self._requests[index], 0
        _, end = self._processor.thinking or (None, None)
        inside = self._processor.opens_thinking(request.sequence.ids)
        async with responses_async(self._model, request) as responses:
            async for response in responses:
                reasoning += inside or bool(response.delta.reasoning)
                inside = inside and response.token != end
                yield _piece(response, request, reasoning)

    async def aclose(self) -> None:
        """Lets go of the model."""
        await self._stack.aclose()


def _piece(response: GenerationResponse, request: Request, reasoning: int) -> Piece:
    """What a response added."""
    drafts = request.sequence.drafts
    return Piece(
        response.delta,
        tokens=response.generation_tokens,
        reasoning_tokens=reasoning,
        cached=response.cached_tokens,
        guessed=sum(drafts.all_tried),
        taken=sum(drafts.all_taken),
        finish=response.finish_reason,
        stopped_by=request.answer.stopped_by if response.finish_reason else None,
    )
