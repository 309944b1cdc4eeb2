"""How many tokens of an agent's prompts are computed, beside the least that anyone would have to."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen.bench.table import Table
from mlx_qwen.config import ModelConfig
from mlx_qwen.demo import demo_folder
from mlx_qwen.engine.engine import Engine
from mlx_qwen.engine.prefix import PrefixIndex
from mlx_qwen.model import Model
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt import Processor
from mlx_qwen.requests import prepare_request
from mlx_qwen.settings import EngineSettings
from tools.benchmarks.agent_script import answer_ids, offered, script

Key = Sequence[int]


class Counted(NamedTuple):
    """One request: tokens of its prompt, those that were computed, and the least."""

    what: str
    prompt: int
    computed: int
    least: int


def bench_session() -> Table:
    """Play the scripted session on a tiny model, whose answers are put into its mouth: counting needs no weights."""
    model, processor = tiny_model()
    counted = played(model, processor)
    total = Counted("all", *(sum(part) for part in zip(*(each[1:] for each in counted), strict=True)))
    rows = [
        (each.what, f"{each.prompt:,}", f"{each.computed:,}", f"{each.least:,}", _ratio(each))
        for each in (*counted, total)
    ]
    note = (
        f"{len(counted)} requests with tools and reasoning. Least: each prompt less its longest beginning in common "
        "with any prompt before and its answer."
    )
    return Table("A session of an agent", note, ("", "prompt tokens", "computed", "least", "ratio"), rows)


def tiny_model() -> tuple[Model, Processor]:
    """Two layers and a small vision tower with random weights, behind the bundled model's tokenizer and template."""
    raw = ModelConfig.from_directory(demo_folder()).raw
    layers = ["linear_attention", "full_attention"]
    text = {"num_hidden_layers": 2, "layer_types": layers, "max_position_embeddings": 1 << 16}
    changed = {"text_config": {**raw["text_config"], **text}, "vision_config": {**raw["vision_config"], "depth": 1}}
    config = ModelConfig.from_dict({**raw, **changed})
    model = Model(config, with_vision=True)
    mx.eval(model.parameters())
    return model, Processor.from_directory(demo_folder(), config)


def played(model: Model, processor: Processor) -> list[Counted]:
    """Each request of the script in turn, in an engine of its own."""
    engine, tools = Engine(model, prefixes=PrefixIndex(4 << 30)), offered()
    before: list[Key] = []
    counted = []
    for asked in script():
        answer = answer_ids(processor, asked, tools)
        options = GenerationOptions(
            max_tokens=len(answer), enable_thinking=True, tools=tools, sampler=_Scripted(answer)
        )
        request = prepare_request(model, processor, asked.messages, options, EngineSettings(mtp=0))
        sequence = request.sequence
        assert sequence.key is not None, "prefixes are kept"
        mx.eval(
            sequence.sampler.prompt, [x for one in sequence.media for x in (one.pixels.values, one.pixels.grid_thw)]
        )
        engine.submit(sequence)
        written = [emission.token for emission in engine.stream(sequence)]
        assert written == answer, "the answer is the script's"
        key = sequence.key.tolist()
        counted.append(Counted(asked.what, len(key), len(key) - sequence.cached, least(key, before)))
        before.append([*key, *answer])
    return counted


def least(key: Key, before: Sequence[Key]) -> int:
    """How many numbers of `key` are left behind the longest beginning that it shares with any of `before`."""
    return len(key) - max((_shared(key, other) for other in before), default=0)


def _shared(key: Key, other: Key) -> int:
    length = min(len(key), len(other))
    differs = np.asarray(key[:length]) != np.asarray(other[:length])
    return int(differs.argmax()) if differs.any() else length


class _Scripted:
    """A sampler that draws what was written before."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = iter(ids)

    def __call__(self, logprobs: mx.array) -> mx.array:
        return mx.array([next(self._ids)])


def _ratio(each: Counted) -> str:
    return f"{each.computed / each.least:.2f}" if each.least else "–"
