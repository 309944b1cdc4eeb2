"""Passes a token and acceptance by depth of the bundled model's MTP layer, on tasks that it can do."""

import random
from collections.abc import Iterator

from mlx_qwen.bench.table import Table
from mlx_qwen.demo import demo_folder, tasks
from mlx_qwen.demo.prompts import question
from mlx_qwen.engine.depth import MOST_DRAFTS
from mlx_qwen.engine.engine import engine_of
from mlx_qwen.loading import load
from mlx_qwen.model import Model
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt import Processor
from mlx_qwen.requests import prepare_request
from mlx_qwen.settings import EngineSettings

# The tasks of each kind of prompt, and how many passes a token are aimed at.
KINDS = {
    "arithmetic": (("arithmetic_reasoned", "arithmetic_direct"), 0.35),
    "recall": (("recall_one", "recall_short", "repeat"), 0.4),
}
SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0, "top_k": 20, "top_p": 0.95, "presence_penalty": 0.0, "seed": 1},
}
_MOST_TOKENS = 160


def bench_drafts(*, prompts: int = 5) -> Table:
    """Let the bundled model answer held-out questions with 1 to 7 drafts a pass, and with as many as pay."""
    model, processor = load(demo_folder())
    rows = []
    for kind, (names, target) in KINDS.items():
        asked = list(_asked(processor, names, prompts))
        for how, sampling in SAMPLINGS.items():
            for depth in (*range(1, MOST_DRAFTS + 1), "auto"):
                passes, tokens, acceptance = measured(model, processor, asked, sampling, depth)
                shares = " ".join(f"{share:.2f}" for share in acceptance)
                rows.append((f"{kind}, {how}", str(depth), f"{passes / tokens:.3f}", f"{target}", shares))
    note = (
        f"{prompts} held-out questions of each task, answers with their ends; every pass behind the prompt's counts. "
        "Sampled: temperature 1, top-k 20, top-p 0.95."
    )
    return Table(
        "Drafts of the bundled model", note, ("", "drafts", "passes a token", "aim", "accepted by depth"), rows
    )


def measured(
    model: Model, processor: Processor, asked: list[list[int]], sampling: dict[str, float], depth: int | str
) -> tuple[int, int, list[float]]:
    """Passes behind the prompts and tokens of all answers, and how often the guess at each depth was right where all
    before it were. The answers are written at the same time, each with its own number of drafts.
    """
    engine, settings = engine_of(model), EngineSettings(mtp=depth, prefix_cache=False)
    options = GenerationOptions(max_tokens=_MOST_TOKENS, **sampling)  # type: ignore[arg-type]
    passes = tokens = 0
    taken, tried = [0] * MOST_DRAFTS, [0] * MOST_DRAFTS
    sequences = [prepare_request(model, processor, ids, options, settings).sequence for ids in asked]
    for sequence in sequences:
        engine.submit(sequence)
    for sequence in sequences:
        emissions = list(engine.stream(sequence))
        # Each pass writes one token of the model's own choice, and the drafts that it agrees with.
        passes += sum(not emission.from_draft for emission in emissions)
        tokens += len(emissions)
        drafts = sequence.drafts
        taken = [a + b for a, b in zip(taken, drafts.all_taken, strict=True)]
        tried = [a + b for a, b in zip(tried, drafts.all_tried, strict=True)]
    return passes, tokens, [right / count for right, count in zip(taken, tried, strict=True) if count]


def _asked(processor: Processor, names: tuple[str, ...], count: int) -> Iterator[list[int]]:
    for name in names:
        rng = random.Random(name)
        for _ in range(count):
            example = tasks.draw(tasks.TASKS[name], rng, held_out=True)
            prompt = question(example)
            if not isinstance(prompt, str):
                prompt = processor.apply_chat_template(prompt, enable_thinking=example.thinking)
            yield processor.encode(prompt)
