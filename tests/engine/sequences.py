"""Sequences of random tokens for an engine without a tokenizer, and what it makes of them."""

from collections.abc import Sequence as Listed

import mlx.core as mx
import numpy as np

from mlx_qwen.engine.depth import Drafts
from mlx_qwen.engine.emission import Emission, Endless
from mlx_qwen.engine.engine import Engine
from mlx_qwen.engine.rules import Rules
from mlx_qwen.engine.sampling import TokenSampler
from mlx_qwen.engine.sequence import Sequence
from mlx_qwen.model import Model
from mlx_qwen.recommended import SamplingParameters

GREEDY = SamplingParameters(temperature=0)
PENALIZED = SamplingParameters(temperature=0, presence_penalty=1.5, repetition_penalty=1.2)
DRAWN = SamplingParameters(temperature=1.0, top_k=20, top_p=0.95, presence_penalty=1.0)


def prompt(seed: int, count: int = 20) -> list[int]:
    return np.random.default_rng(seed).integers(3, 299, count).tolist()


def sequence(
    model: Model,
    ids: Listed[int],
    drafts: int | None,
    parameters: SamplingParameters = GREEDY,
    *,
    count: int = 60,
    rules: Rules | None = None,
    **options: object,
) -> Sequence:
    vocab_size = model.config.text.vocab_size
    sampler = TokenSampler(parameters, prompt=mx.array(ids), vocab_size=vocab_size, seed=7, **options)  # type: ignore[arg-type]
    return Sequence(list(ids), sampler, rules or Rules(), Endless(), count, Drafts(drafts))


def written(engine: Engine, *sequences: Sequence) -> list[list[Emission]]:
    for each in sequences:
        engine.submit(each)
    return [list(engine.stream(each)) for each in sequences]


def tokens(emissions: Listed[Emission]) -> list[int]:
    return [emission.token for emission in emissions]
