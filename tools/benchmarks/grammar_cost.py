"""What holding an answer to a grammar costs a token, beside the same tokens written freely."""

from statistics import median
from time import perf_counter

import mlx.core as mx
import numpy as np

from mlx_qwen.bench.table import Table
from mlx_qwen.config import ModelConfig
from mlx_qwen.demo import demo_folder
from mlx_qwen.engine.engine import engine_of
from mlx_qwen.engine.grammar import Masks
from mlx_qwen.loading import load
from mlx_qwen.model import Model
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt import Processor
from mlx_qwen.requests import prepare_request
from mlx_qwen.settings import EngineSettings

_RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 20, "maxLength": 40},
        "kind": {"enum": ["big", "small"]},
        "scores": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 99},
            "minItems": 8,
            "maxItems": 8,
        },
    },
    "required": ["name", "kind", "scores"],
    "additionalProperties": False,
}
HELD: dict[str, dict[str, object]] = {"a schema": {"schema": _RECORD}, "a regex": {"regex": "[ -~]{64}"}}
_VOCAB = 248_320


def bench_grammar(*, repeats: int = 5) -> Table:
    """Milliseconds a token of the bundled model with and without a grammar, one row and with three drafts a pass."""
    model, processor = load(demo_folder())
    endless = Processor.from_directory(demo_folder(), ModelConfig.from_directory(demo_folder()))
    endless.end_token_ids = frozenset()
    rows = []
    for name, options in HELD.items():
        for drafts in (0, 3):
            free, held = [], []
            for turn in range(repeats + 1):
                pairs: list[tuple[Processor, dict[str, object]]] = [(endless, {}), (processor, options)]
                times = [_a_token(model, reader, drafts, chosen, turn) for reader, chosen in pairs]
                if turn:
                    free.append(times[0])
                    held.append(times[1])
            rows.append(
                (name, str(drafts), f"{median(free):.2f}", f"{median(held):.2f}", f"{median(held) / median(free):.2f}")
            )
    expanding = _expanding(repeats)
    note = (
        f"Milliseconds a token, bundled model, medians of {repeats} turns in alternation; free answers are 60 tokens. "
        f"A mask of {_VOCAB:,} tokens is expanded on the device in {expanding:.2f} ms."
    )
    return Table("Answers held to a grammar", note, ("", "drafts", "free", "held", "ratio"), rows)


def _a_token(model: Model, processor: Processor, drafts: int, chosen: dict[str, object], turn: int) -> float:
    options = GenerationOptions(max_tokens=60, temperature=1.0, seed=turn, enable_thinking=False, **chosen)  # type: ignore[arg-type]
    question = [{"role": "user", "content": "Tell me something."}]
    request = prepare_request(model, processor, question, options, EngineSettings(mtp=drafts, prefix_cache=False))
    engine = engine_of(model)
    engine.submit(request.sequence)
    stream = engine.stream(request.sequence)
    next(stream)
    begin, tokens = perf_counter(), sum(1 for _ in stream)
    return (perf_counter() - begin) * 1e3 / max(tokens, 1)


def _expanding(repeats: int) -> float:
    """Milliseconds to send the bits of a large vocabulary to the device and make a mask of them."""
    masks = Masks(_VOCAB, (), ())
    words = np.full(masks.words, 0x55555555, np.int32)
    times = []
    for _ in range(10 * repeats):
        begin = perf_counter()
        mx.eval(masks.expanded(words))
        times.append(perf_counter() - begin)
    return median(times) * 1e3
