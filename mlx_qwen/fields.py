"""Typed access to one JSON object of a config, so that every complaint names the field and the place."""

import sys
from collections.abc import Mapping
from typing import Any

from mlx_qwen.errors import ConfigError

# Beyond what any size of a model can be, and what any array's can.
MOST = 1 << 48
_LARGEST = sys.float_info.max


class Fields:
    """The fields of `values`, which stand at `place` in config.json; methods raise ConfigError for another type."""

    def __init__(self, values: Mapping[str, Any], place: str) -> None:
        self.values = values
        self.place = place

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1, maximum: int = MOST) -> int:
        """A whole number from `minimum` to `maximum`."""
        value = self.values.get(name, default)
        if not _is_integer(value) or not minimum <= value <= maximum:
            limit = "" if maximum == MOST else f" and at most {maximum:,}"
            raise self._wrong(name, f"a whole number of at least {minimum}{limit}")
        return int(value)

    def number(self, name: str, default: float) -> float:
        """A finite number above 0."""
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
            raise self._wrong(name, "a number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def object(self, name: str) -> "Fields":
        """The fields of the object under `name`."""
        value = self.values.get(name)
        if not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return Fields(value, name if self.place == "config.json" else f"{self.place}.{name}")

    def integers(self, name: str) -> tuple[int, ...]:
        """One whole number or a list of them; none when the field is absent or null."""
        value = self.values.get(name)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(_is_integer(item) for item in found):
            raise self._wrong(name, "a whole number or a list of them")
        return tuple(found)

    def strings(self, name: str) -> tuple[str, ...]:
        """A list of texts; none when the field is absent or null."""
        value = self.values.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise self._wrong(name, "a list of texts")
        return tuple(value or ())

    def _wrong(self, name: str, expected: str) -> ConfigError:
        value = self.values.get(name)
        huge = isinstance(value, int) and not -MOST < value < MOST
        shown = "a number without end" if huge else f"{value!r:.200}"
        return ConfigError(f"{self.place}.{name} is {shown}, expected {expected}.")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
