"""What a guess of the MTP layer costs from parts of the real vocabulary, beside one from all of it."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen.bench.table import Table
from mlx_qwen.bench.timing import median_times
from mlx_qwen.checkpoint.released import reduced
from mlx_qwen.engine.draft import MTPDrafter
from mlx_qwen.engine.sampling import TokenSampler
from mlx_qwen.model import Model
from mlx_qwen.model.partial_head import Part
from mlx_qwen.recommended import SamplingParameters

SAMPLINGS = {
    "greedy": SamplingParameters(temperature=0),
    "drawn": SamplingParameters(temperature=1.0, top_p=0.95, top_k=20, presence_penalty=1.5),
}
_EIGHTHS = (1, 2, 3, 5)
_SPECIAL = 276


def bench_draft_vocabulary(*, repeats: int = 5, vocab_size: int = 248_320) -> Table:
    """Guesses of a 0.8B's MTP layer with random weights at 4 bits, from one to five eighths of its vocabulary."""
    model = _model(vocab_size)
    high = vocab_size - _SPECIAL
    parts = {"all": None, **{f"{n}/8": Part(vocab_size * n // 8, high, vocab_size) for n in _EIGHTHS}}
    rows = []
    for how, sampling in SAMPLINGS.items():
        seconds = median_times({name: _guess(model, sampling, part) for name, part in parts.items()}, repeats)
        rows += [
            (how, name, f"{_read(model, parts[name]) / 1e6:,.1f} MB", f"{1e3 * taken:.1f} ms", _share(taken, seconds))
            for name, taken in seconds.items()
        ]
    share = MTPDrafter(model).head_share
    note = (
        f"One token, 0.8B's sizes, {vocab_size:,} tokens; the last ones are special and in every part. The head is "
        f"{share:.2f} of what a guess reads. Drawn: temperature 1, top-k 20, top-p 0.95, presence penalty 1.5."
    )
    return Table("Guesses from a part of the vocabulary", note, ("", "from", "head", "a guess", "of all"), rows)


def _model(vocab_size: int) -> Model:
    """Random weights of one group of layers, an MTP layer and a tied head, at 4 bits."""
    model = Model(reduced("0.8B", num_layers=4, changes={"vocab_size": vocab_size, "mtp_num_hidden_layers": 1}))
    nn.quantize(
        model, group_size=64, bits=4, class_predicate=lambda _, part: isinstance(part, nn.Linear | nn.Embedding)
    )
    mx.eval(model.parameters())
    return model


def _guess(model: Model, sampling: SamplingParameters, part: Part | None) -> Callable[[], None]:
    vocab_size, hidden = model.config.text.vocab_size, model.config.text.hidden_size
    sampler = TokenSampler(sampling, prompt=mx.array([1, 2, 3]), vocab_size=vocab_size, seed=1)
    states, history = mx.random.normal((1, 1, hidden)), sampler.start()

    def run() -> None:
        draft = model.mtp_step(states, mx.array([[5]]), part=part)
        mx.eval(sampler.draft(draft.logits[:, -1], history, part))

    return run


def _read(model: Model, part: Part | None) -> float:
    head, rows = model.embed_tokens, model.config.text.vocab_size
    whole: int = sum(head[name].nbytes for name in ("weight", "scales", "biases"))
    return whole * (part.size if part else rows) / rows


def _share(taken: float, seconds: dict[str, float]) -> str:
    return f"{taken / seconds['all']:.2f}"
