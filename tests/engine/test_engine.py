"""The engine: whoever shares it, and whatever was read before, each answer is what its request gives alone."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_qwen.config import ModelConfig
from mlx_qwen.engine.depth import Drafts
from mlx_qwen.engine.emission import Endless
from mlx_qwen.engine.engine import Engine, Limits
from mlx_qwen.engine.prefix import PrefixIndex, prefix_key
from mlx_qwen.engine.rules import Rules
from mlx_qwen.engine.sampling import TokenSampler
from mlx_qwen.engine.scheduler import Scheduler
from mlx_qwen.engine.sequence import MOST_UNREAD, Sequence
from mlx_qwen.errors import MLXQwenError, PromptError
from mlx_qwen.generation import generate, stream_generate
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model
from mlx_qwen.recommended import SamplingParameters
from tests.engine.conftest import Loaded
from tools.benchmarks.random_requests import ask_randomly

Checkpoint = Callable[..., Path]
GREEDY = SamplingParameters(temperature=0)
DRAWN = SamplingParameters(temperature=1.0, top_k=20, presence_penalty=1.0)


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Model:
    path = checkpoint("dense", with_mtp=True)
    return load_model(path, ModelConfig.from_directory(path))


def ids(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 299, count).tolist()


def sequence(
    model: Model,
    prompt: list[int],
    *,
    how: SamplingParameters = GREEDY,
    count: int = 12,
    drafts: int | None = 0,
    seed: int = 3,
    keep: bool = False,
    **more: object,
) -> Sequence:
    sampler = TokenSampler(how, prompt=mx.array(prompt), vocab_size=model.config.text.vocab_size, seed=seed)
    key = prefix_key(prompt) if keep else None
    return Sequence(prompt, sampler, Rules(), Endless(), count, Drafts(drafts), key=key, **more)  # type: ignore[arg-type]


def answer(engine: Engine, one: Sequence) -> list[int]:
    engine.submit(one)
    return [emission.token for emission in engine.stream(one)]


def alone(model: Model, prompt: list[int], **how: object) -> list[int]:
    return answer(Engine(model), sequence(model, prompt, **how))  # type: ignore[arg-type]


@pytest.mark.parametrize("cut", [1, 5, 30, 59, 60])
def test_an_answer_that_goes_on_from_what_was_read_is_the_one_read_from_the_start(model: Model, cut: int) -> None:
    prompt, engine = ids(1, 60), Engine(model, prefixes=PrefixIndex(1 << 30))
    answer(engine, sequence(model, [*prompt[:cut], *ids(2, 7)], keep=True, anchors=[cut]))
    later = sequence(model, [*prompt, 5], keep=True, drafts=None)
    assert answer(engine, later) == alone(model, [*prompt, 5])
    assert later.cached == cut


def test_the_same_prompt_again_reads_nothing(model: Model) -> None:
    prompt, engine = ids(1, 40), Engine(model, prefixes=PrefixIndex(1 << 30))
    first = answer(engine, sequence(model, prompt, keep=True))
    again = sequence(model, prompt, keep=True)
    assert answer(engine, again) == first
    assert again.cached == len(prompt)
    assert answer(engine, sequence(model, prompt, keep=True, how=DRAWN)) == alone(model, prompt, how=DRAWN)


def test_a_prompt_that_repeats_an_answer_reads_only_what_is_new_and_copies_nothing(model: Model) -> None:
    prompt, engine = ids(1, 700), Engine(model, prefixes=PrefixIndex(1 << 30))
    first = sequence(model, prompt, keep=True)
    written = answer(engine, first)
    longer = [*prompt, *written, *ids(3, 9)]
    second = sequence(model, longer, keep=True)
    assert answer(engine, second) == alone(model, longer)
    assert second.cached == len(prompt) + len(written) - 1
    assert first.state is not None
    assert second.state is not None
    assert first.state.chains[0].buffers()[0] is second.state.chains[0].buffers()[0]


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("shorter", [0, 1, 2])
def test_answers_that_end_together_leave_all_that_was_read(model: Model, drafts: int, shorter: int) -> None:
    engine = Engine(model, prefixes=PrefixIndex(1 << 30))
    kept = [sequence(model, ids(i, 20), count=12 - i * shorter, drafts=drafts, keep=True) for i in range(2)]
    cached = [sequence(model, ids(i, 20), count=12 - i * shorter, drafts=drafts) for i in range(2)]
    for one in cached:
        one.prompt_cache = model.make_cache()
    for pair in (kept, cached):
        for one in pair:
            engine.submit(one)
        for one in pair:
            list(engine.stream(one))
    for one in cached:
        assert one.ended.wait(10)
        assert one.prompt_cache is not None
        assert one.prompt_cache.offset >= len(one.ids) + len(one.written) - 1
        assert one.prompt_cache.tokens == one.ids + one.written
    for one in kept:
        longer = sequence(model, [*one.ids, *one.written, 5], keep=True)
        assert answer(engine, longer) == alone(model, longer.ids)
        assert longer.cached >= len(one.ids) + len(one.written) - 1


def test_what_one_prompt_left_is_not_changed_by_those_that_go_on_from_it(model: Model) -> None:
    prompt, engine = ids(1, 50), Engine(model, prefixes=PrefixIndex(1 << 30))
    answer(engine, sequence(model, prompt, keep=True))
    branches = [[*prompt, *ids(seed, 6 + seed)] for seed in range(5)]
    together = [sequence(model, branch, keep=True, drafts=None) for branch in branches]
    for one in together:
        engine.submit(one)
    found = [[emission.token for emission in engine.stream(one)] for one in together]
    assert found == [alone(model, branch) for branch in branches]
    assert all(one.cached >= len(prompt) for one in together)


def test_random_requests_that_come_go_and_share_equal_their_solo_runs(model: Model) -> None:
    found = ask_randomly(model, 120)
    assert found.differing == []
    assert found.asked == 120
    assert found.cancelled > 20 and found.reused > 20 and found.drafted > 0


def test_a_long_prompt_lets_others_write_between_its_pieces(model: Model) -> None:
    engine, places = Engine(model), []
    quick = sequence(model, ids(1, 5), count=30)
    long = sequence(
        model, ids(2, 400), step_size=20, count=1, progress=lambda done, _: places.append((done, len(quick.written)))
    )
    engine.submit(long)
    engine.submit(quick)
    assert [emission.token for emission in engine.stream(quick)] == alone(model, ids(1, 5), count=30)
    list(engine.stream(long))
    assert len({written for done, written in places if 0 < done < 400}) > 10


def test_requests_beyond_the_memory_budget_wait_for_their_turn(model: Model) -> None:
    engine = Engine(model, Limits(state_bytes=1))
    several = [sequence(model, ids(seed, 20), count=40) for seed in range(3)]
    for one in several:
        engine.submit(one)
    writing = [
        sum(bool(each.written) and not each.finish_reason for each in several)
        for one in several
        for _ in engine.stream(one)
    ]
    assert len(writing) == 3 * 40
    assert max(writing) <= 1


def test_a_cancelled_answer_frees_its_place_at_once(model: Model) -> None:
    engine = Engine(model, Limits(most_rows=1))
    endless, next_one = sequence(model, ids(1, 5), count=2000), sequence(model, ids(2, 5), count=3)
    engine.submit(endless)
    engine.submit(next_one)
    stream = engine.stream(endless)
    next(stream)
    stream.close()
    assert [emission.token for emission in engine.stream(next_one)] == alone(model, ids(2, 5), count=3)
    assert len(endless.written) < 200


def test_an_answer_runs_ahead_of_its_reader_only_so_far(model: Model) -> None:
    engine = Engine(model)
    slow, other = sequence(model, ids(1, 5), count=500), sequence(model, ids(2, 5), count=100)
    engine.submit(slow)
    stream = engine.stream(slow)
    next(stream)
    answer(engine, other)
    assert len(slow.written) <= MOST_UNREAD + 9
    assert [*[emission.token for emission in stream]] == alone(model, ids(1, 5), count=500)[1:]


def test_an_error_ends_the_answers_it_concerns_and_no_others(model: Model) -> None:
    def failing(done: int, total: int) -> None:
        raise RuntimeError("stopped by the caller")

    engine = Engine(model)
    broken, sound = sequence(model, ids(1, 5), progress=failing), sequence(model, ids(2, 5))
    engine.submit(broken)
    engine.submit(sound)
    with pytest.raises(RuntimeError, match="stopped by the caller"):
        list(engine.stream(broken))
    assert [emission.token for emission in engine.stream(sound)] == alone(model, ids(2, 5))


@pytest.mark.parametrize("part", ["_begin", "read", "write", "drop_cancelled"])
def test_an_error_of_the_engines_own_reaches_everyone_who_waits_and_the_next_answer_is_right(
    model: Model, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    engine, original = Engine(model, Limits(most_rows=2)), getattr(Scheduler, part)
    several = [sequence(model, ids(seed, 5), count=9) for seed in range(4)]

    def failing(self: Scheduler, *given: object) -> object:
        if any(one in several for one in [*self._waiting, *self._writing, *given]):
            raise RuntimeError("a fault of the engine's own")
        return original(self, *given)

    monkeypatch.setattr(Scheduler, part, failing)
    for one in several:
        engine.submit(one)
    for one in several:
        engine.go_on()
        with pytest.raises(RuntimeError, match="a fault of the engine's own"):
            list(engine.stream(one))
        assert one.ended.wait(10)
    monkeypatch.undo()
    assert answer(engine, sequence(model, ids(1, 5))) == alone(model, ids(1, 5))


def test_a_sampler_that_leaves_the_vocabulary_is_an_error_and_not_a_crash(loaded: Loaded) -> None:
    for wrong in (10**6, -1):
        with pytest.raises(PromptError, match=f"sampler returned \\[{wrong}\\]"):
            generate(*loaded[:2], [5, 6], sampler=lambda _, wrong=wrong: mx.array([wrong]), max_tokens=4)
    assert generate(*loaded[:2], [5, 6], max_tokens=4, temperature=0)


def test_models_load_and_answer_in_any_threads(checkpoint: Checkpoint, loaded: Loaded) -> None:
    expected = generate(*loaded[:2], [5, 6, 7], max_tokens=8, temperature=0)
    found: dict[str, object] = {}

    def load_here() -> None:
        found["model"] = load_model(loaded.folder, ModelConfig.from_directory(loaded.folder))

    def answer_there() -> None:
        stream = stream_generate(found["model"], loaded.processor, [5, 6, 7], max_tokens=8, temperature=0)  # type: ignore[arg-type]
        responses = list(stream)
        found["text"] = "".join(response.text for response in responses)
        found["likeliest"] = mx.argmax(responses[0].logprobs).item()
        found["first"] = responses[0].token

    for run in (load_here, answer_there):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert found["text"] == expected
    assert found["likeliest"] == found["first"]
    assert generate(found["model"], loaded.processor, [5, 6, 7], max_tokens=8, temperature=0) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("lazy", [False, True])
def test_what_load_left_on_the_disk_is_read_in_whichever_thread_needs_it(checkpoint: Checkpoint, lazy: bool) -> None:
    folder, found = checkpoint("dense_vl"), []
    config = ModelConfig.from_directory(folder)
    expected = load_model(folder, config).vision.parameters()  # type: ignore[union-attr]

    def load_here() -> None:
        found.append(load_model(folder, config, lazy=lazy))

    thread = threading.Thread(target=load_here)
    thread.start()
    thread.join()
    found[0].materialize(vision=True)
    pairs = zip(*(tree_flatten(each) for each in (found[0].vision.parameters(), expected)), strict=True)
    assert all(name == other and np.array_equal(ours, theirs) for (name, ours), (other, theirs) in pairs)
    assert mx.isfinite(found[0](mx.array([[5, 6, 7]]))).all().item()


def test_a_cache_made_here_can_be_used_there(loaded: Loaded) -> None:
    model, processor, _ = loaded
    cache, found = model.make_cache(), []
    model.hidden_states(mx.array([[5, 6, 7]]), cache)
    mx.eval(cache.arrays())

    def go_on() -> None:
        found.append(generate(model, processor, [8, 9], prompt_cache=cache, max_tokens=8, temperature=0))

    thread = threading.Thread(target=go_on)
    thread.start()
    thread.join()
    assert found == [generate(model, processor, [5, 6, 7, 8, 9], max_tokens=8, temperature=0)]
    assert mx.argmax(model(mx.array([[1]]), cache)[:, -1]).item() >= 0


def loaded_again(loaded: Loaded) -> Model:
    return load_model(loaded.folder, ModelConfig.from_directory(loaded.folder))


def test_a_forked_process_says_that_it_cannot_generate(loaded: Loaded) -> None:
    generate(*loaded[:2], [5, 6], max_tokens=2)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(20)
        for use in (lambda: generate(*loaded[:2], [5, 6], max_tokens=2), lambda: loaded_again(loaded)):
            try:
                use()
            except MLXQwenError as error:
                os.write(write, str(error).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    assert os.read(read, 10_000).count(b'"spawn"') == 2
