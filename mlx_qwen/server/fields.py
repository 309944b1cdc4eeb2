"""Reads a request's fields with their types; whatever is wrong is refused by its name."""

import math
from collections.abc import Sequence
from typing import NoReturn

from mlx_qwen.json_types import Json
from mlx_qwen.server.refusals import Body, Refusal
from mlx_qwen.value_types import shown


class Fields:
    """The fields of a JSON object; null counts as left out. `at` is where in the request it stands."""

    def __init__(self, body: Body, at: str = "") -> None:
        self.body = body
        self._at = at

    def path(self, name: str) -> str:
        """What errors call a field."""
        return f"{self._at}.{name}" if self._at else name

    def text(self, name: str) -> str | None:
        """A text."""
        value = self.body.get(name)
        return value if value is None or isinstance(value, str) else self._refuse(name, "a text")

    def whole(self, name: str, *, least: int | None = None, most: int | None = None) -> int | None:
        """A whole number within bounds."""
        value = self.body.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None:
            return None
        fits = isinstance(value, int) and not isinstance(value, bool)
        if not fits or not (least is None or value >= least) or not (most is None or value <= most):  # type: ignore[operator]
            self._refuse(name, f"a whole number{_bounds(least, most)}")
        assert isinstance(value, int), "refused otherwise"
        return value

    def number(self, name: str, *, least: float | None = None, most: float | None = None) -> float | None:
        """A number within bounds."""
        value = self.body.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self._refuse(name, f"a number{_bounds(least, most)}")
        assert isinstance(value, int | float), "refused otherwise"
        if (least is not None and value < least) or (most is not None and value > most):
            self._refuse(name, f"a number{_bounds(least, most)}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.body.get(name)
        if value is None:
            return default
        return value if isinstance(value, bool) else self._refuse(name, "true or false")

    def items(self, name: str) -> list[Json] | None:
        """A list."""
        value = self.body.get(name)
        return value if value is None or isinstance(value, list) else self._refuse(name, "a list")

    def objects(self, name: str) -> list[Body] | None:
        """A list of objects."""
        found = self.items(name)
        for index, one in enumerate(found or ()):
            if not isinstance(one, dict):
                self._refuse(f"{name}[{index}]", "an object", one)
        return found  # type: ignore[return-value]

    def inner(self, name: str) -> "Fields":
        """An object's own fields; none where it is left out."""
        value = self.body.get(name)
        if value is not None and not isinstance(value, dict):
            self._refuse(name, "an object")
        return Fields(value or {}, self.path(name))

    def one_of(self, name: str, choices: Sequence[str]) -> str | None:
        """One of some words."""
        value = self.text(name)
        return value if value is None or value in choices else self._refuse(name, f"one of {', '.join(choices)}")

    def texts(self, name: str, *, most: int) -> list[str] | None:
        """A text or a list of texts, none of them empty."""
        value = self.body.get(name)
        found = [value] if isinstance(value, str) else value
        if found is None:
            return None
        if not isinstance(found, list) or len(found) > most or not all(isinstance(one, str) and one for one in found):
            self._refuse(name, f"a text that is not empty, or a list of at most {most} such")
        return found  # type: ignore[return-value]

    def forbid(self, **reasons: str) -> None:
        """Refuses fields that are given, where ignoring them would lie."""
        for name, reason in reasons.items():
            if self.body.get(name) not in (None, False, [], {}, ""):
                raise Refusal(400, f"{self.path(name)} is not supported: {reason}", param=self.path(name))

    def _refuse(self, name: str, expected: str, value: Json = None) -> NoReturn:
        found = shown(self.body.get(name) if value is None else value)
        raise Refusal(400, f"{self.path(name)} is {found}; expected {expected}.", param=self.path(name))


def _bounds(least: float | None, most: float | None) -> str:
    if least is not None and most is not None:
        return f" from {least} to {most}"
    return f" of at least {least}" if least is not None else f" of at most {most}" if most is not None else ""
