"""Weights that come from a disk, and may be changed: whether they are there, and whether they are still the same."""

from collections.abc import Callable
from operator import is_
from typing import Any, Self
from weakref import ref

import mlx.core as mx
import mlx.nn as nn


class Mark:
    """Stands for the arrays and modules that a model consists of at one time, and keeps none of them alive.

    What was written into an array in place is not noticed.
    """

    def __init__(self) -> None:
        self._parts: list[ref[object]] | None = None

    def take(self, model: nn.Module) -> None:
        """Stand for what `model` consists of now."""
        self._parts = [ref(part) for part in _parts(model)]

    def stands_for(self, model: nn.Module) -> bool:
        """Whether `model` consists of the same; the first time that it is asked, it does."""
        if self._parts is None:
            self.take(model)
            return True
        found = _parts(model)
        return len(found) == len(self._parts) and all(map(is_, found, (part() for part in self._parts)))


def _parts(model: nn.Module) -> list[object]:
    """All arrays and modules of a model, in an order that depends on their places alone."""
    found: list[object] = []
    left: list[object] = [model]
    while left:
        part = left.pop()
        if isinstance(part, nn.Module | mx.array):
            found.append(part)
        if isinstance(part, dict):
            left += [value for name, value in part.items() if not name.startswith("_")]
        elif isinstance(part, list | tuple):
            left += part
    return found


class ChangingWeights(nn.Module):
    """A model whose weights wait on the disk until they are needed, and may be changed.

    Attributes:
        reread: gives the model its weights once more, where they still wait in another thread.
        mark: another object after a change that was noticed.
    """

    reread: Callable[[Any], None] | None
    mark: Mark
    _identity: str
    _ready: bool
    _ready_vision: bool

    @property
    def identity(self) -> str:
        """Tells the files that the weights are of, and their precision; "" once they are of no files any more."""
        self.notice_changes()
        return self._identity

    @identity.setter
    def identity(self, identity: str) -> None:
        self._identity = identity

    def update(self, parameters: dict[str, Any], strict: bool = True) -> Self:  # type: ignore[override]
        """Replace the given parameters, as `mlx.nn.Module.update` does."""
        self._forget()
        super().update(parameters, strict)
        self.mark.take(self)
        return self

    def notice_changes(self) -> None:
        """Forget what was made of the weights if arrays or modules are others than before, however they came there."""
        if not self.mark.stands_for(self):
            # They may be lazy, and belong to this thread; others trace them from now on.
            mx.eval(self._waiting(vision=False))
            self._forget()
            self.mark.take(self)

    def materialize(self, *, vision: bool) -> None:
        """Read what `load` left on the disk, in the calling thread: another's lazy arrays cannot be computed here."""
        if self._ready_vision or (self._ready and not vision):
            return
        try:
            mx.eval(self._waiting(vision))
        except RuntimeError:
            if self.reread is None:
                raise
            self.reread(self)
            self.mark.take(self)
            mx.eval(self._waiting(vision))
        self._ready, self._ready_vision = True, vision

    def _forget(self) -> None:
        """Drop all that was made of the weights."""
        self._ready, self._ready_vision, self.reread, self._identity = False, False, None, ""
        self.mark = Mark()

    def _waiting(self, vision: bool) -> dict[str, Any]:
        return {name: part for name, part in self.parameters().items() if vision or name != "vision"}
