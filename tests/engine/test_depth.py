"""How many tokens are guessed ahead: what pays by the clock, or where an answer must be repeatable, by itself alone."""

import random
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_qwen
from mlx_qwen.config import ModelConfig
from mlx_qwen.engine import scheduler
from mlx_qwen.engine.costs import Costs
from mlx_qwen.engine.depth import MOST_DRAFTS, Chooser, Drafts
from mlx_qwen.engine.emission import Endless
from mlx_qwen.engine.engine import Engine
from mlx_qwen.engine.rules import Rules
from mlx_qwen.engine.sampling import TokenSampler
from mlx_qwen.engine.sequence import Sequence
from mlx_qwen.engine.step import Batch
from mlx_qwen.keywords import options_and_settings
from mlx_qwen.loading import load_model
from mlx_qwen.options import GenerationOptions
from mlx_qwen.recommended import SamplingParameters
from mlx_qwen.requests import prepare_request
from mlx_qwen.settings import EngineSettings

Seconds = Callable[[int], float]


class Played:
    """Passes whose cost by depth and whose chance of a right guess are given, in order."""

    def __init__(self) -> None:
        self.costs, self.drafts, self.chooser = Costs(), Drafts(None, is_measured=True), Chooser(both_ways=True)
        self._random, self._running = random.Random(0), 0.0

    def run(self, seconds: Seconds, chance: float, passes: int = 400) -> list[int]:
        """The depths of some more passes; one without drafts is paid for by whichever pass comes after it."""
        depths = []
        for _ in range(passes):
            known = self.costs.of(1, "mtp", draft=0.15)
            depth = 0 if known is None else self.chooser.pick(self.drafts.expected(), known)
            waited, self._running = self._running, 0.0 if depth else seconds(0)
            self.costs.saw(1, "mtp", depth, waited + (seconds(depth) if depth else 0.001))
            right = 0
            while right < depth and self._random.random() < chance:
                right += 1
            self.drafts.saw(depth, right)
            depths.append(depth)
        return depths


def dear(depth: int) -> float:
    return 0.02 * (1 + 0.9 * depth)


def cheap(depth: int) -> float:
    return 0.02 * (1 + 0.05 * depth)


def fair(depth: int) -> float:
    return 0.02 * (1 + 0.2 * depth)


def share(depths: list[int], wanted: Callable[[int], bool]) -> float:
    return sum(map(wanted, depths)) / len(depths)


@pytest.mark.parametrize("chance", [0.3, 0.6, 0.85])
def test_drafts_that_cost_more_than_they_bring_are_left(chance: float) -> None:
    depths = Played().run(dear, chance)
    assert share(depths[100:], lambda depth: depth == 0) >= 0.95
    assert share(depths[300:], lambda depth: depth == 0) >= 0.97
    assert any(depths[100:]), "it is tried again now and then"


def test_drafts_that_cost_little_go_deep() -> None:
    depths = Played().run(cheap, 0.9)
    assert share(depths[100:], lambda depth: depth >= 6) >= 0.9


def test_the_depth_is_near_the_one_that_pays_most() -> None:
    """Against the rate that the true chance and the true costs give, written out."""

    def seconds(depth: int) -> float:
        return 0.02 * (1 + 0.25 * depth)

    def rate(depth: int) -> float:
        return sum(0.7**i for i in range(depth + 1)) / seconds(depth)

    depths = Played().run(seconds, 0.7, 600)[200:]
    assert sum(map(rate, depths)) / len(depths) >= 0.95 * max(rate(depth) for depth in range(MOST_DRAFTS + 1))


