"""One way to drive every runtime that is compared: load a folder, then greedy tokens that no end token stops."""

from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx

from mlx_qwen.bench.timing import OURS, PEER

VISION_PEER = "mlx-vlm"

# Token ids of a prompt and the number of tokens to write, to the tokens as they come.
Writer = Callable[[list[int], int], Iterator[int]]


def ours(folder: Path) -> Writer:
    """This project's engine, as `stream_generate` uses it."""
    from mlx_qwen.config import ModelConfig
    from mlx_qwen.engine.depth import Drafts
    from mlx_qwen.engine.emission import Endless
    from mlx_qwen.engine.engine import Engine
    from mlx_qwen.engine.rules import Rules
    from mlx_qwen.engine.sampling import TokenSampler
    from mlx_qwen.engine.sequence import Sequence
    from mlx_qwen.loading import load_model
    from mlx_qwen.recommended import GREEDY

    config = ModelConfig.from_directory(folder)
    engine = Engine(load_model(folder, config))

    def write(ids: list[int], count: int) -> Iterator[int]:
        sampler = TokenSampler(GREEDY, prompt=mx.array(ids), vocab_size=config.text.vocab_size)
        sequence = Sequence(ids, sampler, Rules(), Endless(), count, Drafts(0))
        engine.submit(sequence)
        for emission in engine.stream(sequence):
            yield emission.token

    return write


def mlx_lm(folder: Path) -> Writer:
    """mlx-lm's model and its `generate_step`."""
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)

    def write(ids: list[int], count: int) -> Iterator[int]:
        for token, _ in generate_step(mx.array(ids), model, max_tokens=count):
            yield int(token)

    return write


def mlx_vlm(folder: Path) -> Writer:
    """mlx-vlm's model and its `generate_step`, without pixels."""
    from mlx_vlm.generate import generate_step
    from mlx_vlm.utils import load_model

    model = load_model(folder)

    def write(ids: list[int], count: int) -> Iterator[int]:
        for token, _ in generate_step(mx.array([ids]), model, None, None, max_tokens=count, temperature=0.0):
            yield int(token)

    return write


RUNTIMES: dict[str, Callable[[Path], Writer]] = {OURS: ours, PEER: mlx_lm, VISION_PEER: mlx_vlm}
