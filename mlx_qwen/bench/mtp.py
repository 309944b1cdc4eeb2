"""How far ahead the MTP layer drafts what the model then writes, and which states it was trained to read."""

import random
from collections.abc import Iterator, Mapping, Sequence

import mlx.core as mx
import numpy as np

from mlx_qwen.bench.table import Table
from mlx_qwen.demo import tasks
from mlx_qwen.demo.prompts import question
from mlx_qwen.errors import MLXQwenError
from mlx_qwen.model import Model
from mlx_qwen.model.mtp_likelihood import Likelihoods, Text, mtp_likelihoods, settle_mtp_reads
from mlx_qwen.prompt import Processor

DEPTH = 7
PROMPTS = {
    "code": (
        "Write a Python function that merges overlapping intervals, with a docstring and three tests.",
        "Write a small C program that counts the words of a text file.",
    ),
    "prose": (
        "Explain to a curious child why the sky is blue, in a few paragraphs.",
        "Tell a short story about a lighthouse keeper who finds a message in a bottle.",
    ),
    "lists": (
        "List the planets of the solar system in a table with diameter, moons and one remark each.",
        "Write a shopping list and a recipe for vegetable soup for six people.",
    ),
}
# The demo knows nothing but its tasks.
_DEMO_TASKS = {"sums": ("arithmetic_reasoned", 8), "recall": ("recall_one", 16), "tales": ("tale", 8)}


def bench_mtp(model: Model, processor: Processor, *, is_demo: bool, tokens: int) -> list[Table]:
    """Let the model write up to `tokens` tokens after each prompt, greedily, and have the MTP layer draft them.

    Raises:
        MLXQwenError: the model has no MTP layer that can be used, or it writes nothing.
    """
    if model.mtp is None:
        raise MLXQwenError(
            "This model has no MTP layer to draft with: its checkpoint lacks the mtp.* tensors, or says that they "
            "read what this version does not know. Convert it again from a source that has them."
        )
    prompts = demo_prompts(processor) if is_demo else chat_prompts(processor)
    texts = {kind: [written(model, processor, ids, tokens) for ids in given] for kind, given in prompts.items()}
    everything = [text for group in texts.values() for text in group]
    if not any(text.drafted for text in everything):
        raise MLXQwenError("The model ends its answers at once, so that there is nothing to draft.")
    measured = settle_mtp_reads(model, everything)
    known = "as was found out now" if measured else "as its checkpoint says, or was found out before"
    return [
        _likelihood_table(measured or mtp_likelihoods(model, everything), model, known),
        _acceptance_table(model, texts),
    ]


def chat_prompts(processor: Processor) -> Mapping[str, Sequence[list[int]]]:
    """Token ids of PROMPTS, as chats where the checkpoint has a template."""

    def ids(prompt: str) -> list[int]:
        chat = [{"role": "user", "content": prompt}]
        return processor.encode(prompt if processor.chat_template is None else processor.apply_chat_template(chat))

    return {kind: [ids(prompt) for prompt in group] for kind, group in PROMPTS.items()}


def demo_prompts(processor: Processor) -> Mapping[str, Sequence[list[int]]]:
    """Token ids of held-out questions that the bundled model can answer, the same every time."""

    def asked(name: str, count: int) -> Iterator[list[int]]:
        rng = random.Random(name)
        for _ in range(count):
            example = tasks.draw(tasks.TASKS[name], rng, held_out=True)
            prompt = question(example)
            if not isinstance(prompt, str):
                prompt = processor.apply_chat_template(prompt, enable_thinking=example.thinking)
            yield processor.encode(prompt)

    return {kind: list(asked(*task)) for kind, task in _DEMO_TASKS.items()}


def written(model: Model, processor: Processor, prompt: list[int], tokens: int) -> Text:
    """A prompt with what greedy decoding writes after it: `tokens` tokens, or up to the end of the answer."""
    cache, ids = model.make_cache(), list(prompt)
    entering = mx.array([prompt])
    while len(ids) < len(prompt) + tokens:
        token = mx.argmax(model.logits(model.hidden_states(entering, cache)[:, -1:]), axis=-1)
        ids.append(int(np.array(token).item()))
        if ids[-1] in processor.end_token_ids:
            break
        entering = token
    return Text(ids, len(prompt))


def chains(model: Model, text: Text, depth: int = DEPTH) -> list[int]:
    """How many drafts in a row are right, up to `depth`, of chains from every place where decoding could start one.

    The first starts at the prompt's last token, beside the first one that was written.
    """
    ids = text.ids
    tokens, memory = mx.array([ids]), model.mtp_memory()
    hidden, first = model.hidden_states(tokens[:, :-1]), len(ids) - 2 - text.drafted
    if first > 0:
        memory = model.mtp_step(hidden[:, :first], tokens[:, 1 : first + 1], memory).memory
    found = []
    for start in range(first, len(ids) - 2):
        ahead, right = ids[start + 2 : start + 2 + depth], 0
        draft = model.mtp_step(hidden[:, start : start + 1], tokens[:, start + 1 : start + 2], memory)
        memory = draft.memory
        while (guess := mx.argmax(draft.logits, axis=-1)).item() == ahead[right]:
            right += 1
            if right == len(ahead):
                break
            draft = model.mtp_step(draft.normed, guess, draft.memory, chained=True)
        found.append(right)
    return found


def shares(runs: Sequence[Sequence[int]], depth: int = DEPTH) -> list[float]:
    """The share of chains that are right up to each depth, of those that reach it before their text ends."""
    found = []
    for step in range(depth):
        counted = [right > step for run in runs for right in run[: len(run) - step]]
        found.append(sum(counted) / len(counted) if counted else 0.0)
    return found


def passes(run: Sequence[int]) -> int:
    """How many forward passes write what `chains` followed: each its right drafts and one token more."""
    place = count = 0
    while place < len(run):
        place, count = place + run[place] + 1, count + 1
    return count


def _likelihood_table(found: Likelihoods, model: Model, known: str) -> Table:
    note = (
        f"Mean log-likelihood of {found.tokens:,} tokens that the model wrote, by the states that the MTP layer reads. "
        f"In use: {model.mtp_reads}, {known}."
    )
    rows = [
        ("normed: behind the final norm", f"{found.normed:.4f}"),
        ("residual: before it", f"{found.residual:.4f}"),
    ]
    return Table("What the MTP layer reads", note, ("states", "nats a token"), rows)


def _acceptance_table(model: Model, texts: Mapping[str, Sequence[Text]]) -> Table:
    rows = []
    for kind, group in texts.items():
        runs = [chains(model, text) for text in group if text.drafted]
        tokens = sum(map(len, runs))
        by_depth = [f"{share:.3f}" for share in shares(runs)]
        rows.append((kind, f"{tokens:,}", *by_depth, f"{sum(map(passes, runs)) / tokens:.3f}" if tokens else ""))
    note = (
        f"How often the first 1 to {DEPTH} drafts are all what greedy decoding writes, and how many passes "
        f"of the model a token takes with {DEPTH} drafts each."
    )
    return Table("Drafts accepted by depth", note, ("", "tokens", *map(str, range(1, DEPTH + 1)), "passes"), rows)
