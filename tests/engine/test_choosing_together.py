"""Rows of a batch are chosen for at once, each as it would be alone."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen.bench.as_on_gpu import as_on_gpu
from mlx_qwen.bench.graph import count_nodes
from mlx_qwen.engine.choice import Choice, tokens_of
from mlx_qwen.engine.sampling import History, Pick, TokenSampler, choose_all, guess_all
from mlx_qwen.recommended import GREEDY, SamplingParameters

V = 300
_DRAWN = SamplingParameters(temperature=0.8, top_k=40, top_p=0.95)
_KINDS = {
    "greedy": GREEDY,
    "drawn": _DRAWN,
    "drawn from all": SamplingParameters(temperature=1.2),
    "penalized": replace(_DRAWN, presence_penalty=1.5, frequency_penalty=0.3, repetition_penalty=1.2),
    "without top choices": replace(_DRAWN, xtc_probability=0.5, xtc_threshold=0.05),
}


def _sampler(parameters: SamplingParameters, seed: int, **options: object) -> TokenSampler:
    return TokenSampler(parameters, prompt=mx.array([1, 2, seed]), vocab_size=V, seed=seed, **options)  # type: ignore[arg-type]


def _behind(sampler: TokenSampler, count: int) -> History:
    history = sampler.start()
    for token in range(count):
        history = sampler.saw(history, mx.array([(7 * token) % V]))
    return history


def _logits(rows: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, 3, (rows, V)).astype(np.float32))


def _mixed() -> list[Pick]:
    """Rows of all kinds in turn, three of each, at places of their own, some with tokens that are ruled out."""
    picks = []
    for seed in range(3):
        for parameters in _KINDS.values():
            sampler = _sampler(parameters, 10 + seed, spared_by_xtc=[4])
            allowed = mx.array(np.random.default_rng(seed).random((1, V)) < 0.5) if seed == 2 else None
            picks.append(Pick(sampler, _behind(sampler, seed + len(picks)), allowed))
        biased = _sampler(_DRAWN, seed, logit_bias={5: 9.0, 6: -2.0 * seed}, top_logprobs=4)
        picks.append(Pick(biased, _behind(biased, 1)))
        own = _sampler(GREEDY, seed, logits_processors=[lambda tokens, scores: -scores])
        picks.append(Pick(own, _behind(own, 2)))
    return picks


def _alone(logits: mx.array, pick: Pick) -> Choice:
    return pick.sampler.choose(logits, pick.history, pick.allowed)


def test_rows_of_all_kinds_at_once_are_chosen_as_each_alone() -> None:
    picks = _mixed()
    for seed in range(20):
        logits = _logits(len(picks), seed)
        together = choose_all(logits, picks)
        for i, (pick, choice) in enumerate(zip(picks, together, strict=True)):
            alone = _alone(logits[i : i + 1], pick)
            assert choice.known() == alone.known() == choice.token.item()
            np.testing.assert_allclose(choice.logprob.item(), alone.logprob.item(), atol=1e-6)  # type: ignore[arg-type]
            np.testing.assert_allclose(np.array(choice.logprobs), np.array(alone.logprobs), atol=1e-6)
            assert [part.tolist() for part in choice.top[:1]] == [part.tolist() for part in alone.top[:1]]
        assert tokens_of(together).tolist() == [choice.known() for choice in together]


def test_guesses_of_rows_of_all_kinds_are_those_of_each_alone() -> None:
    picks = [Pick(pick.sampler, pick.history) for pick in _mixed()]
    logits = _logits(len(picks))
    expected = [pick.sampler.draft(logits[i : i + 1], pick.history).item() for i, pick in enumerate(picks)]
    assert guess_all(logits, picks).tolist() == expected


def test_a_token_that_a_rule_forces_is_one_of_its_rows_distribution() -> None:
    picks = _mixed()[:2]
    forced = [choice.replaced_by(9) for choice in choose_all(_logits(2), picks)]
    assert tokens_of(forced).tolist() == [9, 9]
    for choice in forced:
        assert choice.known() == 9
        assert choice.logprob.item() == choice.logprobs[0, 9].item()


@pytest.mark.parametrize("kind", _KINDS)
def test_what_chooses_two_rows_of_a_kind_chooses_sixteen(kind: str) -> None:
    def launches(rows: int) -> int:
        picks = [Pick(one, _behind(one, 3)) for one in (_sampler(_KINDS[kind], seed) for seed in range(rows))]
        logits = _logits(rows)
        mx.eval([part for pick in picks for part in pick.history if isinstance(part, mx.array)])

        def choose() -> list[mx.array]:
            choices = choose_all(logits, picks)
            return [tokens_of(choices), choices[0].chosen.logprobs]

        with as_on_gpu() as counted:
            return count_nodes(choose, counted).total()

    assert launches(16) == launches(2)
