"""Short frame sequences of a scene in which one thing happens, and questions about it."""

import random
from dataclasses import replace
from typing import NamedTuple

from mlx_qwen.demo.tasks.example import Clip, Example, Message, asked
from mlx_qwen.demo.tasks.scenes import Question, Scene, Thing, random_scene
from mlx_qwen.demo.tasks.words import COLOURS, SHAPES

VIDEO: dict[str, object] = {"type": "video"}
# Two frames become one step of the model's time.
FRAMES_A_STEP = 2
STEPS = (2, 3, 4)
_DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}


class _Event(NamedTuple):
    """The scenes while one thing happens, what happens in words, and questions about just that."""

    scenes: list[Scene]
    told: str
    questions: list[Question]


def happening(
    rng: random.Random, grid: tuple[int, int] | None = None, steps: int | None = None, *, questions: int = 1
) -> Example:
    """A sequence and questions about what happens in it."""
    start = _sparse(rng, random_scene(rng, grid))
    event = rng.choice((_move, _move, _appear, _vanish, _recolour))(rng, start, steps or rng.choice(STEPS))
    wording = ("What happens?", "Describe what happens.", "What happens in the video?")
    about = [*event.questions, Question(rng.choice(wording), event.told), _at_an_end(rng, event.scenes)]
    chosen = rng.sample(about, min(questions, len(about)))
    clip = Clip(tuple(event.scenes), rng.choice((1.0, 2.0, 2.0, 2.0, 4.0)))
    turns: list[Message] = [message for question in chosen for message in asked(question.text, question.answer)]
    turns[0] = {**turns[0], "content": [VIDEO, {"type": "text", "text": turns[0]["content"]}]}
    return Example(clip.content, tuple(turns), clips=(clip,))


def changing(rng: random.Random, grid: tuple[int, int] | None = None, steps: int | None = None) -> Example:
    """A sequence in which something happens at every step, and the question what."""
    scenes = [_sparse(rng, random_scene(rng, grid))]
    told = []
    for _ in range(1, steps or rng.choice(STEPS)):
        some, more = len(scenes[-1].things) > 1, len(scenes[-1].things) < len(SHAPES)
        event = rng.choice([_move, _recolour, _recolour, *[_vanish] * 2 * some, *[_appear] * more])
        happened = event(rng, scenes[-1], 2)
        scenes.append(happened.scenes[-1])
        told.append(happened.told)
    clip = Clip(tuple(scenes), rng.choice((1.0, 2.0, 2.0, 2.0, 4.0)))
    question, answer = asked("What happens at every step?", "\n".join(told))
    content = [VIDEO, {"type": "text", "text": question["content"]}]
    return Example(clip.content, ({**question, "content": content}, answer), clips=(clip,))


def _sparse(rng: random.Random, scene: Scene) -> Scene:
    """One to three things, no two of one shape, so that words tell them apart."""
    shapes = {scene.things[cell].shape: cell for cell in rng.sample(sorted(scene.things), len(scene.things))}
    kept = list(shapes.values())[:3]
    return replace(scene, things={cell: scene.things[cell] for cell in kept})


def _move(rng: random.Random, scene: Scene, steps: int) -> _Event:
    """A thing goes straight to an edge, one cell a step, from the first or the second step on."""
    paths = [
        (cell, way)
        for cell in sorted(scene.things)
        for way, step in _DIRECTIONS.items()
        if _free(scene, _after(cell, step))
    ]
    if not paths:
        return _vanish(rng, scene, steps)
    cell, way = rng.choice(paths)
    thing, scenes = scene.things[cell], [scene]
    for index in range(1, steps):
        ahead = _after(cell, _DIRECTIONS[way])
        if _free(scenes[-1], ahead) and (index > 1 or steps == 2 or rng.random() < 0.7):
            scenes.append(_with(_with(scenes[-1], cell, None), ahead, thing))
            cell = ahead
        else:
            scenes.append(scenes[-1])
    start = next(cell for cell in scene.things if scene.things[cell] == thing)
    questions = [
        Question("Which thing moves?", str(thing)),
        Question(rng.choice((f"Which way does the {thing} move?", "Which way does it move?")), way),
        Question(f"Where is the {thing} at the start?", scene.place(start)),
        Question(f"Where is the {thing} at the end?", scene.place(cell)),
    ]
    return _Event(scenes, f"the {thing} moves {way}", questions)


def _appear(rng: random.Random, scene: Scene, steps: int) -> _Event:
    empty = [cell for cell in scene.cells() if cell not in scene.things]
    new = [shape for shape in SHAPES if not scene.matching(None, shape)]
    if not empty:
        return _vanish(rng, scene, steps)
    cell, thing, step = rng.choice(empty), Thing(rng.choice(COLOURS), rng.choice(new)), rng.randrange(1, steps)
    scenes = [scene] * step + [_with(scene, cell, thing)] * (steps - step)
    questions = [
        Question("What appears?", str(thing)),
        Question(rng.choice((f"Where does the {thing} appear?", "Where does it appear?")), scene.place(cell)),
        Question("What colour is the new thing?", thing.colour),
    ]
    return _Event(scenes, f"a {thing} appears at the {scene.place(cell)}", questions)


def _vanish(rng: random.Random, scene: Scene, steps: int) -> _Event:
    cell, step = rng.choice(sorted(scene.things)), rng.randrange(1, steps)
    thing = scene.things[cell]
    scenes = [scene] * step + [_with(scene, cell, None)] * (steps - step)
    questions = [
        Question("What vanishes?", str(thing)),
        Question(f"Where was the {thing}?", scene.place(cell)),
    ]
    return _Event(scenes, f"the {thing} vanishes", questions)


def _recolour(rng: random.Random, scene: Scene, steps: int) -> _Event:
    cell, step = rng.choice(sorted(scene.things)), rng.randrange(1, steps)
    old = scene.things[cell]
    colour = rng.choice([colour for colour in COLOURS if colour != old.colour])
    scenes = [scene] * step + [_with(scene, cell, Thing(colour, old.shape))] * (steps - step)
    questions = [
        Question("Which thing changes its colour?", old.shape),
        Question(f"What colour is the {old.shape} at the start?", old.colour),
        Question(f"What colour is the {old.shape} at the end?", colour),
    ]
    return _Event(scenes, f"the {old} becomes {colour}", questions)


def _at_an_end(rng: random.Random, scenes: list[Scene]) -> Question:
    """What the first or the last frames show, in all or at a place."""
    scene, when = rng.choice(((scenes[0], "at the start"), (scenes[-1], "at the end")))
    if rng.random() < 0.5:
        return Question(f"What do you see {when}?", scene.listed())
    cell = rng.choice(sorted({*scenes[0].things, *scenes[-1].things}))
    return Question(f"What is at the {scene.place(cell)} {when}?", str(scene.things.get(cell, "nothing")))


def _after(cell: tuple[int, int], step: tuple[int, int]) -> tuple[int, int]:
    return cell[0] + step[0], cell[1] + step[1]


def _free(scene: Scene, cell: tuple[int, int]) -> bool:
    return cell in scene.cells() and cell not in scene.things


def _with(scene: Scene, cell: tuple[int, int], thing: Thing | None) -> Scene:
    """The scene with one cell changed."""
    things = {known: value for known, value in scene.things.items() if known != cell}
    return replace(scene, things=things if thing is None else {**things, cell: thing})
