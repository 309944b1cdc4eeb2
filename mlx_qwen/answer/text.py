"""Turns token ids into text as they arrive."""

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """Incremental decoding: the pieces joined are the text of all ids, and no piece ends inside a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character still lacks bytes."""
        text: str | None = self._stream.step(self._tokenizer, token)
        if text is None:
            self._held.append(token)
            return ""
        self._held.clear()
        return text

    def finish(self) -> str:
        """What is still held back; bytes that form no character come out as U+FFFD."""
        text: str = self._tokenizer.decode(self._held, skip_special_tokens=False) if self._held else ""
        self._held.clear()
        return text
