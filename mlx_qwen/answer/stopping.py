"""Stop strings: text is held back while it may still become one."""

from collections.abc import Sequence

from mlx_qwen.answer.tags import partial_tag_length


class StopStrings:
    """Passes text on up to the first stop string, which itself is dropped with everything after it."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.reached = False

    def push(self, text: str) -> str:
        """Takes the next piece and returns what can no longer belong to a stop string."""
        if not self._strings or self.reached:
            return "" if self.reached else text
        self._held += text
        starts = [start for string in self._strings if (start := self._held.find(string)) >= 0]
        if starts:
            self.reached = True
            before, self._held = self._held[: min(starts)], ""
            return before
        certain = len(self._held) - partial_tag_length(self._held, self._strings)
        before, self._held = self._held[:certain], self._held[certain:]
        return before

    def finish(self) -> str:
        """What was held back and is plain text after all."""
        held, self._held = self._held, ""
        return held
