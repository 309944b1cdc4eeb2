"""Conversations about one picture or several."""

import random

from mlx_qwen.demo.tasks.example import Example, Message, asked
from mlx_qwen.demo.tasks.scenes import GRIDS, Question, Scene, list_all, random_question, random_scene

IMAGE: dict[str, object] = {"type": "image"}
_ORDINALS = ("first", "second", "third")


def one(
    rng: random.Random, grid: tuple[int, int] | None = None, *, questions: int = 1, thinking: bool | None = None
) -> Example:
    """A picture and a few questions; the last is reasoned as `thinking` says, or half of the time."""
    scene = random_scene(rng, grid)
    if thinking is None:
        thinking = rng.random() < 0.5
    chosen = [random_question(rng, scene) for _ in range(questions)]
    if questions > 1 and not thinking:
        chosen[rng.randrange(questions)] = list_all(rng, scene)
    return Example(scene.content, _turns(chosen, 1, thinking=thinking), thinking, pictures=(scene,))


def several(rng: random.Random, grids: tuple[tuple[int, int], ...] | None = None, *, questions: int = 1) -> Example:
    """Two or three pictures, and questions that say which is meant or ask for it."""
    grids = grids or tuple(rng.choice(GRIDS) for _ in range(rng.randint(2, 3)))
    scenes = tuple(random_scene(rng, grid) for grid in grids)
    chosen = [_about_several(rng, scenes) for _ in range(questions)]
    content = " | ".join(scene.content for scene in scenes)
    return Example(content, _turns(chosen, len(scenes), thinking=False), pictures=scenes)


def _turns(questions: list[Question], pictures: int, *, thinking: bool) -> tuple[Message, ...]:
    turns: list[Message] = []
    for index, question in enumerate(questions):
        last = index == len(questions) - 1
        turns += asked(question.text, question.answer, question.reasoning if thinking and last else "")
    first = turns[0]
    turns[0] = {**first, "content": [*[IMAGE] * pictures, {"type": "text", "text": first["content"]}]}
    return tuple(turns)


def _about_several(rng: random.Random, scenes: tuple[Scene, ...]) -> Question:
    if rng.random() < 0.4:
        everything = {thing for scene in scenes for thing in scene.things.values()}
        found = {thing: [i for i, scene in enumerate(scenes) if scene.matching(*thing)] for thing in sorted(everything)}
        single = [thing for thing, where in found.items() if len(where) == 1]
        if single:
            thing = rng.choice(single)
            wording = ("Which picture has a {}?", "In which picture is there a {}?")
            return Question(rng.choice(wording).format(thing), f"the {_ORDINALS[found[thing][0]]} picture")
    index = rng.randrange(len(scenes))
    question = random_question(rng, scenes[index])
    places = ("In the {} picture: {}", "{1} (the {0} picture)", "Look at the {} picture. {}")
    return Question(rng.choice(places).format(_ORDINALS[index], question.text), question.answer)
