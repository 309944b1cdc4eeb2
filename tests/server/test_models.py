"""Models by name and alias, loaded when they are asked and unloaded when they are not."""

import asyncio
import shutil
import time

import httpx
import pytest

from mlx_qwen.demo import demo_folder
from mlx_qwen.errors import CheckpointError, PromptError
from mlx_qwen.options import GenerationOptions
from mlx_qwen.server.backend import EngineBackend
from mlx_qwen.server.refusals import Refusal
from mlx_qwen.server.settings import ServerSettings
from mlx_qwen.server.work import Ask
from mlx_qwen.settings import EngineSettings
from tests.server.running import serving

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders that hold the bundled model."""
    made = [tmp_path_factory.mktemp("models") / name for name in ("first", "second")]
    for folder in made:
        shutil.copytree(demo_folder(), folder)
    return [str(folder) for folder in made]


def backend(sources, **settings):
    options = GenerationOptions(temperature=0, max_tokens=5)
    return EngineBackend(sources, ServerSettings(port=0, **settings), options, EngineSettings())


def loaded(url):
    return {card["id"]: card["loaded"] for card in httpx.get(f"{url}/v1/models").json()["data"]}


def ask(url, name, **more):
    return httpx.post(url + CHAT, json={"model": name, "messages": HI, "max_tokens": 5, **more}, timeout=60)


def test_the_name_that_is_asked_for_is_honoured(folders):
    with serving(*folders, alias=["small=second", "claude-*=first"]) as url:
        for name in ("first", "second", "small", "claude-opus-9", folders[1]):
            answer = ask(url, name)
            assert answer.status_code == 200
            assert answer.json()["model"] == name
        assert ask(url, "gpt-9").status_code == 404
        assert "--alias" in ask(url, "gpt-9").json()["error"]["message"]
        assert list(loaded(url)) == ["first", "second", "small"]
        assert httpx.get(f"{url}/v1/models/small").json()["id"] == "small"
        assert httpx.get(f"{url}/v1/models/gpt-9").status_code == 404


def test_a_model_says_how_much_it_reads_before_it_is_loaded(folders):
    assert [(card.context, card.loaded) for card in backend(folders).cards()] == [(4096, False)] * 2
    assert [card.context for card in backend(folders, max_context=1000).cards()] == [1000] * 2
    assert [card.context for card in backend(["Qwen/Qwen3.5-0.8B"]).cards()] == [None]


def test_a_model_is_loaded_when_it_is_asked_and_makes_room_within_the_budget(folders):
    size = sum(file.stat().st_size for file in demo_folder().glob("*.safetensors"))
    with serving(*folders, memory=size * 3 // 2) as url:
        assert loaded(url) == {"first": False, "second": False}
        for name, other in (("first", "second"), ("second", "first"), ("first", "second")):
            assert ask(url, name).status_code == 200
            assert loaded(url) == {name: True, other: False}
    with serving(*folders, memory=f"{size / 2**31:.6f}GB") as url:
        answer = ask(url, "first")
        assert answer.status_code == 503
        assert "--memory" in answer.json()["error"]["message"]


def test_a_model_that_answers_is_not_unloaded_for_another(folders):
    size = sum(file.stat().st_size for file in demo_folder().glob("*.safetensors"))
    engine = backend(folders, memory=size * 3 // 2)

    async def two():
        held = await engine.prepare(Ask(model="first", prompt=HI), lambda done, total: None)
        waiting = asyncio.ensure_future(engine.prepare(Ask(model="second", prompt=HI), lambda done, total: None))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        assert [one.loaded is not None for one in engine.models.hosted] == [True, False]
        await held.aclose()
        await (await waiting).aclose()
        assert [one.loaded is not None for one in engine.models.hosted] == [False, True]

    asyncio.run(two())


def test_a_model_that_nobody_asks_is_unloaded(folders):
    engine = backend(folders[:1], unload_after=0.2)

    async def idle():
        sweeping = asyncio.ensure_future(engine.models.sweep())
        await (await engine.prepare(Ask(model=None, prompt=HI), lambda done, total: None)).aclose()
        assert engine.models.hosted[0].loaded is not None
        until = time.monotonic() + 10
        while engine.models.hosted[0].loaded is not None:
            assert time.monotonic() < until
            await asyncio.sleep(0.05)
        sweeping.cancel()

    asyncio.run(idle())


def test_a_request_that_is_refused_lets_go_of_its_model(folders):
    engine = backend(folders[:1])

    async def refused():
        with pytest.raises(PromptError):
            await engine.prepare(Ask(model=None, prompt=HI, choices={"top_p": 7}), lambda done, total: None)
        with pytest.raises(Refusal):
            await engine.prepare(Ask(model="gpt-9", prompt=HI), lambda done, total: None)
        assert engine.models.hosted[0].users == 0

    asyncio.run(refused())


def test_the_context_ends_where_the_server_says():
    with serving(max_context=30) as url:
        assert ask(url, None, max_tokens=1000).json()["usage"]["total_tokens"] == 30
        answer = httpx.post(url + CHAT, json={"messages": [{"role": "user", "content": "word " * 50}]}, timeout=60)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("sources", "settings", "error"),
    [
        (["/nowhere/at/all"], {}, CheckpointError),
        ([str(demo_folder()), str(demo_folder())], {}, PromptError),
        ([], {"alias": ["small=nothing"]}, PromptError),
    ],
    ids=["no folder", "twice", "alias of nothing"],
)
def test_names_that_cannot_be_meant_are_told_before_the_server_listens(sources, settings, error):
    with pytest.raises(error):
        backend(sources, **settings)


@pytest.mark.parametrize(
    "settings",
    [{"alias": ["x"]}, {"port": 70000}, {"max_queue": -1}, {"memory": 0}, {"memory": "24"}, {"memory": "0GB"}],
    ids=str,
)
def test_settings_that_cannot_be_meant_are_refused(settings):
    with pytest.raises(PromptError):
        ServerSettings(**settings)
