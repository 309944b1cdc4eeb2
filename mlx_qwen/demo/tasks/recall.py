"""Facts in a list or a note, and questions that only the right line answers."""

import random
from dataclasses import dataclass

from mlx_qwen.demo.tasks.example import Example, Message, asked
from mlx_qwen.demo.tasks.words import ANIMALS, CITIES, COLOURS, NAMES, THINGS


@dataclass(frozen=True, slots=True)
class _Form:
    """How facts are written, how one is asked for, and how its name is asked for."""

    line: str
    value_questions: tuple[str, ...]
    name_questions: tuple[str, ...]


_LIST = _Form(
    "{name}: {value}",
    ("What number has {name}?", "{name}?", "Which number belongs to {name}?", "Look up {name}."),
    ("Who has {value}?", "Whose number is {value}?", "Find {value}."),
)
_THINGS = _Form(
    "{name} has {value} {thing}.",
    ("How many {thing} has {name}?", "What number of {thing} has {name}?"),
    ("Who has {value} {thing}?",),
)
_HOMES = _Form(
    "{name} lives in {value}.",
    ("Where does {name} live?", "In which city is the home of {name}?"),
    ("Who lives in {value}?",),
)
_DISTRACTORS = (
    "The {animal} of {name} is {colour}.",
    "{name} likes the {colour} {animal}.",
    "It is a {colour} day.",
    "{name} was here.",
    "A {animal} sleeps.",
)


def short(rng: random.Random) -> Example:
    """Two to eight facts and several questions about them."""
    return _facts(rng, rng.randint(2, 8), questions=rng.randint(3, 5))


def long(rng: random.Random) -> Example:
    """Nine to thirty facts, some among distractors, and several questions about them."""
    return _facts(rng, rng.randint(9, 30), questions=rng.randint(4, 6))


def one_question(rng: random.Random) -> Example:
    """Four to thirty facts and a single question."""
    return _facts(rng, rng.randint(4, 30), questions=1)


def repeat(rng: random.Random) -> Example:
    """Words and numbers in no order, to be said again."""
    words = [
        rng.choice((rng.choice(NAMES), rng.choice(THINGS), str(rng.randrange(1000)))) for _ in range(rng.randint(4, 24))
    ]
    line = " ".join(words)
    phrasing = rng.choice(("Repeat: {}", "Say this again: {}", "Copy this line:\n{}"))
    return Example(line, asked(phrasing.format(line), line))


def looked_up(rng: random.Random) -> Example:
    """Two to thirty facts, and questions for several names at once by their values."""
    note = _note(rng, rng.choice((rng.randint(2, 8), rng.randint(2, 30))))
    turns: list[Message] = []
    for _ in range(rng.randint(2, 4)):
        facts = rng.sample(note.facts, rng.randint(1, min(6, len(note.facts))))
        values = ", ".join(value for _, value in facts)
        question = rng.choice(note.form.name_questions).format(value=values, thing=note.thing)
        turns += asked(question if turns else _opened(rng, note.text, question), ", ".join(name for name, _ in facts))
    return Example(note.text, tuple(turns))


@dataclass(frozen=True, slots=True)
class _Note:
    """Names with their values, and the text that tells of them."""

    form: _Form
    thing: str
    facts: list[tuple[str, str]]
    text: str


def _facts(rng: random.Random, count: int, *, questions: int) -> Example:
    note = _note(rng, count)
    turns: list[Message] = []
    for name, value in rng.sample(note.facts, min(questions, len(note.facts))):
        by_name = rng.random() < 0.75
        wording = rng.choice(note.form.value_questions if by_name else note.form.name_questions)
        question = wording.format(name=name, value=value, thing=note.thing)
        turns += asked(question if turns else _opened(rng, note.text, question), value if by_name else name)
    return Example(note.text, tuple(turns))


def _note(rng: random.Random, count: int) -> _Note:
    form = rng.choice((_LIST, _LIST, _THINGS, _HOMES))
    names = rng.sample(NAMES, count)
    if form is _HOMES:
        names = names[: len(CITIES)]
        values = rng.sample(CITIES, len(names))
    else:
        values = [str(value) for value in rng.sample(range(1, 1000 if rng.random() < 0.5 else 100), count)]
    thing = rng.choice(THINGS)
    facts = list(zip(names, values, strict=True))
    lines = [form.line.format(name=name, value=value, thing=thing) for name, value in facts]
    with_distractors = form is not _LIST and len(lines) <= 12 and rng.random() < 0.6
    shown = _among_distractors(rng, lines) if with_distractors else lines
    text = ("\n" if form is _LIST or rng.random() < 0.5 else " ").join(shown)
    return _Note(form, thing, facts, text)


def _opened(rng: random.Random, note: str, question: str) -> str:
    return rng.choice((f"{note}\n\n{question}", f"{note}\n\n{question}", f"Here is a note.\n{note}\n\n{question}"))


def _among_distractors(rng: random.Random, lines: list[str]) -> list[str]:
    extra = [
        rng.choice(_DISTRACTORS).format(name=rng.choice(NAMES), animal=rng.choice(ANIMALS), colour=rng.choice(COLOURS))
        for _ in lines
    ]
    mixed = [*lines, *extra]
    rng.shuffle(mixed)
    return mixed
