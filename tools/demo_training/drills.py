"""Many small answers about pictures in one turn: what single questions ask for, practised a dozen times as densely.

Looking a thing up by what it is, or counting a kind, is learnt late from conversations, where a picture and a question
cost fifty tokens and yield one answer. They are for training alone; nobody is measured by them.
"""

import random
from collections.abc import Callable, Sequence

from mlx_qwen.demo.tasks.example import Example, Message, asked
from mlx_qwen.demo.tasks.pictures import IMAGE
from mlx_qwen.demo.tasks.scenes import Scene, Thing, count, random_scene
from mlx_qwen.demo.tasks.words import COLOURS, SHAPES

_ORDINALS = ("first", "second", "third")
Grids = Sequence[tuple[int, int]]


def drilled(rng: random.Random, grids: Grids) -> Example:
    """One picture, or several, for each of `grids`, and two turns of lines that each answer a small question."""
    scenes = tuple(random_scene(rng, grid) for grid in grids)
    chosen = rng.randrange(len(scenes))
    drills: list[Callable[[random.Random, Scene], tuple[str, str]]] = [_places, _counts, _presence]
    rng.shuffle(drills)
    named = f" in the {_ORDINALS[chosen]} picture" if len(scenes) > 1 else ""
    turns = [(f"{task}{named}.", lines) for task, lines in (drill(rng, scenes[chosen]) for drill in drills[:2])]
    if len(scenes) > 1:
        turns[0] = _which(rng, scenes)
    messages: list[Message] = [message for turn in turns for message in asked(*turn)]
    messages[0] = {**messages[0], "content": [*[IMAGE] * len(scenes), {"type": "text", "text": turns[0][0]}]}
    return Example(" | ".join(scene.content for scene in scenes), tuple(messages), pictures=scenes)


def counted(rng: random.Random, grid: tuple[int, int]) -> Example:
    """One picture and one reasoned count, as every cell of it asks whether a thing is of the kind."""
    scene = random_scene(rng, grid)
    question, reply = asked(*count(rng, scene))
    parts = [IMAGE, {"type": "text", "text": question["content"]}]
    return Example(scene.content, ({**question, "content": parts}, reply), thinking=True, pictures=(scene,))


def _places(rng: random.Random, scene: Scene) -> tuple[str, str]:
    things = sorted(set(scene.things.values()))
    rng.shuffle(things)
    lines = (f"{thing}: {', '.join(scene.place(cell) for cell in scene.matching(*thing))}" for thing in things)
    return "Find everything", "\n".join(lines) or "nothing"


def _counts(rng: random.Random, scene: Scene) -> tuple[str, str]:
    counts = {colour: len(scene.matching(colour, None)) for colour in COLOURS}
    counts |= {shape: len(scene.matching(None, shape)) for shape in SHAPES}
    return "Count every kind", "\n".join(f"{kind}: {counts[kind]}" for kind in rng.sample(sorted(counts), 6))


def _presence(rng: random.Random, scene: Scene) -> tuple[str, str]:
    there = sorted(set(scene.things.values()))
    things = rng.sample(there, min(len(there), 4))
    things += [Thing(rng.choice(COLOURS), rng.choice(SHAPES)) for _ in range(7 - len(things))]
    rng.shuffle(things)
    return "Say what is there", "\n".join(f"{thing}: {'yes' if scene.matching(*thing) else 'no'}" for thing in things)


def _which(rng: random.Random, scenes: Sequence[Scene]) -> tuple[str, str]:
    things = sorted({thing for scene in scenes for thing in scene.things.values()})
    rng.shuffle(things)
    where = {thing: [i for i, scene in enumerate(scenes) if scene.matching(*thing)] for thing in things}
    lines = [f"{thing}: the {_ORDINALS[found[0]]} picture" for thing, found in where.items() if len(found) == 1]
    return "Say which picture shows what.", "\n".join(lines[:8]) or "nothing"
