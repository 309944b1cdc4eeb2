"""The models that clients can ask: found by name, loaded when needed within a budget, unloaded when idle."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from time import monotonic, perf_counter

import mlx.core as mx

from mlx_qwen.checkpoint.hub import local_folder, resolve
from mlx_qwen.config import ModelConfig
from mlx_qwen.demo import demo_folder
from mlx_qwen.engine.lasting import in_thread
from mlx_qwen.errors import MLXQwenError, PromptError
from mlx_qwen.loading import load
from mlx_qwen.machine import machine_bytes, memory_bytes
from mlx_qwen.model import Model
from mlx_qwen.prompt import Processor
from mlx_qwen.server.record import LOG
from mlx_qwen.server.refusals import Refusal
from mlx_qwen.server.settings import ServerSettings
from mlx_qwen.server.work import ModelCard

DEMO = "mlx-qwen-demo"
_BETWEEN_SWEEPS = 5.0

Loaded = tuple[Model, Processor]


@dataclass(slots=True)
class Hosted:
    """A model that can be asked.

    Attributes:
        name: what the list of models calls it.
        source: its folder or repository.
        context: most tokens that it takes; None while that is not known.
        folder: where its files are; None while that is not known.
        loaded: the model and its processor, while it is loaded.
        loading: the work that loads it, while that goes on.
        users: requests that hold it.
        used: when it was last asked.
    """

    name: str
    source: str | Path
    context: int | None = None
    folder: Path | None = None
    loaded: Loaded | None = None
    loading: "asyncio.Task[Loaded] | None" = None
    users: int = 0
    used: float = 0.0

    @property
    def names(self) -> set[str]:
        """All that a client may call it."""
        return {self.name, str(self.source)}

    def nbytes(self) -> int:
        """Bytes of its files, where they are known."""
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors")) if self.folder else 0


class Models:
    """Keeps as many models loaded as fit.

    `loaded` gets each model that was loaded. `ready` is the first model, where it is there already: it stays loaded.

    Raises PromptError for two models of one name, and an alias of none of them; CheckpointError for no such folder.
    """

    def __init__(
        self,
        sources: Sequence[str],
        settings: ServerSettings,
        *,
        loaded: Callable[[Model], None],
        ready: Loaded | None = None,
    ) -> None:
        self.hosted = [_hosted(source) for source in sources] or [_hosted(demo_folder(), name=DEMO)]
        self._aliases = [alias.partition("=")[::2] for alias in settings.alias]
        self._budget = memory_bytes(settings.memory) if settings.memory is not None else machine_bytes() * 3 // 4
        self._one_at_a_time = asyncio.Lock()
        self._unload_after = settings.unload_after
        self._on_load = loaded
        self._check_names()
        if ready is not None:
            self.hosted[0].loaded, self.hosted[0].users = ready, 1
            self._on_load(ready[0])

    def cards(self) -> list[ModelCard]:
        """The models, and the aliases that stand for one name."""
        cards = [_card(one.name, one) for one in self.hosted]
        return cards + [_card(alias, self._find(name)) for alias, name in self._aliases if "*" not in alias]

    def find(self, name: str | None) -> Hosted:
        """The model that a client means; raises Refusal with 404 for an unknown one."""
        if name is None:
            return self.hosted[0]
        found = next((one for one in self.hosted if name in one.names), None)
        target = next((target for alias, target in self._aliases if fnmatchcase(name, alias)), None)
        if found is None and target is not None:
            found = self._find(target)
        if found is None:
            known = ", ".join(card.name for card in self.cards())
            raise Refusal(
                404,
                f"There is no model {name!r:.100}; this server has {known}. Another name can stand for one: start it "
                f"with --alias {name:.60}={self.hosted[0].name}.",
                param="model",
                code="model_not_found",
            )
        return found

    @asynccontextmanager
    async def using(self, hosted: Hosted) -> AsyncIterator[Loaded]:
        """The loaded model; it stays loaded while this is open. Raises Refusal where it cannot be loaded."""
        hosted.users += 1
        try:
            loaded = hosted.loaded
            if loaded is None:
                # Whoever leaves meanwhile, the work is done once.
                hosted.loading = hosted.loading or asyncio.ensure_future(self._load(hosted))
                loaded = await asyncio.shield(hosted.loading)
            yield loaded
        finally:
            hosted.users -= 1
            hosted.used = monotonic()

    async def warm(self) -> None:
        """Loads the first model, so that the first request need not wait for it."""
        try:
            async with self.using(self.hosted[0]):
                pass
        except Refusal as refusal:
            LOG.error("%s", refusal.message)

    async def sweep(self) -> None:
        """Unloads models that nobody has asked for long enough, for ever."""
        while self._unload_after:
            await asyncio.sleep(min(_BETWEEN_SWEEPS, self._unload_after))
            for one in self.hosted:
                if one.loaded is not None and not one.users and monotonic() - one.used >= self._unload_after:
                    _unload(one)

    async def _load(self, hosted: Hosted) -> Loaded:
        try:
            async with self._one_at_a_time:
                hosted.loaded = await self._read(hosted)
                return hosted.loaded
        except MLXQwenError as error:
            raise Refusal(503, f"{hosted.name} cannot be loaded: {error}") from error
        finally:
            hosted.loading = None

    async def _read(self, hosted: Hosted) -> Loaded:
        """The model from its files, in a thread; raises Refusal where it is larger than the budget."""
        hosted.folder = hosted.folder or await in_thread(resolve, hosted.source)
        needed = hosted.nbytes()
        if needed > self._budget:
            raise Refusal(
                503,
                f"{hosted.name} needs {needed / 2**30:.2f} GiB of memory, more than the {self._budget / 2**30:.2f} GiB "
                "that models may take (--memory).",
            )
        await self._make_room(needed, hosted)
        began = perf_counter()
        LOG.info("loading %s", hosted.name)
        loaded = await in_thread(load, hosted.folder)
        hosted.context = loaded[0].config.text.max_position_embeddings
        self._on_load(loaded[0])
        LOG.info("loaded %s in %.1f s", hosted.name, perf_counter() - began)
        return loaded

    async def _make_room(self, needed: int, hosted: Hosted) -> None:
        """Unload others, the least recently used first; those that answer are waited for."""
        while True:
            others = [one for one in self.hosted if one.loaded is not None and one is not hosted]
            if sum(one.nbytes() for one in others) + needed <= self._budget:
                return
            idle = [one for one in others if not one.users]
            if idle:
                _unload(min(idle, key=lambda one: one.used))
            else:
                await asyncio.sleep(0.1)

    def _find(self, name: str) -> Hosted:
        return next(one for one in self.hosted if name in one.names)

    def _check_names(self) -> None:
        names = [one.name for one in self.hosted]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise PromptError(f"Two models are called {twice}; give one of them another folder's name.")
        for alias, name in self._aliases:
            if not any(name in one.names for one in self.hosted):
                raise PromptError(f"alias {alias}={name} stands for no model; expected one of {', '.join(names)}.")


def _hosted(source: str | Path, name: str | None = None) -> Hosted:
    folder = local_folder(source)
    if folder is None:
        return Hosted(str(source), source)
    context = ModelConfig.from_directory(folder).text.max_position_embeddings
    return Hosted(name or folder.resolve().name, folder.resolve(), context, folder.resolve())


def _card(name: str, hosted: Hosted) -> ModelCard:
    return ModelCard(name, hosted.context, hosted.loaded is not None)


def _unload(hosted: Hosted) -> None:
    LOG.info("unloading %s", hosted.name)
    hosted.loaded = None
    gc.collect()
    mx.clear_cache()
