"""Plain text to go on with: counting, names in order, and tales whose end the beginning decides."""

import random

from mlx_qwen.demo.tasks.example import Example
from mlx_qwen.demo.tasks.words import ANIMALS, CITIES, COLOURS, NAMES, THINGS, words

_WEEKDAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
_MONTHS = words("January February March April May June July August September October November December")
_LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
_NUMBERS = words(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_PLACES = words("house garden wood tower river school shop boat")
_ACTS = (
    "looked under the bed",
    "looked behind the door",
    "asked the old man",
    "went up the hill",
    "ran to the river",
    "sat down and cried",
    "sang a song",
)
# A tale's last words repeat what stands at its beginning.
_TALES = (
    "Once there was a {animal} named {name}. {name} had {number} {colour} {thing}. One day {name} went to the {place}. "
    "There the {thing} were lost! {acts} At last {name} found them in the {place}.|| So the {animal} was glad and "
    "counted the {number} {colour} {thing}.",
    "{name} lived in {city} with a {colour} {animal}. Every day they walked to the {place}. {acts} In the evening "
    "{name} and the {animal} went home to {city}.|| Good night, {name}! Good night, {colour} {animal}!",
    '{other} met {name} in the {place}. "I have {number} {thing}," said {name}. "I have a {animal}," said {other}. '
    "{acts} Then {name} gave the {number} {thing} to {other},|| and {other} gave the {animal} to {name}.",
)


def counting(rng: random.Random) -> Example:
    """Numbers by a fixed step, upwards or downwards."""
    step = rng.choice((1, 1, 1, 2, 3, 5, 10))
    start = rng.randrange(200)
    numbers = [start + step * i for i in range(12)]
    if rng.random() < 0.35:
        numbers.reverse()
    return _sequence(rng, tuple(map(str, numbers)), f"{numbers[0]} to {numbers[-1]}", shown=4)


def order(rng: random.Random) -> Example:
    """Weekdays, months, letters or number words in their order, from anywhere on."""
    known = rng.choice((_WEEKDAYS, _MONTHS, _LETTERS, _NUMBERS))
    start = rng.randrange(len(known))
    length = rng.randint(6, 12)
    if known in (_LETTERS, _NUMBERS):
        chosen = known[start : start + length]
        if len(chosen) < 5:
            chosen = known[-length:]
    else:
        chosen = tuple(known[(start + i) % len(known)] for i in range(length))
    return _sequence(rng, chosen, " ".join(chosen), shown=3)


def tale(rng: random.Random) -> Example:
    """A tale of a few sentences."""
    name, other = rng.sample(NAMES, 2)
    acts = " ".join(f"{name} {act}." for act in rng.sample(_ACTS, rng.randint(1, 4)))
    beginning, end = (
        rng.choice(_TALES)
        .format(
            name=name,
            other=other,
            acts=acts,
            animal=rng.choice(ANIMALS),
            colour=rng.choice(COLOURS),
            thing=rng.choice(THINGS),
            place=rng.choice(_PLACES),
            city=rng.choice(CITIES),
            number=rng.choice(_NUMBERS[1:12]),
        )
        .split("||")
    )
    return Example(beginning, text=beginning + end, cut=len(beginning))


def _sequence(rng: random.Random, chosen: tuple[str, ...], content: str, *, shown: int) -> Example:
    """Three more words are sure to follow those shown; where the text ends is not."""
    between = rng.choice((", ", " "))
    cut, end = (len(between.join(chosen[:words])) for words in (shown, shown + 3))
    return Example(content, text=between.join(chosen), cut=cut, end=end)