def test_a_change_in_the_middle_is_noticed_both_ways() -> None:
    played = Played()
    assert share(played.run(fair, 0.9)[100:], lambda depth: depth >= 4) >= 0.9
    assert share(played.run(fair, 0.02)[150:], lambda depth: depth <= 1) >= 0.9
    assert share(played.run(fair, 0.9, 800)[500:], lambda depth: depth >= 4) >= 0.8
    assert share(played.run(dear, 0.8)[150:], lambda depth: depth == 0) >= 0.85
    assert share(played.run(fair, 0.9, 1200)[800:], lambda depth: depth >= 4) >= 0.8


def test_what_the_first_pass_of_a_kind_took_says_nothing() -> None:
    costs = Costs()
    for seconds in (9.0, 0.5, 0.02, 0.02):
        costs.saw(1, "mtp", 0, seconds)
    costs.saw(1, "mtp", 2, 5.0)
    costs.saw(1, "mtp", 2, 0.03)
    known = costs.of(1, "mtp", draft=0.1)
    assert known is not None
    assert known[2] == pytest.approx(0.03)
    assert known[0] == pytest.approx(0.02)
    assert known[1] == pytest.approx(0.025)
    assert known[4] == pytest.approx(0.04)
    assert costs.of(2, "mtp", draft=0.1) is None


@pytest.fixture
def answering(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """The depths of the passes of one answer, by a clock that passes alone move."""
    path = checkpoint("dense", with_mtp=True)
    model = load_model(path, ModelConfig.from_directory(path))
    depths: list[int] = []
    now, running = [0.0], [0.0]

    def answer(seconds: Seconds, *, measured: bool, seed: int | None = 3) -> list[int]:
        decode, verify = Batch.decode, Batch.verify
        depths.clear()

        def decoded(batch: Batch) -> object:
            now[0], running[0] = now[0] + running[0] + 0.0001, seconds(0)
            depths.append(0)
            return decode(batch)

        def verified(batch: Batch, guessing: object) -> object:
            depth = guessing.depth  # type: ignore[attr-defined]
            now[0], running[0] = now[0] + running[0] + seconds(depth), 0.0
            depths.append(depth)
            return verify(batch, guessing)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(Batch, "decode", decoded)
            patch.setattr(Batch, "verify", verified)
            patch.setattr(scheduler, "perf_counter", lambda: now[0])
            ids = [5, 6, 7, 8]
            sampler = TokenSampler(
                SamplingParameters(temperature=1.0, top_k=2), prompt=mx.array(ids), vocab_size=299, seed=seed
            )
            drafts = Drafts(None, is_measured=measured)
            one, engine = Sequence(ids, sampler, Rules(), Endless(), 70, drafts), Engine(model)
            engine.submit(one)
            list(engine.stream(one))
        return list(depths)

    return answer


def test_the_engine_measures_its_own_passes(answering: Callable[..., list[int]]) -> None:
    assert share(answering(dear, measured=True)[20:], lambda depth: depth == 0) >= 0.8
    assert share(answering(lambda _: 0.01, measured=True)[10:], lambda depth: depth >= 5) >= 0.5


def test_depths_of_a_repeatable_answer_do_not_depend_on_the_clock(answering: Callable[..., list[int]]) -> None:
    assert answering(dear, measured=False) == answering(cheap, measured=False)


@pytest.mark.parametrize(
    ("chosen", "measured"),
    [
        ({"temperature": 1.0}, True),
        ({"temperature": 1.0, "seed": 1}, False),
        ({"temperature": 0.0}, False),
        ({"temperature": 1.0, "sampler": None, "num_draft_tokens": 3}, False),
        ({"sampler": lambda logprobs: mx.argmax(logprobs, axis=-1)}, False),
    ],
)
def test_what_was_measured_decides_only_where_no_answer_was_promised_again(
    chosen: dict[str, object], measured: bool
) -> None:
    model, processor = mlx_qwen.load()
    options, settings = options_and_settings(chosen)
    assert isinstance(options, GenerationOptions) and isinstance(settings, EngineSettings)
    request = prepare_request(model, processor, "hello", options, settings)
    assert request.sequence.drafts.is_measured == measured
