"""Held-out questions, and how many of them a model answers right.

An answer is right when every token of it is the likeliest one, its reasoning and its end included: then greedy decoding
writes it. One pass over question and answer decides that, without writing anything.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np

from mlx_qwen.demo.tasks import Draw, Example, arithmetic, clips, continuation, draw, pictures, recall, toolbox
from tools.demo_training.batches import encoded
from tools.demo_training.pixels import clip_pixels, patches, scene_patches
from tools.demo_training.tokenizer import demo_tokenizer

# As users see them: drawn at four times the model's size.
SCALE = 4
TOKENS_AT_ONCE = 4096

MEASURED: dict[str, Draw] = {
    "arithmetic, reasoned": arithmetic.reasoned,
    "arithmetic, direct, 2 digits": arithmetic.direct,
    "recall, 4 to 30 facts": recall.one_question,
    "picture, reasoned": partial(pictures.one, thinking=True),
    "picture, direct": partial(pictures.one, thinking=False),
    "several pictures": pictures.several,
    "frame sequence": clips.happening,
    "tool call": toolbox.call,
    "tool response": toolbox.answered,
    "counting": continuation.counting,
    "tale": continuation.tale,
}


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its right answer as token ids int64 [n]; `graded` bool [n] marks the answer."""

    example: Example
    ids: np.ndarray
    graded: np.ndarray


@dataclass(frozen=True, slots=True)
class Batch:
    """Questions side by side.

    ids: int64 [B, T], padded on the right; graded: bool [B, T]; pixels and grids of pictures, float32 [N, 1536] and
    int64 [n, 3], and of clips.
    """

    ids: np.ndarray
    graded: np.ndarray
    pixels: np.ndarray
    grids: np.ndarray
    clip_pixels: np.ndarray
    clip_grids: np.ndarray


# Logits of the token after each, float32 [B, T, V].
Engine: TypeAlias = Callable[[Batch], np.ndarray]


def held_out(task: str, count: int) -> list[Question]:
    """The first `count` held-out questions of a task in MEASURED, always the same."""
    rng = random.Random(f"measure {task}")
    return [_question(draw(MEASURED[task], rng, held_out=True)) for _ in range(count)]


def accuracy(engine: Engine, questions: Sequence[Question]) -> float:
    """The share of questions that are answered right."""
    return float(np.mean([right for batch in batches(questions) for right in answered(engine, batch)]))


def answered(engine: Engine, batch: Batch) -> list[bool]:
    """Whether each question of a batch is answered right."""
    expected, found = batch.ids[:, 1:], engine(batch)[:, :-1].argmax(-1)
    return [bool(right) for right in ((expected == found) | ~batch.graded[:, 1:]).all(1)]


def batches(questions: Sequence[Question]) -> Iterator[Batch]:
    """The questions in batches of similar length, shortest first."""
    waiting: list[Question] = []
    for question in sorted(questions, key=lambda question: len(question.ids)):
        if waiting and (len(waiting) + 1) * len(question.ids) > TOKENS_AT_ONCE:
            yield _batch(waiting)
            waiting = []
        waiting.append(question)
    if waiting:
        yield _batch(waiting)


def _question(example: Example) -> Question:
    known = encoded(example)
    graded = np.zeros(len(known.ids), bool)
    if example.messages:
        last_turn = np.flatnonzero(known.ids == demo_tokenizer().token_to_id("<|im_start|>"))[-1]
        graded[last_turn:] = known.learnt[last_turn:]
    else:
        first, end = (_tokens(example.text[:place]) for place in (example.cut, example.end))
        graded[first:end] = True
    return Question(example, known.ids, graded)


def _tokens(text: str) -> int:
    return len(demo_tokenizer().encode(text, add_special_tokens=False).ids)


def _batch(questions: Sequence[Question]) -> Batch:
    B, T = len(questions), max(len(question.ids) for question in questions)
    ids = np.full((B, T), demo_tokenizer().token_to_id("<|endoftext|>"), np.int64)
    graded = np.zeros((B, T), bool)
    for row, question in enumerate(questions):
        ids[row, : len(question.ids)] = question.ids
        graded[row, : len(question.ids)] = question.graded
    scenes = [scene for question in questions for scene in question.example.pictures]
    shown = [clip for question in questions for clip in question.example.clips]
    return Batch(
        ids,
        graded,
        _joined([scene_patches(scene, SCALE) for scene in scenes]),
        np.array([(1, 2 * scene.rows, 2 * scene.columns) for scene in scenes]).reshape(-1, 3),
        _joined([patches(clip_pixels(clip, SCALE)) for clip in shown]),
        np.array([(len(clip.scenes), 2 * clip.scenes[0].rows, 2 * clip.scenes[0].columns) for clip in shown]).reshape(
            -1, 3
        ),
    )


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
