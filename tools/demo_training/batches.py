"""Training batches: rows of token ids with labels, positions and patches, of one shape for each kind.

A batch depends on its kind, seed and index alone, so that training can stop and go on anywhere.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from mlx_qwen.demo.tasks import TASKS, Draw, Example, clips, draw, pictures, recall
from mlx_qwen.demo.tasks.example import Clip
from mlx_qwen.demo.tasks.scenes import GRIDS
from tools.demo_training import drills
from tools.demo_training.pixels import clip_pixels, patches, scene_patches
from tools.demo_training.rendering import MEDIA, render
from tools.demo_training.tokenizer import demo_tokenizer, token_id

IGNORED = -100
# A batch can be taken in four parts of one shape, every fourth row each: their pictures have the same sizes.
PARTS = 4
# Most pictures reach the model at four times its size, as the demo draws them.
_SCALES = (1, 2, 2, 4)
_TEXTS = TASKS | {"recall_names": recall.looked_up}


@dataclass(frozen=True, slots=True)
class Kind:
    """Rows and tokens of a batch, and what fills it: `texts`, tasks packed one after the other with their shares, or
    `media`, which draws the one example of each row with pictures of the same size every time.
    """

    rows: int
    tokens: int
    texts: tuple[tuple[str, int], ...] = ()
    media: Callable[[random.Random, int], Example] | None = None


def _picture(rng: random.Random, row: int) -> Example:
    return pictures.one(rng, GRIDS[row // PARTS % 3], questions=rng.randint(4, 7))


def _pictures(rng: random.Random, row: int) -> Example:
    first, step, third = row // PARTS % 3, row // PARTS // 3 % 2, row // PARTS // 6 % 2
    grids = tuple(GRIDS[(first + i * step) % 3] for i in range(2 + third))
    return pictures.several(rng, grids, questions=rng.randint(4, 6))


def _drill(rng: random.Random, row: int) -> Example:
    return drills.drilled(rng, [GRIDS[row // PARTS % 3]])


def _drills(rng: random.Random, row: int) -> Example:
    return drills.drilled(rng, [GRIDS[(row // PARTS + i * (row // PARTS // 3 % 2)) % 3] for i in range(2)])


def _clip(rng: random.Random, row: int) -> Example:
    return clips.happening(
        rng, GRIDS[row // PARTS % 3], clips.STEPS[row // PARTS // 3 % 3], questions=rng.randint(4, 6)
    )


def _counted(rng: random.Random, row: int) -> Example:
    return drills.counted(rng, GRIDS[row // PARTS % 3])


def _changing(rng: random.Random, row: int) -> Example:
    return clips.changing(rng, GRIDS[row // PARTS % 3], clips.STEPS[row // PARTS // 3 % 3])


KINDS = {
    "arithmetic": Kind(
        64,
        128,
        (
            ("arithmetic_reasoned", 5),
            ("arithmetic_direct", 3),
            ("arithmetic_several", 2),
            ("talk", 1),
        ),
    ),
    "recall_short": Kind(32, 256, (("recall_short", 5), ("repeat", 3), ("recall_one", 1), ("introduced", 1))),
    "recall_long": Kind(24, 352, (("recall_long", 4), ("recall_one", 2))),
    "recall_names": Kind(24, 352, (("recall_names", 1),)),
    "tools": Kind(20, 416, (("tool_call", 2), ("tool_answer", 3), ("tool_turns", 3))),
    "continuation": Kind(48, 176, (("counting", 2), ("order", 2), ("tale", 3))),
    "picture": Kind(48, 160, media=_picture),
    "pictures": Kind(48, 160, media=_pictures),
    "drill": Kind(48, 160, media=_drill),
    "drills": Kind(48, 160, media=_drills),
    "counted": Kind(64, 128, media=_counted),
    "clip": Kind(36, 224, media=_clip),
    "changing": Kind(48, 160, media=_changing),
}


def batch(kind: str, seed: int, index: int) -> dict[str, np.ndarray]:
    """The batch `index` of a kind in the run `seed`.

    Returns:
        input_ids: int64 [B, T], padded on the right.
        labels: int64 [B, T], the token at its own place where it is to be learnt, else -100.
        lengths: int64 [B], tokens before the padding.
        position_ids: int64 [3, B, T], time, height and width.
        pixel_values: float32 [patches, 1536] of all pictures and clips, of kinds that have them.
        grid_thw: int64 [pictures, 3], one row a picture and a temporal patch of a clip, as their placeholders stand.
    """
    rng = random.Random(f"{kind} {seed} {index}")
    shape = KINDS[kind]
    if shape.media is None:
        return _arrays(shape, _packed(rng, shape), [np.zeros((0, 3), np.int64)] * shape.rows)
    filled = [_that_fits(rng, shape, row) for row in range(shape.rows)]
    grids = [_grids(example) for example, _ in filled]
    arrays = _arrays(shape, [[piece] for _, piece in filled], grids)
    arrays["pixel_values"] = np.concatenate([_pixels(rng, example) for example, _ in filled])
    arrays["grid_thw"] = np.concatenate(grids)
    return arrays


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of an example, int64 [n], and where they are to be learnt, bool [n]."""

    ids: np.ndarray
    learnt: np.ndarray


