"""Scenes: objects in the cells of a grid, and questions about what is where."""

import random
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from mlx_qwen.demo.tasks.words import COLOURS, SHAPES

# Three rows or columns at most, of which one side has three: at any drawn size the processor keeps their proportions.
GRIDS = ((2, 3), (3, 2), (3, 3))
_ROWS = {2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
_COLUMNS = {2: ("left", "right"), 3: ("left", "middle", "right")}
CENTRE = "center"


class Thing(NamedTuple):
    """What a cell shows."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture: things by cell (row, column), how they are placed within it, and the background.

    `seed` settles what no question asks for: the objects' sizes and places within their cells, and the background.
    """

    rows: int
    columns: int
    things: dict[tuple[int, int], Thing]
    seed: int

    @property
    def content(self) -> str:
        """Everything that questions can ask about."""
        return f"{self.rows}x{self.columns} " + self.listed()

    def listed(self) -> str:
        """All things with their places, in reading order."""
        lines = [f"{self.place(cell)}: {self.things[cell]}" for cell in sorted(self.things)]
        return "\n".join(lines) or "nothing"

    def scanned(self, counted: Collection[tuple[int, int]] = ()) -> str:
        """Every cell in reading order, empty ones too; those that are `counted` with their number."""
        lines = []
        for cell in self.cells():
            number = f", {sum(other <= cell for other in counted)}" if cell in counted else ""
            lines.append(f"{self.place(cell)}: {self.things.get(cell, 'nothing')}{number}")
        return "\n".join(lines)

    def place(self, cell: tuple[int, int]) -> str:
        """The words for a cell."""
        if self.rows == self.columns == 3 and cell == (1, 1):
            return CENTRE
        return f"{_ROWS[self.rows][cell[0]]} {_COLUMNS[self.columns][cell[1]]}"

    def cells(self) -> list[tuple[int, int]]:
        """Every cell, in reading order."""
        return [(row, column) for row in range(self.rows) for column in range(self.columns)]

    def matching(self, colour: str | None, shape: str | None) -> list[tuple[int, int]]:
        """Cells whose thing has this colour and shape, where they are given."""
        return [
            cell
            for cell, thing in sorted(self.things.items())
            if colour in (None, thing.colour) and shape in (None, thing.shape)
        ]


def random_scene(rng: random.Random, grid: tuple[int, int] | None = None) -> Scene:
    """A scene with from one to all of its cells filled, often from few colours and shapes, so that kinds repeat."""
    rows, columns = grid or rng.choice(GRIDS)
    colours = rng.sample(COLOURS, rng.randint(2, len(COLOURS)))
    shapes = rng.sample(SHAPES, rng.randint(2, len(SHAPES)))
    cells = [(row, column) for row in range(rows) for column in range(columns)]
    filled = rng.sample(cells, rng.randint(1, len(cells)))
    things = {cell: Thing(rng.choice(colours), rng.choice(shapes)) for cell in filled}
    return Scene(rows, columns, things, rng.getrandbits(30))


class Question(NamedTuple):
    """A question about a picture, its answer, and how the answer is found."""

    text: str
    answer: str
    reasoning: str = ""


def random_question(rng: random.Random, scene: Scene) -> Question:
    """One of the kinds of questions, chosen among those that this scene can answer."""
    kinds = [list_all, count, count, _what_at, _what_at, _is_there]
    if scene.things:
        kinds += [_where, _where, _colour]
    return rng.choice(kinds)(rng, scene)


def list_all(rng: random.Random, scene: Scene) -> Question:
    """What the whole picture shows."""
    wording = ("What do you see?", "List everything.", "Describe the picture.", "What is in the picture?")
    return Question(rng.choice(wording), scene.listed(), scene.scanned())


def count(rng: random.Random, scene: Scene) -> Question:
    """How many things there are, of a colour, a shape or both."""
    colour, shape = _kind(rng, scene)
    found = scene.matching(colour, shape)
    wording = ("How many {} are there?", "How many {} do you see?", "Count the {}.")
    name = _plural(colour, shape)
    return Question(rng.choice(wording).format(name), str(len(found)), scene.scanned(found))


def _what_at(rng: random.Random, scene: Scene) -> Question:
    cell = rng.choice(scene.cells())
    thing = scene.things.get(cell)
    wording = ("What is at the {}?", "What is in the {}?", "What do you see at the {}?")
    return Question(rng.choice(wording).format(scene.place(cell)), str(thing or "nothing"), scene.scanned())


def _is_there(rng: random.Random, scene: Scene) -> Question:
    thing = Thing(rng.choice(COLOURS), rng.choice(SHAPES))
    if scene.things and rng.random() < 0.5:
        thing = rng.choice(sorted(scene.things.values()))
    found = bool(scene.matching(*thing))
    wording = ("Is there a {}?", "Do you see a {}?")
    return Question(rng.choice(wording).format(thing), "yes" if found else "no", scene.scanned())


def _where(rng: random.Random, scene: Scene) -> Question:
    """Of a thing that is there, mostly of one without its like; of several like it, every place."""
    single = [thing for thing in sorted(scene.things.values()) if len(scene.matching(*thing)) == 1]
    thing = rng.choice(single if single and rng.random() < 0.8 else sorted(scene.things.values()))
    places = ", ".join(scene.place(cell) for cell in scene.matching(*thing))
    wording = ("Where is the {}?", "Where do you see a {}?", "Find the {}.")
    return Question(rng.choice(wording).format(thing), places, scene.scanned())


def _colour(rng: random.Random, scene: Scene) -> Question:
    """Of the only thing of its shape, or of what is at a place."""
    single = [cells[0] for shape in SHAPES if len(cells := scene.matching(None, shape)) == 1]
    cell = rng.choice(single or sorted(scene.things))
    name = f"the {scene.things[cell].shape}" if single else f"the thing at the {scene.place(cell)}"
    wording = ("What colour is {}?", "Which colour has {}?")
    return Question(rng.choice(wording).format(name), scene.things[cell].colour, scene.scanned())


def _kind(rng: random.Random, scene: Scene) -> tuple[str | None, str | None]:
    """A colour, a shape, both or neither, more often of something that is there."""
    thing = Thing(rng.choice(COLOURS), rng.choice(SHAPES))
    if scene.things and rng.random() < 0.7:
        thing = rng.choice(sorted(scene.things.values()))
    return rng.choice(((thing.colour, None), (None, thing.shape), (thing.colour, thing.shape), (None, None)))


def _plural(colour: str | None, shape: str | None) -> str:
    name = "things" if shape is None else "crosses" if shape == "cross" else f"{shape}s"
    return name if colour is None else f"{colour} {name}"
