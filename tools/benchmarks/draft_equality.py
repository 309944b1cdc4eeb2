"""Whether greedy answers with drafts are the ones without, token for token, over long answers in batches of three."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import click
import mlx.core as mx
import numpy as np

from mlx_qwen.bench.table import Table
from mlx_qwen.checkpoint.released import reduced
from mlx_qwen.demo import demo_folder
from mlx_qwen.engine.depth import Drafts, stated_costs
from mlx_qwen.engine.draft_model import DraftModel
from mlx_qwen.engine.emission import Emission
from mlx_qwen.engine.engine import Engine
from mlx_qwen.engine.lookup import Lookup
from mlx_qwen.engine.prefix import PrefixIndex
from mlx_qwen.engine.sequence import Sequence
from mlx_qwen.loading import load
from mlx_qwen.model import Model
from mlx_qwen.model.mtp import MTP
from mlx_qwen.recommended import SamplingParameters
from tools.benchmarks.peer import random_pair
from tools.benchmarks.stepping import request

_ROWS, _PROMPT_TOKENS = 3, 24
_SMALL = {
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "vocab_size": 512,
}  # fmt: skip
_EXPERTS = {
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
_PENALTIES = {
    "": SamplingParameters(temperature=0),
    ", penalties": SamplingParameters(temperature=0, presence_penalty=1.5, repetition_penalty=1.1),
}
Change = Callable[[Sequence], None]


def bench_equality(*, tokens: int = 500) -> Table:
    """Three answers of `tokens` tokens at a time by each model, with each drafter, beside those without drafts."""
    rows = []
    for name, model, smaller in _models():
        for how, sampling in _PENALTIES.items():
            plain = _written(model, sampling, tokens, lambda _: None)
            for drafter, change in _drafters(smaller).items():
                found = _written(model, sampling, tokens, change)
                same = sum(a.token == b.token for a, b in zip(_flat(found), _flat(plain), strict=True))
                passes = sum(not emission.from_draft for emission in _flat(found))
                total = _ROWS * tokens
                rows.append((name + how, drafter, f"{same:,} of {total:,}", f"{total / passes:.2f}"))
                click.echo("  ".join(rows[-1]), err=True)
    note = (
        f"Greedy answers of {tokens} tokens, {_ROWS} at the same time, to random prompts. The small models have random "
        "weights, whose MTP layer knows nothing; their draft model is the model packed to 4 bits, the bundled one's is "
        "itself."
    )
    return Table("Answers with drafts beside those without", note, ("", "drafter", "equal", "tokens a pass"), rows)


def _models() -> Iterator[tuple[str, Model, Model]]:
    """Names, models, and who guesses for them."""
    for name, size, more in (("dense", "0.8B", {}), ("MoE", "35B-A3B", _EXPERTS)):
        config = reduced(size, num_layers=4, changes={**_SMALL, **more})
        (model, _), (smaller, _) = random_pair(config), random_pair(config, bits=4)
        model.mtp = MTP(config.text)
        mx.eval(model.mtp.parameters())
        yield name, model, smaller
    for dtype, name in ((mx.float32, "bundled in fp32"), (mx.bfloat16, "bundled in bf16")):
        yield name, load(demo_folder(), dtype=dtype)[0], load(demo_folder(), dtype=dtype)[0]


def _drafters(smaller: Model) -> Mapping[str, Change]:
    def depth(count: int | None, one: Sequence) -> None:
        one.drafts = Drafts(count)

    def by_model(one: Sequence) -> None:
        one.drafts, one.draft_model = Drafts(3), drafter

    def by_lookup(one: Sequence) -> None:
        one.lookup = Lookup(Drafts(None, stated_costs(draft=0)))

    drafter = DraftModel(smaller, PrefixIndex(0))
    mtp = {"MTP, 3": partial(depth, 3), "MTP, 7": partial(depth, 7), "MTP, auto": partial(depth, None)}
    return {**mtp, "draft model, 3": by_model, "prompt lookup": by_lookup}


def _written(model: Model, sampling: SamplingParameters, tokens: int, change: Change) -> list[list[Emission]]:
    vocab_size = model.config.text.vocab_size
    prompts = np.random.default_rng(0).integers(3, vocab_size, (_ROWS, _PROMPT_TOKENS)).tolist()
    engine = Engine(model)
    several = [request(model, ids, max_tokens=tokens, sampling=sampling) for ids in prompts]
    for one in several:
        change(one)
        engine.submit(one)
    return [list(engine.stream(one)) for one in several]


def _flat(answers: list[list[Emission]]) -> list[Emission]:
    return [emission for answer in answers for emission in answer]
