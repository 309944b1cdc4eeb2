"""Going on from what the index holds gives the logits of a fresh prefill, wherever the checkpoint lies."""

from collections.abc import Callable
from pathlib import Path
from random import Random

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen.config import ModelConfig
from mlx_qwen.engine.anchors import Marks, Span, anchors, question_end
from mlx_qwen.engine.prefix import PrefixIndex, prefix_key
from mlx_qwen.loading import load_model
from mlx_qwen.media.grids import Kind
from mlx_qwen.model import Model
from mlx_qwen.model.cache import kv_packing
from mlx_qwen.model.multimodal import Embedded, Pixels
from mlx_qwen.model.state import State, empty_state

Checkpoint = Callable[..., Path]
MARKS = Marks(start=290, user=(291,), system=(292,), tool_response=293)
TOLERANCE = 2e-4


def load(path: Path) -> Model:
    return load_model(path, ModelConfig.from_directory(path))


class Served:
    """A model behind an index: prompts are read from the longest checkpoint, and leave theirs."""

    def __init__(self, model: Model, index: PrefixIndex, *, kv_bits: int | None = None) -> None:
        self.model = model
        self.index = index
        self.packing = kv_packing(model.config.text, kv_bits)
        self.computed = 0

    def fresh(self) -> State:
        return empty_state(self.model.config.text, self.packing, mtp=self.model.mtp is not None)

    def logits(self, prompt: list[int]) -> tuple[np.ndarray, State]:
        """After the prompt's last token [V], and the state there."""
        at, state = self.index.take(prompt) or (0, self.fresh())
        ends = anchors(prompt, MARKS, after=at)
        for end in ends:
            state, at = self.read(state, prompt[at:end]), end
            self.index.insert(prompt[:end], state, "prompt" if end <= question_end(prompt, MARKS) else "answer")
        assert state.last is not None
        return np.array(self.model.logits(state.last)[0, 0]), state

    def read(self, state: State, ids: list[int]) -> State:
        self.computed += len(ids)
        state = self.model.step(mx.array([ids]), state).state
        mx.eval(state.arrays())
        return state

    def answer(self, prompt: list[int], length: int) -> list[int]:
        logits, state = self.logits(prompt)
        answer: list[int] = []
        while len(answer) < length:
            answer.append(int(logits[:280].argmax()))
            state = self.read(state, answer[-1:])
            assert state.last is not None
            logits = np.array(self.model.logits(state.last)[0, 0])
        self.index.insert([*prompt, *answer], state, "answer")
        return answer


def words(random: Random, most: int) -> list[int]:
    return [random.randrange(280) for _ in range(random.randrange(1, most))]


def assert_near(found: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(
    ("kind", "kv_bits", "budget"), [("dense", None, 1 << 40), ("moe", None, 2_500_000), ("dense", 8, 2_500_000)]
)
def test_sessions_get_the_logits_of_a_fresh_prefill(
    checkpoint: Checkpoint, kind: str, kv_bits: int | None, budget: int
) -> None:
    model, random = load(checkpoint(kind, with_mtp=True)), Random(7)
    served = Served(model, PrefixIndex(budget), kv_bits=kv_bits)
    system = [290, 292, *words(random, 40), *[7] * 20]
    turns: list[list[int]] = []
    asked = 0
    for _ in range(14):
        move = random.randrange(5)
        if move == 0 or not turns:
            turns = [] if random.random() < 0.5 else turns[: random.randrange(len(turns) + 1)]
        if move == 1 and turns:
            # Reasoning is dropped: the answer comes back shorter.
            turns[-1] = turns[-1][: random.randrange(len(turns[-1]))]
        if move != 2:
            role = [291, 293] if move == 3 else [291]
            turns.append([290, *role, *words(random, 60)])
        prompt = [*system, *(token for turn in turns for token in turn), 290, 294]
        found, state = served.logits(prompt)
        plain = Served(model, PrefixIndex(0), kv_bits=kv_bits)
        expected, fresh = plain.logits(prompt)
        tolerance = 0.03 if kv_bits else TOLERANCE
        assert_near(found, expected, tolerance)
        assert state.mtp[0].length == fresh.mtp[0].length == len(prompt) - 1
        for layer in range(1 if kv_bits is None else 0):
            assert_near(np.array(state.mtp[0].read(layer)), np.array(fresh.mtp[0].read(layer)))
        asked += len(prompt)
        del state, fresh
        turns.append([290, 294, *served.answer(prompt, random.randrange(1, 12))])
        assert served.index.nbytes <= budget
    assert served.computed < asked / 2


def test_the_same_prompt_again_computes_nothing(checkpoint: Checkpoint) -> None:
    served = Served(load(checkpoint("dense")), PrefixIndex(1 << 40))
    prompt = [290, 291, *range(50), 290, 294]
    answer = served.answer(prompt, 10)
    computed = served.computed
    first = served.logits(prompt)[0]
    assert served.computed == computed
    assert served.answer(prompt, 10) == answer
    assert_near(first, served.logits(prompt)[0], 0)


def test_images_count_as_what_they_show(checkpoint: Checkpoint) -> None:
    model = load(checkpoint("dense_vl"))
    ids = [*range(20), 302, *[300] * 6, 303, *range(30, 50)]
    generator = np.random.default_rng(0)
    images = {name: mx.array(generator.standard_normal((24, 96)), mx.float32) for name in (b"cat", b"dog")}
    index, computed = PrefixIndex(1 << 40), []

    def embedded(name: bytes) -> Embedded:
        pixels = Pixels(Kind.IMAGE, images[name], mx.array([[1, 4, 6]]))
        return model.embed(mx.array([ids]), [pixels], empty_state(model.config.text))

    def logits(name: bytes, index: PrefixIndex) -> np.ndarray:
        key, whole = prefix_key(ids, [(21, 6, name)]), embedded(name)
        at, state = index.take(key) or (0, empty_state(model.config.text))
        computed.append(len(ids) - at)
        for end in [place for place in (18, 21, 29, *anchors(ids, None, media=[Span(21, 6)])) if place > at]:
            state = model.step(mx.array([ids[at:end]]), state, embedded=whole.part(at, end)).state
            at = end
            mx.eval(state.arrays())
            index.insert(key[:end], state, "prompt")
        assert state.last is not None
        return np.array(model.logits(state.last)[0, 0])

    alone = {name: logits(name, PrefixIndex(0)) for name in images}
    computed.clear()
    for name in (b"cat", b"dog", b"cat", b"dog"):
        assert_near(logits(name, index), alone[name])
    assert computed == [48, 48 - 21, 0, 0]
    assert np.abs(alone[b"cat"] - alone[b"dog"]).max() > 10 * TOLERANCE * np.abs(alone[b"cat"]).max()
    # What follows an image stands at other positions than tokens: the checkpoint behind it remembers by how much.
    after_image = index.take(prefix_key(ids, [(21, 6, b"cat")])[:-1])
    assert after_image is not None and after_image.length == 29
    state = model.step(mx.array([ids[29:]]), after_image.state).state
    assert state.last is not None
    assert_near(np.array(model.logits(state.last)[0, 0]), alone[b"cat"])
