"""Stop strings: text is held back while it may still become one."""

from collections.abc import Sequence

from mlx_qwen.answer.reasoning import ReasoningEnd
from mlx_qwen.answer.tags import partial_tag_length


class StopStrings:
    """Passes text on up to the first stop string, which itself is dropped with everything after it.

    Of several, the one that begins first in the text wins, however the text is cut. With `after`, text passes
    unsearched until the reasoning has ended.
    """

    def __init__(self, strings: Sequence[str], *, after: ReasoningEnd | None = None) -> None:
        self._strings = tuple(strings)
        self._after = after
        self._held = ""
        self.reached = False
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Takes the next piece and returns what can no longer belong to a stop string."""
        if not self._strings or self.reached:
            return "" if self.reached else text
        passed = ""
        if self._after is not None:
            passed, text = self._after.push(text)
        self._held += text
        found = self._first()
        certain = len(self._held) - partial_tag_length(self._held, self._strings)
        if found is not None and found <= certain:  # nothing that begins before it can still become one
            self._reach(found)
            certain = found
        before, self._held = self._held[:certain], "" if self.reached else self._held[certain:]
        return passed + before

    def finish(self) -> str:
        """What was held back, up to a stop string whose rival never came."""
        held = self._held + (self._after.finish() if self._after else "")
        self._held = ""
        if self.reached:
            return held
        self._held = held
        found = self._first()
        if found is not None:
            self._reach(found)
            held = held[:found]
        self._held = ""
        return held

    def _reach(self, place: int) -> None:
        """A stop string begins at this place of what is held: of several, the shortest is named."""
        begun = [string for string in self._strings if self._held.startswith(string, place)]
        self.reached, self.found = True, min(begun, key=len)

    def _first(self) -> int | None:
        return min((start for string in self._strings if (start := self._held.find(string)) >= 0), default=None)