def encoded(example: Example) -> Encoded:
    """An example as the model reads it, its placeholders repeated."""
    return _encoded([example])[0]


def _encoded(examples: list[Example]) -> list[Encoded]:
    texts = [_with_placeholders(example) for example in examples]
    encodings = demo_tokenizer().encode_batch_fast(texts, add_special_tokens=False)
    return [
        _marked(encoding.ids, plain=not example.messages) for encoding, example in zip(encodings, examples, strict=True)
    ]


def _with_placeholders(example: Example) -> str:
    """The rendered text, with as many placeholders as a picture has cells, and times between those of a clip."""
    text = render(example)
    if example.pictures:
        parts = text.split("<|image_pad|>")
        pads = ["<|image_pad|>" * (scene.rows * scene.columns) for scene in example.pictures]
        text = "".join(part + pad for part, pad in zip(parts, [*pads, ""], strict=True))
    for clip in example.clips:
        text = text.replace(MEDIA["video"], _clip_text(clip))
    return text


def _clip_text(clip: Clip) -> str:
    """The time of each step, the mean of its frames', and its placeholders."""
    pads = "<|video_pad|>" * (clip.scenes[0].rows * clip.scenes[0].columns)
    between = clips.FRAMES_A_STEP / 2 - 0.5
    times = [(clips.FRAMES_A_STEP * i + between) / clip.frames_per_second for i in range(len(clip.scenes))]
    return "".join(f"<{time:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for time in times)


@lru_cache(maxsize=1)
def _marks() -> dict[str, int]:
    names = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "assistant", "<|image_pad|>", "<|video_pad|>")
    return {name: token_id(name) for name in names}


def _marked(ids: list[int], *, plain: bool) -> Encoded:
    """Learnt is what the assistant says, up to the end of its turn, and all of a plain text."""
    array = np.array(ids, np.int64)
    if plain:
        return Encoded(array, np.ones(len(ids), bool))
    marks = _marks()
    start, end, think, unthink = (marks[name] for name in ("<|im_start|>", "<|im_end|>", "<think>", "</think>"))
    learnt = np.zeros(len(ids), bool)
    for place in np.flatnonzero(array == start):
        if ids[place + 1] != marks["assistant"]:
            continue
        first = place + 3
        if ids[first] == think:
            # An empty block and the opening of one stand in the prompt.
            first += 4 if ids[first + 2] == unthink else 2
        learnt[first : ids.index(end, first) + 1] = True
    return Encoded(array, learnt)


