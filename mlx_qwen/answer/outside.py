"""The text outside of tool calls, with the line breaks that belong to the tags left out."""


class OutsideText:
    """Collects text. Line breaks at its end wait: a call that follows drops them."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._breaks = 0
        self._after_call = False

    def add(self, text: str) -> None:
        """More text."""
        shown = text.rstrip("\n")
        breaks, self._breaks = self._breaks, len(text) - len(shown)
        if shown:
            self._pieces.append("\n" * breaks + shown)
            self._after_call = False
        else:
            self._breaks += breaks

    def call_came(self) -> None:
        """A call stands behind the text."""
        self._breaks, self._after_call = 0, True

    def finish(self) -> None:
        """There is no more; only line breaks behind a last call are dropped."""
        if self._breaks and not self._after_call:
            self._pieces.append("\n" * self._breaks)
        self._breaks = 0

    def take(self) -> str:
        """What is certain and was not taken yet."""
        text = "".join(self._pieces)
        self._pieces.clear()
        return text
