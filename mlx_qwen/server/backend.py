"""The engine behind the seam: requests to sequences of a model's engine, and its responses to pieces."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from dataclasses import fields, replace

from mlx_qwen.answer.response import GenerationResponse
from mlx_qwen.async_generation import prepare_async, responses_async
from mlx_qwen.engine.engine import engine_of
from mlx_qwen.engine.lasting import in_thread
from mlx_qwen.errors import PromptError
from mlx_qwen.model import Model
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.inputs import PromptInputs, prompt_inputs
from mlx_qwen.requests import Request
from mlx_qwen.server.models import Loaded, Models
from mlx_qwen.server.refusals import Refusal
from mlx_qwen.server.settings import ServerSettings
from mlx_qwen.server.work import Ask, Likelihood, ModelCard, Piece, Progress
from mlx_qwen.settings import EngineSettings

_KNOWN = {field.name for field in fields(GenerationOptions)}


class EngineBackend:
    """Answers with models of this machine.

    Args:
        sources: folders and repositories; the bundled demo where there are none.
        settings: the server's.
        options: what holds for requests that say nothing.
        engine: how the engine works.
        ready: the first model, where it is loaded already.
    """

    def __init__(
        self,
        sources: Sequence[str],
        settings: ServerSettings,
        options: GenerationOptions,
        engine: EngineSettings,
        ready: Loaded | None = None,
    ) -> None:
        self._settings, self._options, self._engine = settings, options, engine
        self.models = Models(sources, settings, loaded=self._loaded, ready=ready)

    def cards(self) -> list[ModelCard]:
        """The models that can be asked, their contexts no longer than --max-context."""
        cards, most = self.models.cards(), self._settings.max_context
        return cards if most is None else [replace(card, context=min(card.context or most, most)) for card in cards]

    def find(self, name: str | None) -> str:
        """The model that a client means by `name`; raises Refusal with 404 for an unknown one."""
        return self.models.find(name).name

    async def prepare(self, ask: Ask, progress: Progress) -> "PreparedRequest":
        """Loads the model if need be, checks the request and tokenizes its prompt; raises Refusal or PromptError."""
        hosted = self.models.find(ask.model)
        async with AsyncExitStack() as stack:
            model, processor = await stack.enter_async_context(self.models.using(hosted))
            options = self._chosen(ask)
            inputs = await in_thread(prompt_inputs, processor, ask.prompt, options)
            options = self._limited(options, inputs)
            settings = replace(self._engine, progress=progress)
            requests = [
                await prepare_async(model, processor, inputs, options, settings, index=index)
                for index in range(ask.count)
            ]
            return PreparedRequest(ask.model or hosted.name, (model, processor), inputs, requests, stack.pop_all())

    def close(self) -> None:
        """Ends what is still being written to a folder of prefixes."""
        for hosted in self.models.hosted:
            if hosted.loaded is not None:
                engine_of(hosted.loaded[0]).store.close()

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
        engine = engine_of(model)
        engine.limits = replace(engine.limits, most_rows=self._settings.max_batch)


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
        request = self._requests[index]
        counted = _Counted(request, self._processor)
        async with responses_async(self._model, request) as responses:
            async for response in responses:
                yield counted.piece(response)

    async def aclose(self) -> None:
        """Lets go of the model."""
        await self._stack.aclose()


class _Counted:
    """Makes pieces of an answer's responses, telling its reasoning, its words and its calls apart token by token."""

    def __init__(self, request: Request, processor: Processor) -> None:
        self._request = request
        self._ends = processor.end_token_ids
        self._think_end = processor.thinking[1] if processor.thinking else None
        self._inside = processor.opens_thinking(request.sequence.ids)
        self._calls = False

    def piece(self, response: GenerationResponse) -> Piece:
        """What a response added."""
        reasons = self._inside or bool(response.delta.reasoning)
        self._inside = self._inside and response.token != self._think_end
        self._calls = self._calls or bool(response.delta.tool_calls)
        speaks = not reasons and not self._calls and response.token not in self._ends
        drafts = self._request.sequence.drafts
        return Piece(
            response.delta,
            tokens=response.generation_tokens,
            reasoning_tokens=response.reasoning_tokens,
            cached=response.cached_tokens,
            guessed=sum(drafts.all_tried),
            taken=sum(drafts.all_taken),
            finish=response.finish_reason,
            stopped_by=self._request.answer.stopped_by if response.finish_reason else None,
            likelihoods=_likelihoods(response) if speaks else (),
        )


def _likelihoods(response: GenerationResponse) -> tuple[Likelihood, ...]:
    """The token's, where the request asked for it."""
    own = response.own_logprob
    if own is None:
        return ()
    others = tuple(Likelihood(one.text, one.data, one.logprob) for one in response.top_logprobs)
    return (Likelihood(own.text, own.data, own.logprob, others),)
