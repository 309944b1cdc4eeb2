"""Keywords that are declared once are checked, shown and explained everywhere from that one place."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from mlx_qwen.declared import check_keywords, check_values, chosen, documented, option, takes
from mlx_qwen.errors import ConversionError, PromptError
from mlx_qwen.value_types import expected_type, fits


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where it goes.

    Attributes:
        {options}
    """

    folder: Path | None = option(None, help="the folder that is written.")

    def __post_init__(self) -> None:
        check_values(self)


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Choices(Place):
    """What a call may choose.

    Attributes:
        {options}
    """

    count: int = option(3, help="how many there are.", least=1, flag=("-n", "--count"))
    share: float | None = option(None, help="how much of it.", above=0, most=1, flag="--part")
    bits: int | None = option(None, help="bits of each.", choices=(4, 8))
    words: str | Sequence[str] | None = option(
        None, help="what is said.", expected="a word or a list of words", check=lambda words: "" not in words
    )


@takes(Choices)
def call(thing: str, *, loud: bool = False, **keywords: object) -> Choices:
    """Calls.

    Args:
        thing: what is called.
        {options}

    Raises:
        PromptError: something.
    """
    check_keywords(keywords, Choices)
    return chosen(Choices, keywords)


@pytest.mark.parametrize(
    ("annotation", "right", "wrong"),
    [
        (int, [1, np.int64(2)], [True, 1.0, "1", None, np.float32(1)]),
        (float, [1, 0.5, np.float32(0.5)], [True, math.nan, math.inf, "1", None]),
        (bool, [True, False], [0, 1, None, "True"]),
        (str, [""], [b"", None, ["a"], Path("a")]),
        (str | Path, ["a", Path("a")], [b"a", None]),
        (int | None, [None, 1], [False, ""]),
        (Literal["a", 4], ["a", 4], ["b", 4.0, None]),
        (Sequence[int], [[], (1, 2)], [1, [1.5], [True], "12", None, {1}]),
        (Sequence[str] | str, ["ab", ["a", "b"]], [["a", 1], b"ab"]),
        (Mapping[str, int], [{}, {"a": 1}], [{"a": "1"}, {1: 1}, [("a", 1)]]),
        (Callable[[int], int], [abs, print], [1, None, "abs"]),
        (Sequence[Callable[[int], int]], [[abs]], [abs, [1]]),
        (Place, [Place()], [None, Path()]),
        (object, [None, 1, ""], []),
        (Sequence["Unloaded"], [[3.5]], ["a", 1]),  # type: ignore[name-defined]  # noqa: F821
    ],
    ids=str,
)
def test_a_value_has_the_annotated_type_or_not(annotation: object, right: list[object], wrong: list[object]) -> None:
    assert [value for value in right if not fits(value, annotation)] == []
    assert [value for value in wrong if fits(value, annotation)] == []


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int | None, "a whole number"),
        (str | Sequence[str] | None, "a text or a list of texts"),
        (Sequence[Callable[[int], int]], "a list of functions"),
        (Mapping[str, int], "a dictionary"),
        (Literal["a", "b"], "'a' or 'b'"),
        (str | Path, "a text or a path"),
        (Sequence[np.ndarray], "a list of objects of type ndarray"),
        (np.ndarray | bool, "an object of type ndarray or True or False"),
    ],
)
def test_a_type_is_named_in_words(annotation: object, words: str) -> None:
    assert expected_type(annotation) == words


@pytest.mark.parametrize(
    ("keywords", "complaint"),
    [
        ({"count": "5"}, "count is '5'; expected a whole number, at least 1. Leave it out for 3."),
        ({"count": None}, "count is None; expected a whole number, at least 1. Leave it out for 3."),
        ({"count": 0}, "count is 0; expected at least 1. Leave it out for 3."),
        ({"count": True}, "count is True; expected a whole number, at least 1. Leave it out for 3."),
        ({"share": 0}, "share is 0; expected above 0 and at most 1, or None."),
        ({"share": math.nan}, "share is nan; expected a number, above 0 and at most 1, or None."),
        ({"bits": 3}, "bits is 3; expected 4 or 8, or None."),
        ({"words": ["a", ""]}, "words is ['a', '']; expected a word or a list of words, or None."),
        ({"words": object()}, "words is an object of type object; expected a word or a list of words, or None."),
        ({"folder": "here"}, "folder is 'here'; expected a path, or None."),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_value_that_cannot_be_used_is_one_sentence_with_its_name(keywords: dict[str, object], complaint: str) -> None:
    with pytest.raises(PromptError) as error:
        call("x", **keywords)
    assert str(error.value) == complaint


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("cuont", "did you mean count?"),
        ("Count", "did you mean count?"),
        ("part", "did you mean share?"),
        ("wor", "did you mean words?"),
        ("xyz", "expected some of count, share, bits, words, folder."),
    ],
)
def test_an_unknown_keyword_gets_the_one_that_was_meant(name: str, meant: str) -> None:
    with pytest.raises(ConversionError) as error:
        check_keywords({"count": 1, name: 2}, Choices, error=ConversionError)
    assert str(error.value) == f"There is no option {name!r}; {meant}"


def test_a_function_shows_every_keyword_with_type_and_default() -> None:
    signature = inspect.signature(call)
    assert list(signature.parameters) == ["thing", "loud", "count", "share", "bits", "words", "folder"]
    count = signature.parameters["count"]
    assert (count.kind, count.default, count.annotation) == (inspect.Parameter.KEYWORD_ONLY, 3, int)
    assert signature.return_annotation is Choices


def test_docstrings_explain_every_keyword_where_the_placeholder_stood() -> None:
    lines = (inspect.getdoc(call) or "").splitlines()
    assert lines[2:9] == [
        "Args:",
        "    thing: what is called.",
        "    count: how many there are.",
        "    share: how much of it.",
        "    bits: bits of each.",
        "    words: what is said.",
        "    folder: the folder that is written.",
    ]
    assert lines[9:] == ["", "Raises:", "    PromptError: something."]
    assert "    folder: the folder that is written." in (inspect.getdoc(Choices) or "").splitlines()


def test_each_class_takes_its_own_of_the_keywords() -> None:
    assert chosen(Place, {"count": 5, "folder": Path("a")}) == Place(folder=Path("a"))
