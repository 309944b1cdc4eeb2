"""The demo's questions have right answers, and those kept for measuring are never trained on."""

import random
import re

import numpy as np
import pytest

from mlx_qwen.demo.tasks import TASKS, arithmetic, clips, draw, pictures, recall
from mlx_qwen.demo.tasks.drawing import CELL, draw_scene
from mlx_qwen.demo.tasks.scenes import Scene, Thing, random_scene

MEASURED = sorted(set(TASKS) - {"talk", "introduced"})
SHOWN = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "purple": (0.7, 0, 1)}


@pytest.mark.parametrize("task", MEASURED)
def test_held_out_questions_are_never_trained_on(task: str) -> None:
    rng = random.Random(1)
    trained = {draw(TASKS[task], rng, held_out=False).content for _ in range(300)}
    held_out = {draw(TASKS[task], rng, held_out=True).content for _ in range(30)}
    assert held_out
    assert not trained & held_out


@pytest.mark.parametrize("task", sorted(TASKS))
def test_an_example_depends_on_its_seed_alone(task: str) -> None:
    assert TASKS[task](random.Random("7")) == TASKS[task](random.Random("7"))


def test_a_swapped_sum_is_the_same_question() -> None:
    examples = [arithmetic.direct(random.Random(seed)) for seed in range(3000)]
    sides: dict[frozenset[str], set[bool]] = {}
    for example in examples:
        a, sign, b = re.findall(r"\d+|[+*-]", str(example.messages[0]["content"]).replace(" ", ""))
        if sign == "+":
            sides.setdefault(frozenset((a, b)), set()).add(example.held_out)
    assert all(len(found) == 1 for found in sides.values())


def test_every_step_of_worked_reasoning_is_a_true_equation() -> None:
    for seed in range(300):
        example = arithmetic.reasoned(random.Random(seed))
        lines = str(example.messages[1]["reasoning_content"]).split("\n")
        steps = [line.split(": ")[0].split("=") for line in lines if "=" in line]
        assert steps
        assert all(eval(left) == int(right) for left, right in steps)
        assert lines[-1].split(": ")[-1] == example.answer


def test_the_answer_of_a_calculation_is_its_value() -> None:
    for seed in range(300):
        example = arithmetic.direct(random.Random(seed))
        (expression,) = re.findall(r"\d+ ?[+*-] ?\d+", str(example.messages[0]["content"]))
        assert eval(expression) == int(example.answer)


def test_a_recalled_answer_stands_in_one_line_of_the_note() -> None:
    for seed in range(200):
        example = recall.one_question(random.Random(seed))
        assert str(example.messages[0]["content"]).count(example.answer) >= 1


def test_names_looked_up_together_have_the_values_of_the_question() -> None:
    for seed in range(100):
        example = recall.looked_up(random.Random(seed))
        for question, answer in zip(example.messages[::2], example.messages[1::2], strict=True):
            asked = str(question["content"]).removeprefix("Here is a note.").removeprefix(f"\n{example.content}\n\n")
            asked = asked.removeprefix(f"{example.content}\n\n")
            values = re.findall(r"\d+|(?<=in )[A-Z]\w+|(?<=, )[A-Z]\w+", asked)
            names = str(answer["content"]).split(", ")
            assert len(names) == len(values)
            for name, value in zip(names, values, strict=True):
                assert re.search(rf"\b{name}(: | has | lives in ){value}\b", example.content)


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_a_cell_is_drawn_in_the_colour_of_its_thing(scale: int) -> None:
    for seed in range(40):
        scene = random_scene(random.Random(seed))
        pixels = np.asarray(draw_scene(scene, scale)).astype(float)
        side = CELL * scale
        assert pixels.shape == (scene.rows * side, scene.columns * side, 3)
        for (row, column), thing in scene.things.items():
            cell = pixels[row * side : (row + 1) * side, column * side : (column + 1) * side].reshape(-1, 3)
            coloured = cell[np.ptp(cell, axis=1) > 60]
            assert len(coloured) > 0.1 * len(cell)
            mean = coloured.mean(0) / coloured.max()
            nearest = min(SHOWN, key=lambda name: np.square(mean - np.array(SHOWN[name])).sum())
            assert nearest == thing.colour


def test_counting_reasons_over_every_cell_and_ends_at_the_answer() -> None:
    scene = Scene(2, 3, {(0, 0): Thing("red", "circle"), (1, 2): Thing("red", "cross")}, seed=3)
    asked = [pictures.random_question(random.Random(seed), scene) for seed in range(200)]
    counted = [question for question in asked if question.text.startswith("How many red things")]
    assert counted
    assert counted[0].answer == "2"
    cells = ("top left: red circle, 1", "top middle: nothing", "top right: nothing")
    cells += ("bottom left: nothing", "bottom middle: nothing", "bottom right: red cross, 2")
    assert counted[0].reasoning == "\n".join(cells)


def test_one_thing_happens_in_a_clip() -> None:
    for seed in range(200):
        (clip,) = clips.happening(random.Random(seed)).clips
        changed = [before.things != after.things for before, after in zip(clip.scenes, clip.scenes[1:], strict=False)]
        assert any(changed)
        first, last = clip.scenes[0].things, clip.scenes[-1].things
        assert 1 <= len(set(first.items()) ^ set(last.items())) <= 2


def test_a_changing_clip_tells_what_happens_at_every_step() -> None:
    for seed in range(200):
        example = clips.changing(random.Random(seed))
        (clip,) = example.clips
        told = example.answer.split("\n")
        assert len(told) == len(clip.scenes) - 1
        for line, before, after in zip(told, clip.scenes, clip.scenes[1:], strict=False):
            changed = set(before.things.items()) ^ set(after.things.items())
            assert 1 <= len(changed) <= 2
            assert all(thing.colour in line for _, thing in changed)
            assert any(str(thing) in line for _, thing in changed)
