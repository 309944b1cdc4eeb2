"""Rules end only the answer that they are kept for, and looking ahead changes none of them."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen.config import ModelConfig
from mlx_qwen.engine.engine import Engine
from mlx_qwen.engine.rules import Rules
from mlx_qwen.engine.sequence import Sequence
from mlx_qwen.engine.thinking import Thinking
from mlx_qwen.errors import MLXQwenError
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model
from tests.engine.sequences import DRAWN, prompt, sequence, tokens, written


@pytest.fixture(scope="module")
def model(checkpoint) -> Model:
    path = checkpoint("dense", with_mtp=True)
    return load_model(path, ModelConfig.from_directory(path))


class Next:
    """Lets only the token through that is one more than the last, or two; breaks after `limit` tokens."""

    def __init__(self, vocab_size: int, limit: int | None = None) -> None:
        self.size, self.limit = vocab_size, limit
        self.last, self.seen = 10, 0
        self.failure: MLXQwenError | None = None

    def forced(self) -> int | None:
        return None

    def allowed(self) -> mx.array | None:
        mask = np.zeros((1, self.size), np.bool_)
        mask[0, self.last + 1 : self.last + 3] = True  # none behind the vocabulary's end
        return mx.array(mask)

    def saw(self, token: int) -> None:
        self.last, self.seen = token, self.seen + 1
        if self.seen == self.limit:
            self.failure = MLXQwenError("It broke.")

    def fork(self) -> "Next":
        other = Next(self.size, self.limit)
        other.last, other.seen = self.last, self.seen
        return other


def held(model: Model, limit: int | None = None) -> Rules:
    return Rules([Next(model.config.text.vocab_size, limit)], constrain=True)


@pytest.mark.parametrize("depth", [0, 3])
def test_a_rule_that_breaks_ends_its_own_answer_alone(model: Model, depth: int) -> None:
    engine = Engine(model)
    others = [sequence(model, prompt(seed), depth, count=30, rules=held(model)) for seed in (1, 2)]
    broken = sequence(model, prompt(3), depth, count=30, rules=held(model, limit=7))
    for each in (*others, broken):
        engine.submit(each)
    with pytest.raises(MLXQwenError, match="It broke"):
        list(engine.stream(broken))
    for seed, each in zip((1, 2), others, strict=True):
        alone = written(Engine(model), sequence(model, prompt(seed), 0, count=30, rules=held(model)))[0]
        assert tokens(list(engine.stream(each))) == tokens(alone)


class Stumbling:
    """What a caller may hand in, raising once it was asked so often: a follower, a sampler, a processor, a rule."""

    finish_reason = None
    failure = None

    def __init__(self, asked: int) -> None:
        self.left = asked

    def stumble(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("a fault of the caller's own")

    def push(self, token: int) -> None:
        self.stumble()

    def sample(self, logprobs: mx.array) -> mx.array:
        self.stumble()
        return mx.argmax(logprobs, axis=-1)

    def process(self, tokens: mx.array, logits: mx.array) -> mx.array:
        self.stumble()
        return logits

    def forced(self) -> None:
        return None

    def saw(self, token: int) -> None:
        self.stumble()

    def allowed(self) -> None:
        self.stumble()

    def fork(self) -> "Stumbling":
        return Stumbling(self.left)


def stumbling(model: Model, part: str, depth: int) -> Sequence:
    """A row whose `part` raises after some tokens."""
    own = Stumbling(9)
    functions = {"sampler": {"sampler": own.sample}, "processor": {"logits_processors": [own.process]}}
    rules = Rules([own], constrain=part == "mask") if part in ("mask", "rule") else None
    one = sequence(model, prompt(3), depth, count=30, rules=rules, **functions.get(part, {}))
    if part == "follower":
        one.follower = own
    return one


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("part", ["follower", "sampler", "processor", "rule", "mask"])
def test_what_a_callers_own_part_raises_ends_its_answer_alone(model: Model, part: str, depth: int) -> None:
    engine, broken = Engine(model), stumbling(model, part, depth)
    others = [sequence(model, prompt(1), depth), sequence(model, prompt(2), depth, rules=held(model), count=30)]
    for each in (*others, broken):
        engine.submit(each)
    with pytest.raises(RuntimeError, match="a fault of the caller's own"):
        list(engine.stream(broken))
    assert 0 < len(broken.written) < 30
    assert broken.ended.wait(10)
    for seed, each, rules in ((1, others[0], None), (2, others[1], held(model))):
        alone = written(Engine(model), sequence(model, prompt(seed), 0, rules=rules, count=each.max_tokens))[0]
        assert tokens(list(engine.stream(each))) == tokens(alone)


@pytest.mark.parametrize("depth", [1, 4])
def test_what_a_rule_allows_is_the_same_with_drafts(model: Model, depth: int) -> None:
    engine = Engine(model)
    plain, drafted = written(
        engine, *(sequence(model, prompt(5), each, DRAWN, rules=held(model)) for each in (0, depth))
    )
    assert tokens(drafted) == tokens(plain)
    assert all(0 < after - before < 3 for before, after in zip(tokens(plain), tokens(plain)[1:], strict=False))


def test_looking_ahead_is_not_noted(model: Model) -> None:
    thinking = Thinking(2, thinking=(1, 2), closing=[9, 2, 9], inside=True)
    rules = Rules([thinking, Next(model.config.text.vocab_size)], constrain=True)
    masks = rules.allowed_behind([20, 30])
    assert [np.flatnonzero(np.array(mask)).tolist() for mask in masks] == [[21, 22], [31, 32]]
    assert (thinking.spent, rules.forced()) == (0, None)
    allowed = rules.allowed()
    assert allowed is not None
    assert np.flatnonzero(np.array(allowed)).tolist() == [11, 12]