def _packed(rng: random.Random, shape: Kind) -> list[list[Encoded]]:
    """Rows of examples, each put where there is room first, until most of the batch is filled."""
    tasks: list[Draw] = [_TEXTS[name] for name, share in shape.texts for _ in range(share)]
    rows: list[list[Encoded]] = [[] for _ in range(shape.rows)]
    room = [shape.tokens] * shape.rows
    missed = 0
    while missed < shape.rows // 2:
        for piece in _encoded([draw(rng.choice(tasks), rng, held_out=False) for _ in range(shape.rows)]):
            row = next((row for row, left in enumerate(room) if left >= len(piece.ids)), None)
            if row is None:
                missed += 1
            else:
                rows[row].append(piece)
                room[row] -= len(piece.ids)
    return rows


def _that_fits(rng: random.Random, shape: Kind, row: int) -> tuple[Example, Encoded]:
    """The row's example with as many of its questions as there is room for, the first and the last among them."""
    assert shape.media is not None, "a kind without texts draws media"
    media = shape.media
    example = draw(lambda source: media(source, row), rng, held_out=False)
    while len((found := encoded(example)).ids) > shape.tokens:
        example = replace(example, messages=example.messages[:2] + example.messages[4:])
    return example, found


def _arrays(shape: Kind, rows: list[list[Encoded]], grids: list[np.ndarray]) -> dict[str, np.ndarray]:
    B, T = shape.rows, shape.tokens
    ids = np.full((B, T), token_id("<|endoftext|>"), np.int64)
    labels = np.full((B, T), IGNORED, np.int64)
    lengths = np.zeros(B, np.int64)
    positions = np.broadcast_to(np.arange(T), (3, B, T)).copy()
    for row, pieces in enumerate(rows):
        joined = np.concatenate([piece.ids for piece in pieces])
        learnt = np.concatenate([piece.learnt for piece in pieces])
        lengths[row] = n = len(joined)
        ids[row, :n] = joined
        labels[row, :n][learnt] = joined[learnt]
        if len(grids[row]):
            positions[:, row, :n] = rope_positions(joined, grids[row])
    return {"input_ids": ids, "labels": labels, "lengths": lengths, "position_ids": positions}


def rope_positions(ids: np.ndarray, grids: np.ndarray) -> np.ndarray:
    """M-RoPE positions int64 [3, n] of token ids whose placeholders stand for `grids` [pictures, 3], in patches."""
    marks = _marks()
    media = (ids == marks["<|image_pad|>"]) | (ids == marks["<|video_pad|>"])
    positions = np.empty((3, len(ids)), np.int64)
    place, position = 0, 0
    for first, (_, height, width) in zip(_first_placeholders(media, grids), grids, strict=True):
        rows, columns = height // 2, width // 2
        positions[:, place:first] = np.arange(position, position + first - place)
        position += first - place
        place = first + rows * columns
        positions[:, first:place] = np.indices((1, rows, columns)).reshape(3, -1) + position
        position += max(rows, columns)
    positions[:, place:] = np.arange(position, position + len(ids) - place)
    return positions


def _first_placeholders(media: np.ndarray, grids: np.ndarray) -> Iterator[int]:
    places = np.flatnonzero(media)
    return iter(places[np.concatenate([[0], np.cumsum(grids[:, 1] * grids[:, 2] // 4)[:-1]])])


def _grids(example: Example) -> np.ndarray:
    """One row of 1, height and width in patches for each picture and each temporal patch of a clip."""
    scenes = [*example.pictures, *(scene for clip in example.clips for scene in clip.scenes)]
    return np.array([(1, 2 * scene.rows, 2 * scene.columns) for scene in scenes], np.int64).reshape(-1, 3)


def _pixels(rng: random.Random, example: Example) -> np.ndarray:
    scale = rng.choice(_SCALES)
    still = [scene_patches(scene, scale) for scene in example.pictures]
    return np.concatenate([*still, *(patches(clip_pixels(clip, scale)) for clip in example.clips)])
